"""`overpaint generate`: draw pictures."""

from pathlib import Path
from typing import Annotated

import typer

from overpaint.cli.options import Device, Json, Model, Seed, Steps
from overpaint.cli.terminal import check_writable, load_model, print_facts, progress

__all__ = ["generate"]


def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="One picture each.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("runs/pictures"),
    change: Annotated[Path | None, typer.Option(help="Apply this change first.")] = None,
    seed: Seed = 0,
    steps: Steps = 20,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Draw pictures.

    \b
    overpaint generate icons "an apple in noto style" "a cat in twemoji style" --seed 3
    overpaint generate icons "an apple in openmoji style" --change change.safetensors --out after
    """  # noqa: D301
    from overpaint.edit import Change

    check_writable(out)
    loaded = load_model(model, device)
    if change is not None:
        Change.load(change).apply(loaded)
    with progress(as_json) as on_progress:
        pictures = loaded.generate(
            prompts, seed=seed, steps=steps, guidance_scale=guidance_scale,
            on_progress=on_progress,
        )  # fmt: skip
    print_facts({"pictures": [str(path) for path in pictures.save(out)]}, as_json=as_json)
