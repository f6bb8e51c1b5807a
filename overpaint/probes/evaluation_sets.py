"""Evaluation sets: prompts that judge one edit, in the forms that the field keeps them in, and two small ones of ours.

Every form comes down to cases: a prompt, its part in the judgement, and two texts between which its picture is judged.

target   names what was edited
general  the same in other words, or something that follows from it
other    should be drawn as before

A case of the first two is won when its picture lies nearer to `new` than to `old`, one of the last when it stays
nearer to `old`.

| form | file | holds |
|---|---|---|
| `ablation` | `.txt`, a prompt a line | Concept Ablation's evaluation prompts; the texts are "A photo depicts ..." |
| `csv` | `.csv` with `prompt`, also `case_number`, `evaluation_seed`, `artist`, `class` | ESD's and UCE's prompts |
| `timed` | `.csv` with `old,new,positive1,gt1,...,negative1,gn1,...` | TIMED: an edit a row |
| `road` | `.csv` with `prompt,old,new,positive1,positive_old1,positive_new1,...,negative1,negative_new1,...` | RoAD |
| `table` | `.toml` as `overpaint/probes/evaluation.toml` | our own |

Source: Kumari et al., 2023 (Concept Ablation), https://arxiv.org/abs/2303.13516; Gandikota et al., 2023 (ESD),
https://arxiv.org/abs/2303.07345; Orgad et al., 2023 (TIME, with TIMED), https://arxiv.org/abs/2303.08084; Arad et al.,
2023 (ReFACT, with RoAD), https://arxiv.org/abs/2306.00738. The columns of RoAD are read off its public evaluation
script.
"""

import csv
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from overpaint.probes.csv_files import csv_rows

__all__ = ["FORMS", "ROLES", "Case", "EvaluationSet", "load_set", "load_shipped_set"]

