"""`overpaint export`: write a change in the formats of other tools."""

from pathlib import Path
from typing import Annotated

import typer

from overpaint.cli.options import Device, Dtype, Force, Json, Model, as_path
from overpaint.cli.terminal import check_absent, check_writable, load_model, print_facts

__all__ = ["export"]

_FORMATS = ("lora", "kohya", "comfy", "embeddings", "ldm", "folder")
_FOLDERS = ("embeddings", "folder")


def export(
    model: Model,
    change: Annotated[Path, typer.Argument(help="The change file.", parser=as_path)],
    out: Annotated[
        Path,
        typer.Option(
            help="The file; a new folder for --format folder and embeddings.", parser=as_path
        ),
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="lora (diffusers), kohya (LoRA for web UIs), comfy (with token rows, for ComfyUI), embeddings (token "
            "rows for AUTOMATIC1111), ldm (one edited checkpoint, Stable Diffusion 1), or folder (diffusers).",
        ),
    ] = "lora",
    force: Force = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Write a change for other tools. As a LoRA, or as the whole edited model.

    \b
    overpaint export icons change.safetensors --out lora.safetensors
    overpaint export icons change.safetensors --format kohya --out ui.safetensors
    overpaint export icons change.safetensors --format ldm --out ldm.safetensors
    overpaint export icons change.safetensors --format folder --out edited
    """  # noqa: D301
    from overpaint.edit import Change, export

    if form not in _FORMATS:
        raise ValueError(
            f"unknown format {form!r}: choose {', '.join(_FORMATS[:-1])} or folder with --format."
        )
    _check_out(out, form, force)
    if out.exists() and change.exists() and out.samefile(change):
        raise ValueError(f"{str(out)!r} is the change itself: name another file with --out.")
    check_writable(out.parent)
    loaded_change = Change.load(change)
    loaded = load_model(model, device, dtype)
    if form in ("lora", "kohya", "comfy"):
        write = {"lora": export.lora, "kohya": export.kohya, "comfy": export.comfy}[form]
        path = write(loaded_change, out, model=loaded)
    elif form == "embeddings":
        path = export.embeddings(loaded, loaded_change, out)
    elif form == "ldm":
        path = export.single_file(loaded, loaded_change, out)
    else:
        path = export.folder(loaded, loaded_change, out)
    print_facts({"format": form, "written": str(path), "bytes": _size(path)}, as_json=as_json)


def _check_out(out: Path, form: str, force: bool) -> None:
    """Raise unless the export may be written to `out`."""
    if form not in _FOLDERS:
        if out.suffix != ".safetensors":
            raise ValueError(
                f"weights are exported as safetensors, not as {out.name!r}: end the name in '.safetensors'."
            )
        return check_absent(out, force=force)
    if out.exists():
        raise FileExistsError(
            f"{str(out)!r} exists already: an export replaces no folder, also with --force; name a new one."
        )
    return None


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
