"""`overpaint generate`: draw pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from overpaint.cli.options import (
    ClipSkip,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Seed,
    Steps,
    as_path,
    with_options,
    within,
)
from overpaint.cli.terminal import check_absent, check_writable, load_model, print_facts, progress

__all__ = ["generate"]


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `generate`."""

    out: Annotated[Path, typer.Option(help="Folder for the PNGs.", parser=as_path)] = Path(
        "runs/pictures"
    )
    change: Annotated[
        Path | None, typer.Option(help="Apply this change first.", parser=as_path)
    ] = None
    force: Force = False
    negative_prompt: Annotated[
        str | None, typer.Option(help="Guidance leads away from it instead of the empty prompt.")
    ] = None
    seed: Seed = 0
    steps: Steps = 20
    guidance_scale: Annotated[
        float | None, typer.Option(help="Default: the model's.", callback=within(0, 1000))
    ] = None
    height: Annotated[
        int | None,
        typer.Option(
            help="In pixels, a multiple of 8.", show_default="the model's", callback=within(8, 8192)
        ),
    ] = None
    width: Annotated[
        int | None,
        typer.Option(
            help="In pixels, a multiple of 8.", show_default="the model's", callback=within(8, 8192)
        ),
    ] = None
    clip_skip: ClipSkip = None


@with_options
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="One picture each.")],
    options: GenerateOptions,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Draw pictures.

    \b
    overpaint generate icons "an apple in noto style" "a cat" --seed 3
    overpaint generate icons "an apple" --change change.safetensors --out after
    overpaint generate ./sd15 "a city" --negative-prompt rain --width 768
    """  # noqa: D301
    from overpaint.edit import Change

    pictures = [options.out / f"{i:04d}.png" for i in range(len(prompts))]
    check_absent(*pictures, options.out / "pictures.json", force=options.force)
    check_writable(options.out)
    change = None if options.change is None else Change.load(options.change)
    loaded = load_model(model, device, dtype, options.clip_skip)
    if change is not None:
        change.apply(loaded)
    with progress(as_json) as on_progress:
        images = loaded.generate(
            prompts, negative_prompt=options.negative_prompt, seed=options.seed, steps=options.steps,
            guidance_scale=options.guidance_scale, height=options.height, width=options.width,
            on_progress=on_progress,
        )  # fmt: skip
    print_facts({"pictures": [str(path) for path in images.save(options.out)]}, as_json=as_json)
