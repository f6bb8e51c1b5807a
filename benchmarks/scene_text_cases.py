"""The cases that `quality_scene_text` measures: words, fonts, colors, photographs and seeds, drawn once and committed.

    python benchmarks/scene_text_cases.py [--photos FOLDER] [--fonts FOLDER]

The rule, with the seed `SEED`. A string is unseen if `lettering_words.is_held_out` holds, which hashes its lower-case
form, and seen otherwise. The second byte of SHA-256 of the same form separates the two lists: even for validation, odd
for the test; strings of one character are too few for that. Four in five strings are frequent English words, the others
random letters and digits. No string occurs twice in a set of a list, and none that the training's own checks have
shown. Lengths 1 to 8 are equally frequent. Seen fonts are those of training, each family equally often; unseen ones are
of the held-out families, every third of which, in alphabetical order, belongs to validation. Photographs of the test
are `photographs.HELD_OUT`, those of validation `photographs.VALIDATION`.

The generator of the training data draws the pictures; the color that it chooses is part of the list. Writes
`scene_text_cases.tsv`, whose first line is the SHA-256 of the rest. A list that was looked at is not drawn again.
"""

import argparse
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from scene_text_crops import Materials, crop, other_color
from scene_text_sets import SETS, Case, Set

from overpaint import files
from overpaint.train import lettering, lettering_fonts, lettering_words, photographs
from overpaint.train.lettering_fonts import Face
from overpaint.train.lettering_scenes import photograph_names

__all__ = ["Pool", "checked_words", "digest", "draw_cases", "load", "pool", "table"]

PATH = Path(__file__).with_name("scene_text_cases.tsv")
SEED = 20261129
_CHECK_SEED = 7_777  # of the words that `overpaint.train.lettering` checks
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Pool:
    """Fonts and photographs that one list is drawn from.

    Attributes:
        split: `"test"` or `"validation"`.
        seen: Faces of training.
        unseen: Faces of held-out families.
        variants: Faces that were held out of a family of training, by family and suffix, such as `-Bold`.
        photos: Names of photographs.
    """

    split: str
    seen: tuple[Face, ...]
    unseen: tuple[Face, ...]
    variants: Mapping[tuple[str, str], Face]
    photos: tuple[str, ...]


def pool(faces: Sequence[Face], split: str) -> Pool:
    """Return the fonts and photographs of a list.

    Args:
        faces: All faces that may be drawn.
        split: `"test"` or `"validation"`.
    """
    rows = [row for row in lettering_fonts.families() if row.split == "held-out"]
    families = {row.family for i, row in enumerate(rows) if (i % 3 == 2) == (split == "validation")}
    trained = {face.family for face in faces if face.split == "training"}
    listed = photographs.HELD_OUT if split == "test" else photographs.VALIDATION
    return Pool(
        split,
        tuple(f for f in faces if f.split == "training"),
        tuple(f for f in faces if f.family in families),
        {
            (f.family, f.name.removeprefix(f.family)): f
            for f in faces if f.split == "held-out" and f.family in trained
        },
        tuple(name for name in photograph_names("held-out") if name in listed),
    )  # fmt: skip


def draw_cases(
    materials: Materials,
    source: Pool,
    *,
    counts: Mapping[str, int] | None = None,
    excluded: frozenset[str] = frozenset(),
) -> list[Case]:
    """Return the cases of one list.

    Args:
        materials: Fonts, photographs and line.
        source: Which of them the list uses.
        counts: Cases of each set; by default those of `SETS`.
        excluded: Strings in lower case that are not drawn.
    """
    cases = []
    for number, (name, rule) in enumerate(SETS.items()):
        rng = np.random.default_rng([SEED, number, source.split == "test"])
        words: set[str] = set(excluded)
        size = rule.test if source.split == "test" else rule.validation
        for index in range(size if counts is None else counts.get(name, 0)):
            lengths = sorted(
                rule.lengths, key=lambda n: abs(n - 5)
            )  # the quick form takes the first
            length = lengths[index % len(lengths)]
            text = _text(rng, length, rule, source.split, words)
            case = _case(rng, name, index, rule, source, text)
            cases.append(_colored(materials, case))
    return cases


