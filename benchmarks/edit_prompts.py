"""Prompts of `quality_edit`: how one concept is asked for, and what else is drawn to see that it stays.

Roles of a prompt:

target       the concept, in a frame that `icons` was trained on
wording      the concept, in a frame that no training caption has
synonym      an object by another name of training, without its own name where there is such a synonym
new synonym  an object by a name that no training caption has; few objects have one
replacement  the prompts of `target` with the new concept; drawn by the unedited model only
other        another concept of the kind: for persons, logos and flags first those
plain        an object, and no concept of the kind

Training leaves out two tenths of the frames and of the synonyms. Prompts of validation concepts take one of them,
prompts of test concepts the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from edit_concepts import bare

from overpaint.errors import later_seed
from overpaint.probes import questions
from overpaint.probes.text import article
from overpaint.train import captions

__all__ = ["TARGETS", "Asked", "Prompt", "Sizes", "ask", "holds", "preserved"]

TARGETS = ("target", "wording", "synonym", "new synonym")
_UNSEEN: tuple[captions.Part, ...] = ("validation", "held out")
Labels = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Sizes:
    """Numbers of prompts: of the concept, of each other way to name it, of other concepts, and plain ones."""

    targets: int = 12
    wordings: int = 6
    others: int = 8
    plain: int = 6

    @classmethod
    def of(cls, size: int, *, only_trained: bool = False) -> "Sizes":
        """Return the numbers for `size` prompts of the concept; `only_trained` leaves out other wordings."""
        half = (size + 1) // 2
        return cls(size, 0 if only_trained else half, max(6, 2 * size // 3), half)


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its start noise, its role, and the label that its picture should get, by kind of label."""

    text: str
    seed: int
    role: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """One pair of concepts, how a scorer names them, and its prompts.

    Attributes:
        kind: Kind of the concept, as in `edit_concepts`.
        old: The concept.
        new: Its replacement.
        head: Kind of label, `"style"`, `"object"` or `"color"`.
        labels: The labels of `old` and `new`.
        prompts: All prompts, those of the role `replacement` last.
    """

    kind: str
    old: str
    new: str
    head: str
    labels: tuple[str, str]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class _Scene:
    """What a prompt names; an empty text is not named."""

    object: str
    style: str = ""
    color: str = ""

    def labels(self) -> dict[str, str]:
        named = {"object": self.object, "style": self.style, "color": self.color}
        return {kind: name for kind, name in named.items() if name}


def ask(
    kind: str,
    old: str,
    new: str,
    *,
    labels: Labels,
    held_out: Sequence[tuple[str, str]],
    sizes: Sizes,
    seed: int,
    part: captions.Part,
) -> Asked:
    """Return the prompts of one pair; the prompts of `target` and `replacement` differ in the concept alone.

    Args:
        kind: Kind of the concept.
        old: The concept.
        new: Its replacement.
        labels: Labels of the scorer, by kind of label.
        held_out: (object, style) pairs that no prompt shows.
        sizes: Numbers of prompts.
        seed: Seed of the scenes and of the start noise.
        part: The tenth of the frames and synonyms that `wording` and `new synonym` take: `"validation"` for validation
            concepts, `"held out"` for test concepts.

    Raises:
        ValueError: `part` is another one.
    """
    if part not in _UNSEEN:
        raise ValueError(
            f"`part` must be 'validation' or 'held out', got {part!r}: training shows the rest."
        )
    head, label = questions.parse_concept(old, labels)
    _, other_label = questions.parse_concept(new, labels)
    scenes = _scenes(head, (label, other_label), labels, held_out, sizes.targets, seed)
    prompts: list[Prompt] = []
    for role in (*TARGETS, "replacement"):
        name = other_label if role == "replacement" else label
        frames = part if role == "wording" else "trained"
        words = (name,)
        if role.endswith("synonym"):
            words = _synonyms(name, part if role == "new synonym" else "trained")
        if words and (head == "object" or not role.endswith("synonym")):
            number = sizes.wordings if role in TARGETS[1:] else sizes.targets
            prompts += _prompts(role, head, name, scenes[:number], frames, words, seed)
    others = _others(head, label, other_label, labels, sizes.others, seed)
    for index in range(sizes.others if others else 0):
        turn, i = divmod(
            index, len(others)
        )  # few styles and colors: each is drawn in several scenes
        shown = [scenes[turn % len(scenes)]]
        prompts += _prompts("other", head, others[i], shown, "trained", (others[i],), seed + 1 + index)  # fmt: skip
    plain = _scenes(
        "" if head == "object" else head,
        (label, other_label),
        labels,
        held_out,
        sizes.plain,
        seed + 1,
    )
    prompts += _prompts("plain", "", "", plain, "trained", ("",), seed + 100)
    prompts.sort(key=lambda p: p.role == "replacement")  # last, since only one model draws them
    return Asked(kind, old, new, head, (label, other_label), tuple(prompts))


