"""Read the concepts of an edit and their replacements from a file."""

import csv
import re
from pathlib import Path

from overpaint.files import user_path

__all__ = ["load_pairs"]

_MAX_BYTES = 4 * 1024 * 1024
_HEADER = ("erase", "replace")
_SEPARATORS = ("→", "->", "\t")


def load_pairs(path: str | Path) -> dict[str, str]:
    """Return the concepts in `path`, each with its replacement, in the order of the file.

    A `.csv` file has one or two columns, with or without the header `erase,replace`. Any other file has one concept
    in each line, alone or with its replacement after `→`, `->` or a tab. A concept without a replacement is erased to
    nothing: its replacement is `""`. Empty lines, and lines that begin with `#`, are skipped.

    Args:
        path: The file, in UTF-8, at most 4 MiB.

    Raises:
        ValueError: The file has another form, names no concept, or gives one concept two replacements.
        OSError: The file cannot be read.
    """
    place = user_path(path, "path")
    with place.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{str(path)!r} is larger than 4 MiB: list the concepts in smaller files.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: save it as UTF-8.") from error
    if any(character < " " and not character.isspace() for character in text):
        raise ValueError(
            f"{str(path)!r} holds control characters: name a text file with one concept in each line."
        )
    read = _csv_rows if place.suffix.lower() == ".csv" else _text_rows
    pairs: dict[str, str] = {}
    for number, erase, replace in read(text, place):
        if not erase:
            raise ValueError(
                f"{str(path)!r}, line {number}: no concept to erase: write it first, then its replacement."
            )
        if pairs.setdefault(erase, replace) != replace:
            raise ValueError(
                f"{str(path)!r}, line {number}: {erase!r} has two replacements, {pairs[erase]!r} and {replace!r}: keep "
                "one of them."
            )
    if not pairs:
        raise ValueError(
            f"{str(path)!r} names no concept: write one in each line, for example 'van gogh style'."
        )
    return pairs


def _csv_rows(text: str, path: Path) -> list[tuple[int, str, str]]:
    rows: list[tuple[int, str, str]] = []
    reader = csv.reader(text.splitlines(), strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells) or cells[0].startswith("#"):
                continue
            if not rows and tuple(cell.lower() for cell in cells) in (_HEADER, _HEADER[:1]):
                continue
            if len(cells) == 1 and (separator := re.search(r"[;\t|]", cells[0])):
                raise ValueError(
                    f"{str(path)!r}, line {reader.line_num}: the columns seem to be separated by {separator[0]!r}: "
                    "save the file with commas."
                )
            if len(cells) > 2:
                raise ValueError(
                    f"{str(path)!r}, line {reader.line_num}: {len(cells)} columns: give one or two, the concept "
                    "and its replacement."
                )
            rows.append((reader.line_num, cells[0], cells[1] if len(cells) == 2 else ""))
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r}, line {reader.line_num}: {error}: put texts with commas or quotes in double quotes."
        ) from error
    return rows


def _text_rows(text: str, path: Path) -> list[tuple[int, str, str]]:
    del path
    rows: list[tuple[int, str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        separator = next((mark for mark in _SEPARATORS if mark in line), "\t")
        erase, _, replace = line.partition(separator)
        rows.append((number, erase.strip(), replace.strip()))
    return rows
