"""Options that several verbs share, ranges of numbers, and verbs whose options are the fields of a frozen dataclass.

Ranges are checked while the command line is read, so that a wrong number is refused before any model is loaded.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from overpaint.errors import check_seed

__all__ = [
    "ClipSkip",
    "Device",
    "Dtype",
    "Force",
    "Json",
    "Model",
    "Seed",
    "Steps",
    "box_text",
    "change_file",
    "not_empty",
    "read_numbers",
    "seed_in_range",
    "as_path",
    "with_options",
    "within",
]


def within(low: float, high: float) -> Callable[[Any], Any]:
    """Return a callback for an option that refuses numbers, or lists of them, outside `low` to `high`, and NaN."""

    def check(value: Any) -> Any:
        for number in value if isinstance(value, list | tuple) else (value,):
            if number is not None and not low <= number <= high:
                raise typer.BadParameter(f"{number} is out of range: give {low} to {high}.")
        return value

    return check


def read_numbers(text: str, count: int, form: str) -> tuple[float, ...]:
    """Return numbers that are separated by commas.

    Raises:
        typer.BadParameter: There are more or less than `count`, or one is no number.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise typer.BadParameter(f"{text!r} is not {form}: give {count} numbers, without spaces.")
    return values


def box_text(text: str) -> str:
    """Return the text of a box; the parser of an option.

    Raises:
        typer.BadParameter: It is not x,y,width,height.
    """
    read_numbers(text, 4, "x,y,width,height")
    return text


def seed_in_range(value: int) -> int:
    """Return a seed; a callback for an option.

    Raises:
        typer.BadParameter: It is out of range.
    """
    try:
        return check_seed(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def as_path(text: str | Path) -> Path:
    """Return the path of a file or folder, or a default as it is; the parser of every option with a path.

    Raises:
        typer.BadParameter: The text is empty, which would be the current folder.
    """
    return Path(not_empty(text))


def not_empty(text: Any) -> Any:
    """Return the text, or texts, that name a file, a folder or a model, or `None`; a callback for an option.

    Raises:
        typer.BadParameter: The text is empty.
    """
    for one in text if isinstance(text, list | tuple) else (text,):
        if isinstance(one, str) and not one.strip():
            raise typer.BadParameter(
                "it is empty: name a file or folder; '.' is the current folder."
            )
    return text


def change_file(path: Path) -> Path:
    """Return the path of a change file to write; a callback for an option.

    Raises:
        typer.BadParameter: The name does not end in `.safetensors`.
    """
    if path.suffix != ".safetensors":
        raise typer.BadParameter(
            f"a change is saved as safetensors, not as {path.name!r}: end the name in '.safetensors'."
        )
    return path


Model = Annotated[
    str, typer.Argument(help="A zoo name (icons), a folder, or a hub id.", callback=not_empty)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str, typer.Option(help="Dtype of the weights in memory: float32, float16, bfloat16, or stored.")
]
ClipSkip = Annotated[
    int | None,
    typer.Option(
        help="Last layers of the text encoder to leave out.",
        show_default="the model's, 0",
        callback=within(0, 100),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Seed = Annotated[
    int,
    typer.Option(help="Seed of all random draws.", callback=seed_in_range),
]
Steps = Annotated[int, typer.Option(help="Denoising steps of a picture.", callback=within(1, 1000))]
Force = Annotated[
    bool, typer.Option("--force", help="Replace files that exist, instead of refusing to.")
]


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with each dataclass parameter replaced by one keyword option for each of its fields.

    Typer reads the options of a verb from its signature. A verb with many options takes them as one frozen dataclass;
    the fields' annotations and defaults are the options' own.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind
        field_hints = get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=field_hints[field.name],
            )
            for field in dataclasses.fields(kind)
        ]  # fmt: skip

    @functools.wraps(function)
    def verb(**values: Any) -> Any:
        for name, kind in groups.items():
            fields = {field.name: values.pop(field.name) for field in dataclasses.fields(kind)}
            values[name] = kind(**fields)
        return function(**values)

    signature = inspect.Signature(parameters)
    vars(verb)["__signature__"] = signature
    verb.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return verb
