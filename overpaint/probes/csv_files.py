"""Probes from a user's files: CSV files as erasure benchmarks use them, and TOML tables like the package's.

The CSV files of the erasure benchmarks have the columns `case_number,prompt,evaluation_seed` and one row for each
picture. They do not contain the words that carry the attribute, so a column `concept` (or `subject`) or the
argument `concept` must give them.
"""

import csv
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from overpaint.errors import check_one_text, check_seed, listed
from overpaint.files import user_path
from overpaint.probes.probe import Probe, fill_table
from overpaint.probes.text import word_pattern

__all__ = ["csv_columns", "csv_rows", "load_file", "parse_seed", "parse_toml", "read_utf8"]

_LONG_KEY = re.compile(r"""(?:\.[ \t]*(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*){16}""")


def load_file(path: str | Path, *, kind: str, concept: str | None = None) -> tuple[Probe, ...]:
    """Return the probes in a `.csv` or `.toml` file, in the order of the file.

    Args:
        path: A CSV file with the column `prompt` and optionally `case_number`, `evaluation_seed`, `concept` or
            `subject`, and `label`; other columns are ignored. Or a table like `overpaint/probes/style.toml`.
        kind: The attribute; it selects how pictures are scored.
        concept: The words that carry the attribute, for rows without a concept. They must occur once in each prompt.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file or a line does not have the expected form; the message gives the line number.
    """
    if concept is not None:
        check_one_text(concept, "`concept`", "write several in a column `concept` of the file")
    path = user_path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"no probes at {str(path)!r}: name a .csv or .toml file.")
    readers = {".csv": _parse_csv, ".toml": _parse_toml}
    if path.suffix.lower() not in readers:
        raise ValueError(f"cannot read probes from {path.name!r}: name a .csv or .toml file.")
    probes = readers[path.suffix.lower()](path, read_utf8(path), kind, concept)
    if not probes:
        raise ValueError(f"{str(path)!r} holds no prompts: give it at least one.")
    return probes


def read_utf8(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: The file is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: save it as UTF-8.") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text.

    Raises:
        ValueError: The text is not TOML, or nested too deeply. `tomllib` takes memory that grows with the square of the
            parts of a dotted key: gigabytes for a key of 40 kilobytes.
    """
    if _LONG_KEY.search(text):
        raise ValueError("a key has more than 16 parts")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("its lists and tables are nested too deeply") from error


def csv_columns(path: Path, text: str) -> list[str]:
    """Return the names of the columns of a CSV file, in lower case, without white space around them.

    Raises:
        ValueError: The line is malformed.
    """
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        return [name.strip().lower() for name in next(reader, list[str]())]
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r}, line {reader.line_num}: {error}; close every quote."
        ) from error


def csv_rows(path: Path, text: str, *, need: str = "") -> Iterator[tuple[int, dict[str, str]]]:
    """Yield for each record the number of its last line and its fields by column.

    Column names and fields are stripped of white space, column names are in lower case, empty lines are skipped.

    Args:
        path: The file, for error messages.
        text: Its contents.
        need: A column that must be there.

    Raises:
        ValueError: A column is missing, or a line is malformed; the message gives the line number.
    """
    head = csv_columns(path, text)
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        next(reader, None)
        if need and need not in head:
            raise ValueError(
                f"{str(path)!r}, line 1: no column {need!r} among {listed(head)}; begin the file with "
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


def parse_seed(text: str) -> int | None:
    """Return the seed in a field of a CSV file, `None` if the field is empty.

    Raises:
        ValueError: The field is not a non-negative integer, or too large for a random generator.
    """
    if not text:
        return None
    number = re.fullmatch(r"([0-9]{1,19})(\.0)?", text, re.ASCII)
    return check_seed(int(number[1]) if number else text, "evaluation_seed")


def _parse_toml(path: Path, text: str, kind: str, concept: str | None) -> tuple[Probe, ...]:
    if concept is not None:
        raise ValueError("`concept` is for CSV files: a table states it in each entry. Omit it.")
    try:
        tables = parse_toml(text)
        return tuple(p for name, table in tables.items() for p in fill_table(table, kind, name))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is not a table of probes ({error}): write `source`, `licence` and `prompts` with "
            "`template` and `concept` as `overpaint/probes/style.toml` does."
        ) from error


def _parse_csv(path: Path, text: str, kind: str, concept: str | None) -> tuple[Probe, ...]:
    probes: dict[str, Probe] = {}
    for line, row in csv_rows(path, text, need="prompt"):
        try:
            probe = _probe(path, row, kind, concept, default=str(len(probes)))
            if probe.id in probes:
                raise ValueError(
                    f"`case_number` {row.get('case_number')!r} occurs twice: number the rows anew."
                )
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, line {line}: {error}") from error
        probes[probe.id] = probe
    return tuple(probes.values())


def _probe(
    path: Path, row: Mapping[str, str], kind: str, concept: str | None, *, default: str
) -> Probe:
    words = row.get("concept") or row.get("subject") or concept
    if not words:
        raise ValueError(
            "the words that carry the attribute are not given: add a column `concept`, or pass `concept=`."
        )
    prompt = row["prompt"]
    if not prompt:
        raise ValueError("the prompt is empty: write one, or remove the line.")
    count = len(re.findall(word_pattern(words), prompt, flags=re.IGNORECASE))
    if count != 1:
        raise ValueError(
            f"concept {words!r} occurs {count} times as whole words in {prompt!r}, not once: reword one of them."
        )
    return Probe(
        f"{path.stem}-{kind}-{row.get('case_number') or default}",
        kind,
        prompt,
        words,
        label=row.get("label", ""),
        source=path.name,
        seed=parse_seed(row.get("evaluation_seed", "")),
    )
