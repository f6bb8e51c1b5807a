"""What the verbs of the command line share: options, bars with the time left, tables, JSON, checks."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = [
    "Device",
    "Json",
    "Model",
    "Seed",
    "Steps",
    "check_writable",
    "load_model",
    "print_facts",
    "print_json",
    "progress",
    "table",
]

Model = Annotated[str, typer.Argument(help="A zoo name (icons), a folder, or a hub id.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Seed = Annotated[int, typer.Option(help="Everything drawn at random follows from it.")]
Steps = Annotated[int, typer.Option(help="Denoising steps of a picture.")]


def check_writable(folder: Path, *, make: bool = True) -> None:
    """Find out before any work whether results can be written."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".overpaint-writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(
            f"cannot write into {str(folder)!r} ({error.strerror}): name another folder{' with --out' if make else ''}."
        ) from error


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar with the time left on stderr; the value is told (done, in all, what)."""
    columns = (
        TextColumn("{task.description:<34.34}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:

        def tell(done: int, total: int, what: str) -> None:
            key = what.partition(",")[0]
            if key not in tasks:
                tasks[key] = bars.add_task(what, total=total)
            bars.update(tasks[key], completed=done, total=total, description=what)

        yield tell


def print_json(facts: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout; NaN becomes null."""
    clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in facts.items()}
    sys.stdout.write(json.dumps(clean, default=str) + "\n")


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Write names and values, a line each, or one JSON object."""
    if as_json:
        return print_json(facts)
    wide = max(len(name) for name in facts)
    for name, value in facts.items():
        rows = value if isinstance(value, list) else [value]
        for i, row in enumerate(rows):
            text = f"{row:.3f}" if isinstance(row, float) else str(row)
            sys.stdout.write(f"{name if i == 0 else '':<{wide}}  {text}\n")
    return None


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout."""
    drawn = Table(*heads, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def load_model(model: str, device: str) -> Any:
    """Return a model, loaded without the libraries' own chatter."""
    import diffusers
    import transformers

    from overpaint import model as models

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        return models.load(model, device=device)
    except RuntimeError as error:  # torch names an unknown or absent device so
        raise ValueError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