def _case(
    rng: np.random.Generator, name: str, index: int, rule: Set, source: Pool, text: str
) -> Case:
    """Return a case without its color."""
    other, face = "", None
    if rule.fonts == "variants":
        suffixes = ("-Bold", "-Italic")
        suffix = suffixes[index % 2]
        families = sorted({family for family, s in source.variants if s == suffix})
        bases = [f for f in source.seen if f.name in families]
        if bases:
            face, other = bases[rng.integers(len(bases))], suffix
    if rule.font is not None:
        face = next(f for f in source.seen if f.name == rule.font)
    if face is None:
        choices = source.unseen if rule.fonts == "unseen" else source.seen
        if rule.fonts == "regular":
            choices = tuple(f for f in source.seen if f.name == f.family)
        face = _face(rng, choices)
    if rule.fonts == "regular":
        partners = [f for f in source.seen if f.name == f.family and f.family != face.family]
        other = partners[rng.integers(len(partners))].name if partners else face.name
    if rule.other == "wording":
        other = str(index % 30)
    photo = source.photos[rng.integers(len(source.photos))]
    seed = int(rng.integers(2**31))
    return Case(source.split, name, index, text, face.name, "", other, photo, seed)


def _colored(materials: Materials, case: Case) -> Case:
    """Return the case with the color of its picture, and with a second one if its set needs that."""
    drawn = crop(case, materials)
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    values["color"] = drawn.color
    if SETS[case.set].other == "color":
        values["other"] = other_color(drawn)
    return Case(**values)


def _face(rng: np.random.Generator, faces: Sequence[Face]) -> Face:
    """Return a random face: each family equally often."""
    families = sorted({face.family for face in faces})
    family = families[rng.integers(len(families))]
    members = [face for face in faces if face.family == family]
    return members[rng.integers(len(members))]


def _text(rng: np.random.Generator, length: int, rule: Set, split: str, words: set[str]) -> str:
    """Return a new string of a length and add it to `words`."""
    for _ in range(10_000):
        choices = lettering_words.words(length, held_out=rule.unseen_words)
        if rng.random() < 0.8 and choices:
            text = choices[rng.integers(len(choices))]
        else:
            letters = _LETTERS if rule.plain else lettering_words.CHARACTERS
            text = "".join(letters[i] for i in rng.integers(len(letters), size=length))
        if lettering_words.is_held_out(text) != rule.unseen_words:
            continue
        if length > 1 and (text in words or _is_test(text) != (split == "test")):
            continue
        words.add(text)
        return text if rule.plain else lettering_words.draw_case(rng, text)
    raise RuntimeError(f"no new string of length {length} for {rule}: draw fewer cases.")


def _is_test(text: str) -> bool:
    return hashlib.sha256(text.lower().encode()).digest()[1] % 2 == 1


def checked_words() -> frozenset[str]:
    """Return the strings in lower case that the checks of the training write, which were looked at."""
    rngs = [np.random.default_rng([_CHECK_SEED, i]) for i in range(lettering.CPU.checks)]
    return frozenset(lettering_words.draw_measured(rng, 2 + i % 7) for i, rng in enumerate(rngs))


def table(cases: Sequence[Case]) -> str:
    """Return the list as text: the digest of the rest, a head, and a line for each case."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow([field.name for field in fields(Case)])
    writer.writerows(astuple(case) for case in cases)
    rest = buffer.getvalue()
    return f"{hashlib.sha256(rest.encode()).hexdigest()}\n{rest}"


def load(split: str, path: Path = PATH) -> list[Case]:
    """Return the cases of a list of the committed file.

    Raises:
        ValueError: The file does not have the digest of its first line.
    """
    stored, _, rest = path.read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(rest.encode()).hexdigest() != stored:
        raise ValueError(
            f"{path.name} was changed: its rows do not have the SHA-256 of its first line. Restore it from git."
        )
    rows = csv.DictReader(io.StringIO(rest), delimiter="\t")
    cases = [Case(**{**row, "index": int(row["index"]), "seed": int(row["seed"])}) for row in rows]
    return [case for case in cases if case.split == split]


def digest(cases: Sequence[Case]) -> str:
    """Return a short hash of cases."""
    return hashlib.sha256(repr([astuple(case) for case in cases]).encode()).hexdigest()[:16]


def main() -> None:
    """Draw both lists and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fonts", type=Path, default=Path("runs/fonts"))
    parser.add_argument("--photos", type=Path, default=Path("runs/photographs"))
    plan = parser.parse_args()
    lettering_fonts.fetch(plan.fonts)
    photographs.fetch(plan.photos)
    faces = lettering_fonts.load(plan.fonts)
    excluded = checked_words()
    cases = []
    for split in ("test", "validation"):
        source = pool(faces, split)
        materials = Materials.load(faces, source.photos, plan.photos)
        cases += draw_cases(materials, source, excluded=excluded)
    files.write_text(PATH, table(cases))
    print(f"{len(cases)} cases, digest {PATH.read_text().partition(chr(10))[0][:16]}")


if __name__ == "__main__":
    main()
