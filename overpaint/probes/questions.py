"""Questions: prompts that evaluate one edit, each with the labels that a classifier should give to its picture.

The questions about an edit have six roles:

target            names the erased concept, in a wording and a pair that the model was trained on
unseen            names it in wordings that neither the model's captions nor the edit used
held out          names it in an (object, style) pair that training never showed
other             names another concept of the same kind
other held out    the same in a held-out pair
plain             names no concept of the kind

All concepts of the kind get the same objects, colors and seeds, so that their pictures can be compared in pairs.
"""

import difflib
import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from overpaint.errors import check_seed, later_seed, listed
from overpaint.probes.text import article

__all__ = [
    "KINDS",
    "ROLES",
    "Question",
    "build",
    "caption",
    "family",
    "is_sign",
    "parse_concept",
    "preserve_prompts",
    "split_concepts",
]

KINDS = ("style", "object", "color")
ROLES = ("target", "unseen", "held out", "other", "other held out", "plain")

# Wordings by (names a style, is reserved for generality). No wording begins with the concept, because the features of
# such a prompt at the concept are those of the bare concept, which edits fit and preserve lists contain.
_WORDINGS = {
    (True, False): (
        "{a} {object} in {style} style",
        "a drawing of {a} {object} in {style} style",
        "a picture of {a} {object}, {style} style",
    ),
    (True, True): (
        "the {object} is in {style} style",
        "one {object} in {style} style",
        "in {style} style: {a} {object}",
    ),
    (False, False): ("{a} {object}", "a picture of {a} {object}"),
    (False, True): ("one {object}", "here: {a} {object}"),
}


@dataclass(frozen=True)
class Question:
    """One prompt and seed, and the labels that its picture should get; a label is `""` if the prompt names none."""

    prompt: str
    seed: int
    role: str
    object: str = ""
    style: str = ""
    color: str = ""

    def label(self, kind: str) -> str:
        """Return the label of `kind`, one of `KINDS`; `""` if the prompt names none."""
        return {"object": self.object, "style": self.style, "color": self.color}[kind]


def parse_concept(text: str, labels: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """Return the kind and the label that `text` names: `openmoji style` is the style `openmoji`.

    Args:
        text: The concept as in a prompt.
        labels: The classifier's labels, by kind.

    Raises:
        ValueError: No label fits.
    """
    words = " ".join(text.lower().split()).removeprefix("the ")
    for kind in (k for k in KINDS if k in labels):
        suffix = " background" if kind == "color" else f" {kind}"
        for name in (words, words.removesuffix(suffix), f"{words} logo", f"flag of {words}"):
            if name in labels[kind]:
                return kind, name
    known = "; ".join(f"{kind}: {listed(names, limit=3)}" for kind, names in labels.items())
    every = [name for names in labels.values() for name in names]
    close = difflib.get_close_matches(words, every, n=3)
    guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"the judge has no label for {text!r}, its labels are {known}.{guess} Name one of them; or measure other "
        "concepts and models on an evaluation set with a CLIP, on the command line `overpaint evaluate MODEL CHANGE "
        "--set natural --scorer CLIP`."
    )


def caption(object_: str, style: str, color: str, *, frame: int = 0, unseen: bool = False) -> str:
    """Return a prompt for `object_` in `style` on a background of `color`.

    Args:
        object_: The object, person, flag or logo.
        style: `""` for none.
        color: Color of the background, `""` for none.
        frame: Index of the wording, modulo their number.
        unseen: Use the wordings that are reserved for generality.
    """
    wordings = _WORDINGS[bool(style), unseen]
    is_named = object_.startswith("flag of") or object_.endswith(" logo")
    text = wordings[frame % len(wordings)].format(
        a="the" if is_named else article(object_), object=object_, style=style
    )
    return f"{text} on {article(color)} {color} background" if color else text


