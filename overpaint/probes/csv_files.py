"""Probes from files of one's own: the field's CSV form, and tables like the package's.

The CSV form is that of the erasure benchmarks: `case_number,prompt,evaluation_seed`, a row a picture. It does not say
which words carry the attribute, so either a column `concept` (or `subject`) does, or the caller.
"""

import csv
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from overpaint.probes.probe import Probe, fill

__all__ = ["csv_rows", "load_file"]


def load_file(path: str | Path, *, kind: str, concept: str | None = None) -> tuple[Probe, ...]:
    """Return the probes in a `.csv` or `.toml` file, in its order.

    Args:
        path: A CSV file with the column `prompt` and, each if known, `case_number`, `evaluation_seed`, `concept` or
            `subject`, and `label`; others are passed over. Or a table as `overpaint/probes/style.toml`.
        kind: The attribute, which chooses how the judge looks at the pictures.
        concept: The words that carry it, where no column says so; they must stand in each prompt once.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file or a line of it, named by its number, is not of the form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no probes at {str(path)!r}: name a .csv or .toml file.")
    readers = {".csv": _read_csv, ".toml": _read_toml}
    if path.suffix.lower() not in readers:
        raise ValueError(f"cannot read probes from {path.name!r}: name a .csv or .toml file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: save it as UTF-8.") from error
    found = readers[path.suffix.lower()](path, text, kind, concept)
    if not found:
        raise ValueError(f"{str(path)!r} holds no prompts: give it at least one.")
    return found


def _read_toml(path: Path, text: str, kind: str, concept: str | None) -> tuple[Probe, ...]:
    if concept is not None:
        raise ValueError("`concept` is for CSV files: a table says it in each entry. Leave it out.")
    try:
        tables = tomllib.loads(text)
        return tuple(p for name, table in tables.items() for p in fill(table, kind, name))
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is no table of probes ({error}): write `source`, `licence` and `prompts` with `template` "
            "and `concept` as `overpaint/probes/style.toml` does."
        ) from error


def _read_csv(path: Path, text: str, kind: str, concept: str | None) -> tuple[Probe, ...]:
    found: dict[str, Probe] = {}
    for line, row in csv_rows(path, text, need="prompt"):
        try:
            probe = _probe(path, row, kind, concept, default=str(len(found)))
            if probe.id in found:
                raise ValueError(
                    f"case {row.get('case_number')!r} is there already: number it anew."
                )
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, line {line}: {error}") from error
        found[probe.id] = probe
    return tuple(found.values())


def csv_rows(path: Path, text: str, *, need: str = "") -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each record's last line, and its fields by column, both trimmed; empty lines are passed over.

    Args:
        path: Of the file, for the errors.
        text: What it holds.
        need: A column that must be there.

    Raises:
        ValueError: A line, named by its number, is not of the form.
    """
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        head = [name.strip().lower() for name in next(reader, [])]
        if need and need not in head:
            raise ValueError(
                f"{str(path)!r}, line 1: no column {need!r} among {', '.join(head) or 'none'}; begin the file with "
                "case_number,prompt,evaluation_seed."
            )
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(head):
                raise ValueError(
                    f"{str(path)!r}, line {reader.line_num}: {len(fields)} fields under {len(head)} columns; put a "
                    "text that holds commas in quotes."
                )
            yield reader.line_num, dict(zip(head, (f.strip() for f in fields), strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r}, line {reader.line_num}: {error}; close every quote."
        ) from error


def _probe(
    path: Path, row: Mapping[str, str], kind: str, concept: str | None, *, default: str
) -> Probe:
    words = row.get("concept") or row.get("subject") or concept
    if not words:
        raise ValueError(
            "nothing says which words carry the attribute: add a column `concept`, or pass `concept=`."
        )
    prompt = row["prompt"]
    if not prompt:
        raise ValueError("the prompt is empty: write one, or take the line out.")
    pattern = r"\s+".join(map(re.escape, words.split()))
    times = len(re.findall(rf"(?<!\w){pattern}(?!\w)", prompt, flags=re.IGNORECASE))
    if times != 1:
        raise ValueError(
            f"concept {words!r} stands {times} times as whole words in {prompt!r}, not once: reword one of them."
        )
    return Probe(
        f"{path.stem}-{kind}-{row.get('case_number') or default}",
        kind,
        prompt,
        words,
        label=row.get("label", ""),
        source=path.name,
        seed=_seed(row.get("evaluation_seed", "")),
    )


def _seed(text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]+(\.0)?", text):
        raise ValueError(
            f"`evaluation_seed` {text!r} is no whole number from 0 on: give one, or none."
        )
    return int(text.removesuffix(".0"))
