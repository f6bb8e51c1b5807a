"""The questions that judge an edit: prompts with the labels their pictures should be given.

An edit of one concept is asked about five kinds of picture, by role:

target            names the concept to erase, in a pair and a wording that the model was trained on
unseen            the same in wordings that neither the model's captions nor the edit ever used
held out          the same in an (object, style) pair that training never showed
other             names another concept of the same kind; `other held out` in a held-out pair
plain             names no concept of the kind

Every concept of the kind is asked with the same objects, colors and seeds: pictures pair up.
"""

import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

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

# By (names a style, is kept for generality). None begins with the concept: to a causal encoder such a prompt is, up to
# there, the bare concept, which edits are fitted to and preserve lists hold.
_FRAMES = {
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
    """One picture to make, and what a judge should see in it; `""` where nothing is said."""

    prompt: str
    seed: int
    role: str
    object: str = ""
    style: str = ""
    color: str = ""

    def label(self, kind: str) -> str:
        """Return what the prompt says of `kind`, one of `KINDS`; `""` if nothing."""
        return {"object": self.object, "style": self.style, "color": self.color}[kind]


def parse_concept(text: str, labels: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """Return the kind and the label that `text` names: `openmoji style` is the style `openmoji`.

    Args:
        text: As in a prompt.
        labels: What a judge can say, by kind.

    Raises:
        ValueError: No label fits.
    """
    words = " ".join(text.lower().split()).removeprefix("the ")
    for kind in (k for k in KINDS if k in labels):
        suffix = " background" if kind == "color" else f" {kind}"
        for name in (words, words.removesuffix(suffix), f"{words} logo", f"flag of {words}"):
            if name in labels[kind]:
                return kind, name
    known = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in labels.items())
    raise ValueError(f"the judge does not know {text!r}. Name one of: {known}.")


def caption(object_: str, style: str, color: str, *, frame: int = 0, unseen: bool = False) -> str:
    """Return a prompt for `object_` in `style` on `color`; `frame` counts through the wordings.

    Args:
        object_: The object, person, flag or logo.
        style: `""` for none.
        color: Of the background, `""` for none.
        frame: Which wording, modulo their number.
        unseen: Use the wordings that are kept for generality.
    """
    frames = _FRAMES[bool(style), unseen]
    article = "the" if object_.startswith("flag of") or object_.endswith(" logo") else _a(object_)
    text = frames[frame % len(frames)].format(a=article, object=object_, style=style)
    return f"{text} on {_a(color)} {color} background" if color else text


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
    """Return the questions that judge the loss of one concept.

    Args:
        kind: Of the concept, one of `KINDS`.
        erase: Its label.
        labels: What the judge can say, by kind.
        held_out: (object, style) pairs that training never showed.
        size: Questions for each concept of the kind; half as many are unseen or plain.
        others: At most so many other concepts of the kind.
        seed: Of the objects, colors and latents drawn.

    Raises:
        ValueError: `size` is not positive, or `erase` is no label of `kind`.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    if erase not in labels.get(kind, ()):
        raise ValueError(f"{erase!r} is no {kind} the judge knows: name one of {labels.get(kind)}.")
    rest = [name for name in labels[kind] if name != erase and not is_sign(name)]
    rest = random.Random(seed).sample(rest, min(others, len(rest)))
    scenes = list(_scenes(labels, held_out, size, seed, drawn=kind, side=0))
    rows = [_at(scene, kind, erase, "target", i) for i, scene in enumerate(scenes)]
    rows += [_at(s, kind, erase, "unseen", i) for i, s in enumerate(scenes[: (size + 1) // 2])]
    for name in rest:
        rows += [_at(scene, kind, name, "other", i) for i, scene in enumerate(scenes)]
    if kind != "object":
        rows += [_at(s, kind, "", "plain", i) for i, s in enumerate(scenes[: (size + 1) // 2])]
    rows = [q for q in rows if (q.object, q.style) not in held_out]
    return (*rows, *_composed(kind, erase, rest, held_out, size, seed))


def preserve_prompts(
    kind: str,
    erase: str,
    *,
    labels: Mapping[str, Sequence[str]],
    held_out: Collection[tuple[str, str]] = (),
    size: int = 320,
    seed: int = 1,
) -> tuple[str, ...]:
    """Return prompts that an edit should leave alone, for its preserve list.

    The empty prompt, the other concepts of the kind by name (those of the concept's family first: objects, persons,
    flags or logos), then captions of them, half in a wording of their own and half in `ask`'s, all with objects that
    `ask` never uses, so that what is preserved and what is judged are neither the same prompts nor the same scenes.

    Args:
        kind: Of the concept, one of `KINDS`.
        erase: Its label.
        labels: What the judge can say, by kind.
        held_out: (object, style) pairs that training never showed; they are left out.
        size: How many prompts at most; at least a quarter of them are captions.
        seed: Of the objects and colors drawn.
    """
    rest = [name for name in labels[kind] if name != erase]
    random.Random(seed).shuffle(rest)
    rest.sort(key=lambda name: family(name) != family(erase))
    suffix = {"style": " style", "color": " background"}.get(kind, "")
    rows = ["", *(name + suffix for name in rest[: max(size - 1 - size // 4, 0)])]
    for i, scene in enumerate(
        _scenes(labels, held_out, max(size - len(rows), 0), seed, drawn=kind, side=1)
    ):
        named = i % 4 or kind == "object"  # every fourth names no concept of the kind
        found = _at(scene, kind, rest[i % len(rest)] if named else "", "", 0)
        if i % 2 and kind != "object":
            rows.append(caption(found.object, found.style, found.color, frame=i // 2))
            continue
        style = f", {found.style} style" if found.style else ""
        background = f", {found.color} background" if found.color else ""
        rows.append(f"{found.object}{style}{background}")
    return tuple(dict.fromkeys(rows))[:size]


def split_concepts(labels: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Return the concepts that an edit may look after, as in prompts, and the objects that only `ask` asks about.

    Args:
        labels: What the judge can say, by kind.
    """
    asked = [name for name in labels["object"] if not is_sign(name) and half(name) == 0]
    known = [f"{name} style" for name in labels.get("style", ())]
    known += [f"{name} background" for name in labels.get("color", ())]
    return known + [name for name in labels["object"] if name not in asked], asked


def _scenes(
    labels: Mapping[str, Sequence[str]],
    held_out: Collection[tuple[str, str]],
    size: int,
    seed: int,
    *,
    drawn: str,
    side: int,
) -> Iterator[Question]:
    """Draw scenes whose objects were trained in every style; every other one names its color.

    Objects fall into two halves by their names: one is asked about, the other stands on preserve lists.
    """
    rng = random.Random(seed)
    styles, colors = labels.get("style", ("",)), labels.get("color", ("",))
    things = [name for name in labels.get("object", ("thing",)) if not is_sign(name)]
    seen = [o for o in things if not any((o, s) in held_out for s in styles)] or things
    seen = [o for o in seen if half(o) == side] or seen
    rng.shuffle(seen)
    for i, thing in enumerate(islice(cycle(seen), size)):
        color = rng.choice(colors) if i % 2 or drawn == "color" else ""
        yield Question("", seed + i, "", thing, styles[i % len(styles)], color)


def _at(scene: Question, kind: str, name: str, role: str, frame: int) -> Question:
    """Put concept `name` of `kind` into the scene and word it."""
    if kind == "style":
        found = replace(scene, style=name)
    elif kind == "color":
        found = replace(scene, color=name)
    else:
        found = replace(scene, object=name, style="" if is_sign(name) else scene.style)
    words = caption(found.object, found.style, found.color, frame=frame, unseen=role == "unseen")
    return replace(found, prompt=words, role=role)


def _composed(
    kind: str,
    erase: str,
    rest: Sequence[str],
    held_out: Collection[tuple[str, str]],
    size: int,
    seed: int,
) -> Iterator[Question]:
    """Ask for held-out pairs, at most `size` for each concept of the kind."""
    used: dict[str, int] = {}
    for i, (thing, style) in enumerate(sorted(held_out)):
        color = (erase, *rest)[i % (1 + len(rest))] if kind == "color" else ""
        found = Question(caption(thing, style, color), seed + i, "", thing, style, color)
        name = found.label(kind)
        used[name] = used.get(name, 0) + 1
        if name in (erase, *rest) and used[name] <= size:
            yield replace(found, role="held out" if name == erase else "other held out")


def half(name: str) -> int:
    """Return 0 for objects that are asked about, 1 for those on preserve lists."""
    return hashlib.sha256(name.encode()).digest()[0] % 2


def family(name: str) -> str:
    """Return what a label is of: a person, a flag, a logo, or an object (or a style, or a color)."""
    if name.startswith(("person ", "flag of ")):
        return name.split()[0]
    return "logo" if name.endswith(" logo") else ""


def is_sign(name: str) -> bool:
    """Persons, flags and logos: drawn in no studio's style, or in poses."""
    return bool(family(name))


def _a(noun: str) -> str:
    return "an" if noun[:1] in "aeiou" else "a"
