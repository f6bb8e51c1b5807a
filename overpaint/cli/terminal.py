"""Output of the command line: progress bars with the time left, tables, JSON; and checks that come before any work."""

import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overpaint import files

__all__ = [
    "check_absent",
    "check_writable",
    "load_model",
    "print_facts",
    "print_json",
    "print_table",
    "progress",
]


def check_absent(*paths: Path, force: bool) -> None:
    """Raise `FileExistsError` if one of `paths` exists, unless `force` is set and it is a file."""
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a folder: name a file with --out.")
        if path.exists() and not force:
            raise FileExistsError(
                f"{str(path)!r} exists already: choose another place with --out, or replace it with --force."
            )


def check_writable(folder: Path, *, make: bool = True) -> None:
    """Make `folder` if `make` is set, and raise `OSError` unless files can be written there.

    Drafts that processes left there when they were killed are removed.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with files.temporary_folder(folder / "overpaint-writable"):
            pass
    except OSError as error:
        raise type(error)(
            f"cannot write into {str(folder)!r} ({error.strerror}): name another folder{' with --out' if make else ''}."
        ) from error
    files.remove_drafts_in(folder)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show progress bars with the time left on stderr; yield the function to call with (done, total, label).

    A label's words before its first comma name the bar. With `quiet` nothing is shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<34.34}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    bars = Progress(*columns, console=Console(stderr=True), disable=quiet)

    def show(done: int, total: int, label: str) -> None:
        key = label.partition(",")[0]
        if not tasks:
            bars.start()  # not before: without a bar it would print an empty line above an error
        if key not in tasks:
            tasks[key] = bars.add_task(label, total=total)
        bars.update(tasks[key], completed=done, total=total, description=label)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()


def print_json(facts: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout; NaN and infinities become null."""
    sys.stdout.write(files.to_json(dict(facts)) + "\n")


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Write one line for each name and value, or one JSON object."""
    if as_json:
        return print_json(facts)
    wide = max(len(name) for name in facts)
    for name, value in facts.items():
        rows = value if isinstance(value, list) else [value]
        texts = [_text(row) for row in rows]
        for i, line in enumerate(line for text in texts for line in _lines(text, wide + 2)):
            sys.stdout.write(f"{name if i == 0 else '':<{wide}}  {line}\n")
    return None


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "not measured" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def _lines(text: str, indent: int) -> list[str]:
    """Return `text` in lines that fit beside `indent` columns of a terminal; in files and pipes it stays one line."""
    if not sys.stdout.isatty():
        return [text]
    width = max(20, shutil.get_terminal_size().columns - indent)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def print_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, whole: Collection[str] = ()
) -> None:
    """Write a table to stdout, as wide as the terminal; columns with a head in `whole` are never cut or wrapped."""
    from rich.console import Console
    from rich.table import Column, Table

    columns = [Column(head, no_wrap=head in whole) for head in heads]
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def load_model(
    model: str, device: str, dtype: str = "float32", clip_skip: int | None = None
) -> Any:
    """Return the model `model` on `device`; diffusers and transformers print no warnings and bars meanwhile."""
    import diffusers
    import transformers

    from overpaint import model as models

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    return models.load(model, device=device, dtype=dtype, clip_skip=clip_skip)
