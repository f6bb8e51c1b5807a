"""Options that several verbs share, and verbs whose options are the fields of a frozen dataclass."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

__all__ = ["Device", "Json", "Model", "Seed", "Steps", "with_options"]

Model = Annotated[str, typer.Argument(help="A zoo name (icons), a folder, or a hub id.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
Steps = Annotated[int, typer.Option(help="Denoising steps of a picture.")]


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