def build(
    kind: str,
    erase: str,
    *,
    labels: Mapping[str, Sequence[str]],
    held_out: Collection[tuple[str, str]] = (),
    size: int = 40,
    others: int = 6,
    seed: int = 0,
) -> tuple[Question, ...]:
    """Return the questions that evaluate the erasure of one concept.

    Args:
        kind: Kind of the concept, one of `KINDS`.
        erase: Its label.
        labels: The classifier's labels, by kind.
        held_out: (object, style) pairs that training never showed.
        size: Number of questions for each concept of the kind; the roles unseen and plain have half as many.
        others: Largest number of other concepts of the kind.
        seed: Seed of the objects, colors and latents.

    Raises:
        ValueError: `size` is not positive, or `erase` is not a label of `kind`.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    if erase not in labels.get(kind, ()):
        raise ValueError(
            f"{erase!r} is not a label of kind {kind!r}: name one of {labels.get(kind)}."
        )
    rest = [name for name in labels[kind] if name != erase and not is_sign(name)]
    seed = check_seed(seed)
    rest = random.Random(seed).sample(rest, min(others, len(rest)))
    scenes = list(_scenes(labels, held_out, size, seed, kind=kind, is_evaluated=True))
    half = scenes[: (size + 1) // 2]
    rows = [_named(scene, kind, erase, "target", i) for i, scene in enumerate(scenes)]
    rows += [_named(scene, kind, erase, "unseen", i) for i, scene in enumerate(half)]
    for name in rest:
        rows += [_named(scene, kind, name, "other", i) for i, scene in enumerate(scenes)]
    if kind != "object":
        rows += [_named(scene, kind, "", "plain", i) for i, scene in enumerate(half)]
    rows = [q for q in rows if (q.object, q.style) not in held_out]
    return (*rows, *_held_out_questions(kind, erase, rest, held_out, size, seed))


def preserve_prompts(
    kind: str,
    erase: str,
    *,
    labels: Mapping[str, Sequence[str]],
    held_out: Collection[tuple[str, str]] = (),
    size: int = 320,
    seed: int = 1,
) -> tuple[str, ...]:
    """Return prompts for the preserve list of an edit.

    These are the empty prompt, the other concepts of the kind by name (first those of the concept's family: objects,
    persons, flags or logos), and captions of them. Half of the captions have a wording that `build` does not use. All
    have objects that `build` does not use, so that preserved and evaluated prompts share neither text nor scene.

    Args:
        kind: Kind of the concept, one of `KINDS`.
        erase: Its label.
        labels: The classifier's labels, by kind.
        held_out: (object, style) pairs that training never showed; they are left out.
        size: Largest number of prompts; at least a quarter of them are captions.
        seed: Seed of the objects and colors.
    """
    rest = [name for name in labels[kind] if name != erase]
    seed = check_seed(seed)
    random.Random(seed).shuffle(rest)
    rest.sort(key=lambda name: family(name) != family(erase))
    suffix = {"style": " style", "color": " background"}.get(kind, "")
    rows = ["", *(name + suffix for name in rest[: max(size - 1 - size // 4, 0)])]
    count = max(size - len(rows), 0)
    scenes = _scenes(labels, held_out, count, seed, kind=kind, is_evaluated=False)
    for i, scene in enumerate(scenes):
        has_concept = i % 4 or kind == "object"  # every fourth names no concept of the kind
        question = _named(scene, kind, rest[i % len(rest)] if has_concept else "", "", 0)
        if i % 2 and kind != "object":
            rows.append(caption(question.object, question.style, question.color, frame=i // 2))
            continue
        style = f", {question.style} style" if question.style else ""
        background = f", {question.color} background" if question.color else ""
        rows.append(f"{question.object}{style}{background}")
    return tuple(dict.fromkeys(rows))[:size]


def split_concepts(labels: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Return the concepts that an edit may preserve, as in prompts, and the objects that only `build` uses.

    Args:
        labels: The classifier's labels, by kind.
    """
    evaluated = [name for name in labels["object"] if not is_sign(name) and _is_evaluated(name)]
    preserved = [f"{name} style" for name in labels.get("style", ())]
    preserved += [f"{name} background" for name in labels.get("color", ())]
    return preserved + [name for name in labels["object"] if name not in evaluated], evaluated


def _scenes(
    labels: Mapping[str, Sequence[str]],
    held_out: Collection[tuple[str, str]],
    size: int,
    seed: int,
    *,
    kind: str,
    is_evaluated: bool,
) -> Iterator[Question]:
    """Yield scenes whose objects were trained in every style; every other scene names its color.

    Args:
        labels: The classifier's labels, by kind.
        held_out: (object, style) pairs that training never showed.
        size: Number of scenes.
        seed: Seed of the objects, colors and latents.
        kind: Kind of the erased concept; scenes for a color all name one.
        is_evaluated: Use the objects of the questions, otherwise those of preserve lists.
    """
    rng = random.Random(seed)
    styles, colors = labels.get("style", ("",)), labels.get("color", ("",))
    objects = [name for name in labels.get("object", ("thing",)) if not is_sign(name)]
    trained = [o for o in objects if not any((o, s) in held_out for s in styles)] or objects
    trained = [o for o in trained if _is_evaluated(o) == is_evaluated] or trained
    rng.shuffle(trained)
    for i, name in enumerate(islice(cycle(trained), size)):
        color = rng.choice(colors) if i % 2 or kind == "color" else ""
        yield Question("", later_seed(seed, i), "", name, styles[i % len(styles)], color)


def _named(scene: Question, kind: str, name: str, role: str, frame: int) -> Question:
    """Return the scene with concept `name` of `kind`, its role and its prompt."""
    if kind == "style":
        question = replace(scene, style=name)
    elif kind == "color":
        question = replace(scene, color=name)
    else:
        question = replace(scene, object=name, style="" if is_sign(name) else scene.style)
    prompt = caption(
        question.object, question.style, question.color, frame=frame, unseen=role == "unseen"
    )
    return replace(question, prompt=prompt, role=role)


def _held_out_questions(
    kind: str,
    erase: str,
    rest: Sequence[str],
    held_out: Collection[tuple[str, str]],
    size: int,
    seed: int,
) -> Iterator[Question]:
    """Yield questions in held-out pairs, at most `size` for each concept of the kind."""
    used: dict[str, int] = {}
    for i, (name, style) in enumerate(sorted(held_out)):
        color = (erase, *rest)[i % (1 + len(rest))] if kind == "color" else ""
        place = later_seed(seed, i)
        question = Question(caption(name, style, color), place, "", name, style, color)
        label = question.label(kind)
        used[label] = used.get(label, 0) + 1
        if label in (erase, *rest) and used[label] <= size:
            yield replace(question, role="held out" if label == erase else "other held out")


def _is_evaluated(name: str) -> bool:
    """Return whether an object belongs to the half that questions use; preserve lists use the other half."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def family(name: str) -> str:
    """Return the family of a label: `person`, `flag`, `logo`, or `""` for other objects, styles and colors."""
    if name.startswith(("person ", "flag of ")):
        return name.split()[0]
    return "logo" if name.endswith(" logo") else ""


def is_sign(name: str) -> bool:
    """Return whether a label is a person, flag or logo, which prompts name without a style."""
    return bool(family(name))
