"""`overpaint apply`: write an edited copy of a model."""

from pathlib import Path
from typing import Annotated

import typer

from overpaint.cli.options import Device, Dtype, Json, Model, as_path, within
from overpaint.cli.terminal import check_writable, load_model, print_facts

__all__ = ["apply"]


def apply(
    model: Model,
    change: Annotated[Path, typer.Argument(help="The change file.", parser=as_path)],
    out: Annotated[Path, typer.Option(help="A new folder for the edited model.", parser=as_path)],
    strength: Annotated[
        float, typer.Option(help="0 for none of the change, 1 for all.", callback=within(-100, 100))
    ] = 1.0,
    without: Annotated[
        list[str] | None, typer.Option(help="A concept to leave out; may be given again.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Write an edited copy of a model. The copy is a diffusers folder.

    \b
    overpaint apply icons change.safetensors --out edited
    overpaint apply icons change.safetensors --strength 0.5 --out half
    overpaint apply icons change.safetensors --without "a cat" --out rest
    """  # noqa: D301
    from overpaint.edit import Change, export, stack

    if out.exists():
        raise FileExistsError(f"{str(out)!r} exists already: name a new folder with --out.")
    check_writable(out.parent)
    loaded_change = Change.load(change)
    loaded = load_model(model, device, dtype)
    if without:
        loaded_change = stack(loaded, [loaded_change], without=without)
    if strength != 1:
        loaded_change = loaded_change * strength
    print_facts({"model": str(export.folder(loaded, loaded_change, out))}, as_json=as_json)
