"""The sets of cases of `quality_scene_text`: which words, fonts and pictures each is drawn from, and what it asks for.

The first five sets are the main table. In the first four a word is written anew in its own place; `insertion` writes on
a background that never held a word, in a region that is wider than the word. A name says nothing about a font that the
model never saw, so that instructions of the sets of unseen fonts name the color alone, and a second word of the same
style stands beside the region.
"""

from dataclasses import dataclass, field, replace

from overpaint.scene_text.instructions import compose
from overpaint.train.lettering_scenes import STAGES, Stage

__all__ = ["MAIN", "SETS", "WORDINGS", "Case", "Set", "instruction"]

_FREE = STAGES["photographs"]
_FIXED = replace(_FREE, free=0.0, siblings=0.0)
_EVERY = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Case:
    """One picture to write, a row of `scene_text_cases.tsv`."""

    split: str  # "test" or "validation"
    set: str  # a name of `SETS`
    index: int  # number within the set
    text: str  # the word
    font: str  # name of its face
    color: str  # name of its color
    other: str  # a second color, a second font, the suffix of a variant, or the number of a wording
    photo: str  # photograph of the background
    seed: int  # of the generator


@dataclass(frozen=True)
class Set:
    """How the cases of a set are drawn."""

    test: int  # cases of the test
    validation: int  # cases of validation
    stage: Stage  # of the generator
    unseen_words: bool = True  # words of the held-out tenth
    fonts: str = "seen"  # "seen", "unseen", "regular" faces, or families with held-out "variants"
    font: str | None = None  # the only face
    names: str = "font color"  # what the instruction names
    region: str = (
        "tight"  # around the word; or "wider", "twice" as wide, or "rotated" in a whole picture
    )
    plain: bool = False  # lower-case letters only
    lengths: tuple[int, ...] = field(default=_EVERY)
    other: str = ""  # what the column `other` holds: "color", "font", "variant" or "wording"


SETS = {
    "seen word, seen font": Set(200, 40, _FREE, unseen_words=False),
    "unseen word, seen font": Set(200, 40, _FREE),
    "seen word, unseen font": Set(
        200, 40, replace(_FREE, siblings=1.0), unseen_words=False, fonts="unseen", names="color"
    ),
    "unseen word, unseen font": Set(
        200, 40, replace(_FREE, siblings=1.0), fonts="unseen", names="color"
    ),
    "insertion": Set(200, 40, _FIXED, region="wider"),
    "grey line": Set(
        105, 28, replace(STAGES["grey"], font=None), font="Roboto-Bold", names="", plain=True, lengths=_EVERY[1:]
    ),
    "one font": Set(
        105, 28, replace(STAGES["single"], font=None), font="Roboto-Bold", lengths=_EVERY[1:]
    ),
    "color": Set(120, 24, replace(_FIXED, basic=1.0), lengths=_EVERY[2:], other="color"),
    "style, seen font": Set(60, 16, replace(_FIXED, siblings=1.0), names="", lengths=_EVERY[2:]),
    "style, unseen font": Set(
        60, 16, replace(_FIXED, siblings=1.0), fonts="unseen", names="", lengths=_EVERY[2:]
    ),
    "variation": Set(100, 24, _FIXED, fonts="variants", lengths=_EVERY[3:], other="variant"),
    "mixing": Set(50, 12, _FIXED, fonts="regular", lengths=_EVERY[3:], other="font"),
    "wording": Set(
        60, 30, replace(_FIXED, basic=1.0), names="color", lengths=_EVERY[2:], other="wording"
    ),
    "twice as wide": Set(100, 24, _FIXED, region="twice", lengths=(2, 3, 4, 5)),
    "rotated": Set(60, 12, _FIXED, region="rotated", lengths=_EVERY[1:]),
}  # fmt: skip
MAIN = tuple(SETS)[:5]

# Wordings of a color that are in no template of training; {w} is the word, {c} the color.
WORDINGS = (
    'The word "{w}" is painted in a delicate shade of {c}', 'Please letter "{w}" using {c} paint',
    '"{w}", all of it {c}', 'I would like "{w}" to be {c}', 'Make "{w}" look {c}', 'Put "{w}" there, {c} please',
    'A sign that says "{w}" with {c} characters', 'Paint the text "{w}" {c}', 'The lettering "{w}" should be {c}',
    '{c}: "{w}"', 'Spell "{w}" and tint it {c}', 'Draw "{w}" filled with {c}', 'Text "{w}" as {c} as can be',
    'Give me "{w}" printed in {c} ink', 'In {c}, the word "{w}"', 'Use {c} for the word "{w}"', 'Some {c} "{w}" here',
    'Let "{w}" shine in {c}', '"{w}" sprayed onto the wall in {c}', 'The {c} inscription "{w}"',
    'Chalk "{w}" in {c} on it', 'Set "{w}" in {c} type', 'Engrave "{w}" and fill it with {c}',
    'A label "{w}", {c} toned',
    '"{w}" is what it says, {c} is its hue', 'Replace it by "{w}", {c} this time', 'Brush "{w}" on it with {c}',
    'Now show "{w}" in a {c} tone', 'Its text is "{w}" and it is {c}', 'Color the new word "{w}" {c}',
)  # fmt: skip


def instruction(case: Case, *, variant: str = "") -> str:
    """Return the instruction of a case.

    Args:
        case: The case.
        variant: Empty; `"other"` for the second color, the variant of the font, the mix of fonts or the wording of the
            column `other`; or `"no word"` for the same without the word.
    """
    rule = SETS[case.set]
    font = case.font if "font" in rule.names else None
    color = case.color if "color" in rule.names else None
    if variant == "other" and rule.other == "wording":
        return WORDINGS[int(case.other)].format(w=case.text, c=case.color)
    if variant == "other":
        color = case.other if rule.other == "color" else color
        font = {"variant": f"{case.font}{case.other}", "font": f"{case.font} and {case.other}"}.get(
            rule.other, font
        )
    whole = compose(case.text, font, color)
    if variant == "no word":
        return whole.removeprefix(f'Write "{case.text}"').strip()
    return whole