def preserved(pairs: Mapping[str, str], kinds: Mapping[str, str], labels: Labels) -> list[str]:
    """Return the preserve list for some pairs, the same for every method.

    It names all styles and colors, with and without "style" and "background", all persons, logos and flags, and the
    objects that no prompt of `ask` shows beside the concept. What contains an erased concept is left out.
    """
    known, _ = questions.split_concepts(labels)
    names = [*known, *labels.get("style", ()), *labels.get("color", ())]
    erased = [bare(kinds[old], old) for old in pairs]
    return [name for name in dict.fromkeys(names) if not any(holds(name, old) for old in erased)]


def holds(text: str, words: str) -> bool:
    """Return whether `text` contains `words` as whole words, in any case."""
    return f" {_plain(words)} " in f" {_plain(text)} "


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _scenes(
    head: str,
    without: Sequence[str],
    labels: Labels,
    held_out: Sequence[tuple[str, str]],
    number: int,
    seed: int,
) -> list[_Scene]:
    """Return scenes without a concept of `head`, of objects that preserve lists do not name."""
    _, evaluated = questions.split_concepts(labels)
    split = {name for name, _ in held_out}
    objects = [o for o in evaluated if o not in split] or list(evaluated)
    objects = [o for o in objects if o not in without] or list(objects)
    styles = [s for s in labels["style"] if s not in without] or list(labels["style"])
    colors = [c for c in labels["color"] if c not in without] or list(labels["color"])
    rng = np.random.default_rng([seed, 1])
    mixed = [str(name) for name in rng.permutation(objects)]
    scenes: list[_Scene] = []
    for i in range(number):
        style = styles[i % len(styles)] if head != "style" else ""
        color = str(rng.choice(colors)) if head != "color" and i % 2 else ""
        scenes.append(_Scene(mixed[i % len(mixed)] if head != "object" else "", style, color))
    return scenes


def _prompts(
    role: str,
    head: str,
    name: str,
    scenes: Sequence[_Scene],
    part: captions.Part,
    words: Sequence[str],
    seed: int,
) -> list[Prompt]:
    """Return a prompt for each scene with the concept `name` of `head` in it, called one of `words` in turn."""
    writer = captions.Captions(part)
    rng = np.random.default_rng([seed, 2])
    start = {"wording": 1000, "synonym": 2000, "plain": 3000, "new synonym": 4000}.get(role, 0)
    rows: list[Prompt] = []
    for i, scene in enumerate(scenes):
        named = {"object": scene.object, "style": scene.style, "color": scene.color}
        named |= {head: name} if head else {}
        if questions.is_sign(named["object"]):
            named["style"] = ""
        whole = _Scene(**named)
        called = words[i % len(words)]
        needed = [called] if head else []
        needed += [v for kind, v in whole.labels().items() if kind not in ("object", head)]
        thing = called if head == "object" else whole.object
        text = _frame(writer, thing, whole, needed, rng)
        rows.append(Prompt(text, later_seed(seed, start + i), role, whole.labels()))
    return rows


def _frame(
    writer: captions.Captions,
    thing: str,
    scene: _Scene,
    needed: Sequence[str],
    rng: np.random.Generator,
) -> str:
    """Return a frame that names all of `needed`; orders that leave out a part are drawn again."""
    seeds = rng.integers(2**32, size=200)
    for number in seeds:
        inner = np.random.default_rng(int(number))
        is_named = scene.object.startswith("flag of") or scene.object.endswith(" logo")
        phrase = writer.noun_phrase(thing, inner, determiner="the" if is_named else None)
        text = writer.frame(phrase, scene.style, scene.color, inner)
        if all(holds(text, word) for word in needed):
            return text
    style = f" in {scene.style} style" if scene.style else ""
    ground = f" on {article(scene.color)} {scene.color} background" if scene.color else ""
    return f"{article(thing)} {thing}{style}{ground}"


def _synonyms(name: str, part: captions.Part) -> tuple[str, ...]:
    """Return the synonyms of an object that belong to `part`, without those that hold its name.

    Of those of training all are returned if each holds it.
    """
    unseen = {of: captions.held_out_synonyms(of) for of in _UNSEEN}
    known = captions.synonyms().get(name, ())
    if part == "trained":
        known = tuple(s for s in known if not any(s in names for names in unseen.values()))
    else:
        known = tuple(s for s in known if s in unseen[part])
    other = tuple(s for s in known if not holds(s, name))
    return other or (known if part == "trained" else ())


def _others(head: str, label: str, new: str, labels: Labels, number: int, seed: int) -> list[str]:
    """Return other concepts of the kind: four of the family of a person, logo or flag, then objects."""
    rng = np.random.default_rng([seed, 3])
    rest = [str(n) for n in rng.permutation([n for n in labels[head] if n not in (label, new)])]
    if head != "object":
        return rest[:number]
    _, evaluated = questions.split_concepts(labels)
    near = [n for n in rest if questions.family(n) == questions.family(label)]
    objects = [n for n in rest if n in evaluated]
    chosen = near[:4] if questions.is_sign(label) else []
    return [*chosen, *(n for n in objects if n not in chosen)][:number]