FORMS = ("ablation", "csv", "timed", "road", "table")
ROLES = ("target", "general", "other")
_OWN = Path(__file__).parent / "evaluation.toml"
_CONCEPT_COLUMNS = ("concept", "subject", "artist", "class", "object", "profession")
_NAMES = {  # columns of the forms with an edit a row: prompt, text before, text after
    "timed": (("old", "old", "new"), ("positive{}", "positive{}", "gt{}"), ("negative{}", "negative{}", "gn{}")),
    "road": (
        ("prompt", "old", "new"),
        ("positive{}", "positive_old{}", "positive_new{}"),
        ("negative{}", "negative{}", "negative_new{}"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One prompt of an evaluation set.

    Attributes:
        prompt: What to draw.
        role: One of `ROLES`.
        old: What the unedited model's picture shows, as a text for a CLIP.
        new: What stands in its place after the edit; for `other` what should not appear. `""` if nothing is said.
        concept: What the prompt names, where the set says so.
        seed: Start noise, where the set says so.
    """

    prompt: str
    role: str
    old: str
    new: str = ""
    concept: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """The cases that judge one edit.

    Attributes:
        name: Of the file or table, and the row where a file holds many edits.
        form: One of `FORMS`.
        erase: What is edited.
        replace: To what; `""` if nothing is said.
        cases: In the order of the file.
    """

    name: str
    form: str
    erase: str
    replace: str
    cases: tuple[Case, ...]

    def thinned(self, size: int) -> "EvaluationSet":
        """Return the set with at most `size` cases of each role, evenly spaced.

        Raises:
            ValueError: `size` is not positive.
        """
        if size < 1:
            raise ValueError(
                f"`size` must be at least 1, got {size}: say how many cases of each role to keep."
            )
        kept: list[Case] = []
        for role in ROLES:
            part = [case for case in self.cases if case.role == role]
            count = min(size, len(part))
            kept += [part[i * len(part) // count] for i in range(count)]
        return EvaluationSet(self.name, self.form, self.erase, self.replace, tuple(kept))


def load_shipped_set(kind: str, erase: str, replace: str = "", *, vocabulary: str = "icons") -> EvaluationSet:
    """Return the set that ships with the package, about one concept.

    Args:
        kind: `"style"` or `"object"`.
        erase: The concept as in a prompt: `"openmoji style"`, `"van gogh"`, `"cat"`.
        replace: What should stand in its place.
        vocabulary: `"icons"` for the model that ships with the package, `"natural"` for others.

    Raises:
        ValueError: There is no such set.
    """
    tables = tomllib.loads(_OWN.read_text(encoding="utf-8"))
    if vocabulary not in tables or kind not in tables[vocabulary]:
        known = ", ".join(f"{v} {k}" for v, kinds in tables.items() for k in kinds)
        raise ValueError(
            f"no evaluation set of ours for {vocabulary!r} {kind!r}: choose one of {known}."
        )
    return _from_table(f"{vocabulary} {kind}", tables[vocabulary][kind], erase, replace)


def load_set(
    path: str | Path,
    *,
    erase: str,
    replace: str = "",
    kind: str = "object",
    form: str | None = None,
) -> EvaluationSet:
    """Return the cases of a file that judge the edit of `erase`.

    Args:
        path: The file.
        erase: The concept edited; of a file with an edit a row, which row: as its `old`, or as a concept in it.
        replace: What stands in its place, where the file does not say.
        kind: Of the concept: the texts of the form `ablation` end in "style" for a `"style"`.
        form: One of `FORMS`; by default told from the file's ending and columns.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not of the form, or says nothing of `erase`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no evaluation set at {str(path)!r}: name a .txt, .csv or .toml file."
        )
    if form is not None and form not in FORMS:
        raise ValueError(
            f"unknown form of evaluation set {form!r}: choose one of {', '.join(FORMS)}."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: save it as UTF-8.") from error
    found = _read(path, text, form or _form(path, text), erase.strip(), replace.strip(), kind)
    if not found.cases:
        raise ValueError(f"{str(path)!r} holds no prompts: give it at least one.")
    return found


def _form(path: Path, text: str) -> str:
    """Tell the form of a file by its ending and its columns."""
    ending = path.suffix.lower()
    if ending == ".txt":
        return "ablation"
    if ending == ".toml":
        return "table"
    head = [name.strip().lower() for name in next(csv.reader(text.splitlines()[:1]), [])]
    if ending == ".csv" and {"prompt", "old", "new"} <= set(head):
        return "road"
    if ending == ".csv" and {"old", "new"} <= set(head):
        return "timed"
    if ending == ".csv" and "prompt" in head:
        return "csv"
    raise ValueError(
        f"cannot tell the form of {path.name!r}: give a .txt of prompts, a .csv with the column 'prompt' or the "
        "columns 'old' and 'new', or a .toml table; or say it with `form`."
    )


def _read(path: Path, text: str, form: str, erase: str, replace: str, kind: str) -> EvaluationSet:
    if form == "ablation":
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        return EvaluationSet(
            path.name, form, erase, replace, tuple(_depicted(prompts, erase, replace, kind))
        )
    if form == "table":
        try:
            return _from_table(path.name, tomllib.loads(text), erase, replace)
        except (
            tomllib.TOMLDecodeError,
            LookupError,
            TypeError,
            AttributeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{str(path)!r} is no table of cases ({error}): write `target`, `general` and `other` with lists of "
                "words for their slots, as `overpaint/probes/evaluation.toml` does."
            ) from error
    rows = list(csv_rows(path, text))
    if form == "csv":
        return EvaluationSet(
            path.name, form, erase, replace, tuple(_listed(path, rows, erase, replace))
        )
    return _edited(path, rows, form, erase)


def _depicted(prompts: Iterable[str], erase: str, replace: str, kind: str) -> Iterable[Case]:
    """Concept Ablation: who names the concept is a target, who does not a neighbour; judged by what is depicted."""
    end = " style" if kind == "style" else ""
    old, new = (f"A photo depicts {name}{end}" if name else "" for name in (erase, replace))
    for prompt in prompts:
        if _names(prompt, erase):
            yield Case(prompt, "target", old, new, erase)
        else:
            yield Case(prompt, "other", prompt, "")


def _listed(
    path: Path, rows: Sequence[tuple[int, Mapping[str, str]]], erase: str, replace: str
) -> Iterable[Case]:
    """ESD and UCE: a row a picture; a column may say what it is of."""
    for line, row in rows:
        prompt = row.get("prompt", "")
        if not prompt:
            raise ValueError(
                f"{str(path)!r}, line {line}: the prompt is empty; write one, or take the line out."
            )
        named = next((row[c] for c in _CONCEPT_COLUMNS if row.get(c)), "")
        seed = row.get("evaluation_seed") or row.get("sd_seed") or ""
        if seed and not re.fullmatch(r"[0-9]+(\.0)?", seed):
            raise ValueError(
                f"{str(path)!r}, line {line}: `evaluation_seed` {seed!r} is no whole number from 0 on; give one, "
                "or none."
            )
        target = _names(named or prompt, erase)
        swapped = _swapped(prompt, erase if target else named, replace)
        number = int(seed.removesuffix(".0")) if seed else None
        yield Case(
            prompt,
            "target" if target else "other",
            prompt,
            swapped,
            named or (erase if target else ""),
            number,
        )


def _edited(
    path: Path, rows: Sequence[tuple[int, Mapping[str, str]]], form: str, erase: str
) -> EvaluationSet:
    """TIMED and RoAD: a row an edit; the row of `erase` is taken."""
    target, general, other = _NAMES[form]
    chosen = [row for _, row in rows if _same(row.get("old", ""), erase)]
    chosen = chosen or [row for _, row in rows if _names(row.get("old", ""), erase)]
    if len(chosen) != 1:
        known = ", ".join(repr(row.get("old", "")) for _, row in rows[:12])
        raise ValueError(
            f"{str(path)!r} holds {len(chosen)} edits of {erase!r}, not one: name it as in the column 'old', which "
            f"holds {known or 'nothing'}."
        )
    row = chosen[0]
    cases = [
        Case(row.get(target[0], ""), "target", row[target[1]], row.get(target[2], ""), row["old"])
    ]
    for role, columns in (("general", general), ("other", other)):
        for number in range(1, len(row)):
            prompt, old, new = (row.get(c.format(number), "") for c in columns)
            if prompt:
                cases.append(Case(prompt, role, old or prompt, new))
    return EvaluationSet(
        f"{path.name}: {row['old']}", form, row["old"], row.get("new", ""), tuple(cases)
    )


def _from_table(name: str, table: Mapping[str, Any], erase: str, replace: str) -> EvaluationSet:
    """Fill the templates of each role, every choice of the slots; for `other` the concept is each of `others`."""
    cases: list[Case] = []
    for role in ROLES:
        slots = {key: values for key, values in table.get("slots", {}).items()}
        concepts = (
            [erase] if role != "other" else [o for o in table["others"] if not _related(o, erase)]
        )
        for template, concept in product(table.get(role, ()), concepts):
            used = {k: v for k, v in slots.items() if f"{{{k}}}" in template}
            for words in product(*used.values()):
                text = _articles(
                    template.format(concept=concept, **dict(zip(used, words, strict=True)))
                )
                cases.append(Case(text, role, text, _swapped(text, concept, replace), concept))
    return EvaluationSet(name, "table", erase, replace, tuple(cases))


def _swapped(prompt: str, concept: str, replace: str) -> str:
    """Return the prompt with `replace` for `concept` and the article that goes with it; `""` if that is no news."""
    if not replace or not concept or _same(concept, replace):
        return ""

    def put(found: re.Match[str]) -> str:
        if not found["article"]:
            return replace
        return _articles(f"{found['article'][0]}(n) {replace}")

    pattern = rf"(?:\b(?P<article>an?)\s+)?{_words(concept)}"
    found, count = re.subn(pattern, put, prompt, flags=re.IGNORECASE)
    return found if count else ""


def _names(text: str, concept: str) -> bool:
    return bool(concept) and re.search(_words(concept), text, flags=re.IGNORECASE) is not None


def _related(first: str, second: str) -> bool:
    """Tell whether either names the other, as `van gogh` and `vincent van gogh` do."""
    return _names(first, second) or _names(second, first)


def _words(concept: str) -> str:
    """Return the pattern of `concept` as whole words."""
    spaced = r"\s+".join(map(re.escape, concept.split()))
    return rf"(?<!\w){spaced}(?!\w)"


def _same(first: str, second: str) -> bool:
    return " ".join(first.lower().split()) == " ".join(second.lower().split())


def _articles(text: str) -> str:
    """Write `an` for `a(n)` before a vowel and `a` elsewhere."""
    return re.sub(r"\ba\(n\)(?= [aeiou])", "an", text, flags=re.I).replace("a(n)", "a")
