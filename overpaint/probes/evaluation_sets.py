"""Evaluation sets: the prompts that evaluate one edit, in the file formats of the field, and two small sets of ours.

Every format is read into cases. A case is a prompt, its role, and two texts; a CLIP then chooses the text that the
picture of the prompt is closer to.

target   the prompt names the edited concept
general  the prompt names the concept in other words, or a consequence of the edit
other    the picture should not change

A case of the first two roles succeeds if its picture is closer to `new` than to `old`; a case of the last succeeds if
its picture is closer to `old`.

| form | file | contents |
|---|---|---|
| `ablation` | `.txt`, one prompt a line | Concept Ablation's evaluation prompts; the texts are "A photo depicts ..." |
| `csv` | `.csv` with `prompt`, also `case_number`, `evaluation_seed`, `artist`, `class` | ESD's and UCE's prompts |
| `timed` | `.csv` with `old,new,positive1,gt1,...,negative1,gn1,...` | TIMED: one edit in each row |
| `road` | `.csv` with `prompt,old,new,positive1,positive_old1,positive_new1,...,negative1,negative_new1,...` | RoAD |
| `table` | `.toml` like `overpaint/probes/evaluation.toml` | templates and the words for their slots |

Source: Kumari et al., 2023 (Concept Ablation), https://arxiv.org/abs/2303.13516; Gandikota et al., 2023 (ESD),
https://arxiv.org/abs/2303.07345; Orgad et al., 2023 (TIME, with TIMED), https://arxiv.org/abs/2303.08084; Arad et al.,
2023 (ReFACT, with RoAD), https://arxiv.org/abs/2306.00738. The columns of RoAD are those of its public evaluation
script.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from overpaint.errors import check_one_text, listed
from overpaint.files import user_path
from overpaint.probes.csv_files import csv_columns, csv_rows, parse_seed, parse_toml, read_utf8
from overpaint.probes.probe import KINDS
from overpaint.probes.text import MOST, combinations, fill_articles, fill_slots, word_pattern

__all__ = ["FORMS", "ROLES", "Case", "EvaluationSet", "load_set", "load_shipped_set"]

FORMS = ("ablation", "csv", "timed", "road", "table")
ROLES = ("target", "general", "other")
_SHIPPED = Path(__file__).parent / "evaluation.toml"
_CONCEPT_COLUMNS = ("concept", "subject", "artist", "class", "object", "profession")
_COLUMNS = {  # of the forms with one edit in each row, for each role: prompt, text before, text after
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
        prompt: Prompt to draw.
        role: One of `ROLES`.
        old: Text for a CLIP that describes the unedited model's picture.
        new: Text that describes the picture after the edit; for `other` the text that should not fit. `""` if unknown.
        concept: Concept that the prompt names, if the set states it.
        seed: Seed of the start noise, if the set states it.
    """

    prompt: str
    role: str
    old: str
    new: str = ""
    concept: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """The cases that evaluate one edit.

    Attributes:
        name: Name of the file or table, and of the row if a file holds many edits.
        form: One of `FORMS`.
        erase: The edited concept.
        replace: Its replacement; `""` if there is none.
        cases: In the order of the file.
    """

    name: str
    form: str
    erase: str
    replace: str
    cases: tuple[Case, ...]

    def __repr__(self) -> str:
        parts = [f"{sum(case.role == role for case in self.cases)} {role}" for role in ROLES]
        concept = f"{self.erase!r} → {self.replace!r}" if self.replace else repr(self.erase)
        return f"<EvaluationSet {self.name!r} of {concept}, prompts: {', '.join(parts)}>"

    def thinned(self, size: int) -> "EvaluationSet":
        """Return the set with at most `size` cases of each role, evenly spaced.

        Raises:
            ValueError: `size` is not positive.
        """
        if size < 1:
            raise ValueError(
                f"`size` must be at least 1, got {size}: it is the number of cases of each role."
            )
        cases: list[Case] = []
        for role in ROLES:
            part = [case for case in self.cases if case.role == role]
            count = min(size, len(part))
            cases += [part[i * len(part) // count] for i in range(count)]
        return EvaluationSet(self.name, self.form, self.erase, self.replace, tuple(cases))


def load_shipped_set(
    kind: str, erase: str, replace: str = "", *, vocabulary: str = "icons"
) -> EvaluationSet:
    """Return the evaluation set that ships with the package, for one concept.

    Args:
        kind: `"style"` or `"object"`.
        erase: The concept as in a prompt: `"openmoji style"`, `"van gogh"`, `"cat"`.
        replace: The concept that replaces it.
        vocabulary: `"icons"` for the model that ships with the package, `"natural"` for others.

    Raises:
        ValueError: There is no such set.
    """
    _check_concepts(erase, replace)
    tables = tomllib.loads(_SHIPPED.read_text(encoding="utf-8"))
    if vocabulary not in tables or kind not in list(tables[vocabulary]):
        known = listed(f"{v} {k}" for v, kinds in tables.items() for k in kinds)
        raise ValueError(
            f"no evaluation set ships for {vocabulary!r} {kind!r}: choose one of {known}."
        )
    return _fill_table(f"{vocabulary} {kind}", tables[vocabulary][kind], erase, replace)


def load_set(
    path: str | Path,
    *,
    erase: str,
    replace: str = "",
    kind: str = "object",
    form: str | None = None,
) -> EvaluationSet:
    """Return the cases of a file that evaluate the edit of `erase`.

    Args:
        path: The file.
        erase: The edited concept. In a file with one edit in each row, it selects the row: `old` equals
            or contains it.
        replace: The concept that replaces it, if the file does not state one.
        kind: Kind of the concept: with `"style"` the texts of the form `ablation` end in "style".
        form: One of `FORMS`; by default derived from the file's suffix and columns.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not have the form, or holds no case for `erase`.
    """
    _check_concepts(erase, replace)
    path = user_path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(
            f"no evaluation set at {str(path)!r}: name a .txt, .csv or .toml file."
        )
    if kind not in KINDS:
        raise ValueError(f"unknown kind of concept {kind!r}: choose one of {', '.join(KINDS)}.")
    if form is not None and form not in FORMS:
        raise ValueError(
            f"unknown form of evaluation set {form!r}: choose one of {', '.join(FORMS)}."
        )
    text = read_utf8(path)
    cases = _parse(path, text, form or _form(path, text), erase.strip(), replace.strip(), kind)
    if not cases.cases:
        raise ValueError(f"{str(path)!r} holds no prompts: give it at least one.")
    return cases


def _check_concepts(erase: str, replace: str) -> None:
    for name, text in (("erase", erase), ("replace", replace)):
        check_one_text(text, f"`{name}`", "an evaluation set is of one concept; load one for each")


def _form(path: Path, text: str) -> str:
    """Return the form of a file, by its suffix and its columns."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return "ablation"
    if suffix == ".toml":
        return "table"
    head = csv_columns(path, text)
    if suffix == ".csv" and {"prompt", "old", "new"} <= set(head):
        return "road"
    if suffix == ".csv" and {"old", "new"} <= set(head):
        return "timed"
    if suffix == ".csv" and "prompt" in head:
        return "csv"
    raise ValueError(
        f"unknown form of {path.name!r}: give a .txt of prompts, a .csv with the column 'prompt' or the columns "
        "'old' and 'new', or a .toml table; or pass `form`."
    )


def _parse(path: Path, text: str, form: str, erase: str, replace: str, kind: str) -> EvaluationSet:
    if form == "ablation":
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        cases = tuple(_ablation_cases(prompts, erase, replace, kind))
        return EvaluationSet(path.name, form, erase, replace, cases)
    if form == "table":
        try:
            return _fill_table(path.name, parse_toml(text), erase, replace)
        except (
            LookupError,
            TypeError,
            AttributeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{str(path)!r} is not a table of cases ({error}): write `target`, `general` and `other` with lists "
                "of words for their slots, as `overpaint/probes/evaluation.toml` does."
            ) from error
    rows = list(csv_rows(path, text))
    if form == "csv":
        cases = tuple(_csv_cases(path, rows, erase, replace))
        return EvaluationSet(path.name, form, erase, replace, cases)
    return _select_edit(path, rows, form, erase)


def _ablation_cases(prompts: Iterable[str], erase: str, replace: str, kind: str) -> Iterable[Case]:
    """Yield Concept Ablation's cases: a prompt that contains `erase` is a target, any other is an `other`."""
    end = " style" if kind == "style" else ""
    old, new = (f"A photo depicts {name}{end}" if name else "" for name in (erase, replace))
    for prompt in prompts:
        if _contains(prompt, erase):
            yield Case(prompt, "target", old, new, erase)
        else:
            yield Case(prompt, "other", prompt, "")


def _csv_cases(
    path: Path, rows: Sequence[tuple[int, Mapping[str, str]]], erase: str, replace: str
) -> Iterable[Case]:
    """Yield the cases of ESD and UCE: one picture in each row; a column may give its concept."""
    for line, row in rows:
        prompt = row.get("prompt", "")
        if not prompt:
            raise ValueError(
                f"{str(path)!r}, line {line}: the prompt is empty; write one, or remove the line."
            )
        concept = next((row[c] for c in _CONCEPT_COLUMNS if row.get(c)), "")
        try:
            seed = parse_seed(row.get("evaluation_seed") or row.get("sd_seed") or "")
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, line {line}: {error}") from error
        is_target = _contains(concept or prompt, erase)
        yield Case(
            prompt,
            "target" if is_target else "other",
            prompt,
            _replaced(prompt, erase if is_target else concept, replace),
            concept or (erase if is_target else ""),
            seed,
        )


def _select_edit(
    path: Path, rows: Sequence[tuple[int, Mapping[str, str]]], form: str, erase: str
) -> EvaluationSet:
    """Return the set of the one row of TIMED or RoAD that edits `erase`."""
    target, general, other = _COLUMNS[form]
    matches = [row for _, row in rows if _same(row.get("old", ""), erase)]
    matches = matches or [row for _, row in rows if _contains(row.get("old", ""), erase)]
    if len(matches) != 1:
        known = listed(repr(row.get("old", "")) for _, row in rows)
        raise ValueError(
            f"{str(path)!r} holds {len(matches)} edits of {erase!r}, not one: name it as in the column 'old', which "
            f"holds {known}."
        )
    row = matches[0]
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


def _fill_table(name: str, table: Mapping[str, Any], erase: str, replace: str) -> EvaluationSet:
    """Return the set of a table: each template with every combination of its slots.

    The concept of a template is `erase`; for the role `other` it is each of `others` that is not related to `erase`.
    """
    cases: list[Case] = []
    slots: dict[str, list[str]] = dict(table.get("slots", {}))
    for role in ROLES:
        concepts: list[str] = [erase]
        if role == "other":
            concepts = [o for o in table["others"] if not _is_related(o, erase)]
        for template, concept in product(table.get(role, ()), concepts):
            used = {k: v for k, v in slots.items() if f"{{{k}}}" in template}
            if len(cases) > MOST:
                raise ValueError(f"the templates give more than {MOST} prompts: remove some")
            for words in combinations(used):
                text = fill_articles(fill_slots(template, {**words, "concept": concept}))
                cases.append(Case(text, role, text, _replaced(text, concept, replace), concept))
    return EvaluationSet(name, "table", erase, replace, tuple(cases))


def _replaced(prompt: str, concept: str, replace: str) -> str:
    """Return the prompt with `replace` for `concept` and the right article; `""` if that changes nothing."""
    if not replace or not concept or _same(concept, replace):
        return ""

    def substitute(match: re.Match[str]) -> str:
        if not match["article"]:
            return replace
        return fill_articles(f"{match['article'][0]}(n) {replace}")

    pattern = rf"(?:\b(?P<article>an?)\s+)?{word_pattern(concept)}"
    text, count = re.subn(pattern, substitute, prompt, flags=re.IGNORECASE)
    return text if count else ""


def _contains(text: str, concept: str) -> bool:
    return bool(concept) and re.search(word_pattern(concept), text, re.IGNORECASE) is not None


def _is_related(first: str, second: str) -> bool:
    """Return whether one concept contains the other, as `vincent van gogh` contains `van gogh`."""
    return _contains(first, second) or _contains(second, first)


def _same(first: str, second: str) -> bool:
    return " ".join(first.lower().split()) == " ".join(second.lower().split())
