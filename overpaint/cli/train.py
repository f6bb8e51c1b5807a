"""`overpaint train`: train a zoo model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from overpaint.cli.options import Device, Json, as_path, seed_in_range, with_options, within
from overpaint.cli.terminal import check_writable, print_facts, progress

__all__ = ["train"]


@dataclass(frozen=True)
class TrainOptions:
    """Options of `overpaint train`."""

    minutes: Annotated[
        float,
        typer.Option(help="Wall time, that of earlier runs included.", callback=within(0, 1e6)),
    ] = 150.0
    out: Annotated[Path | None, typer.Option(help="Default: runs/MODEL/model.", parser=as_path)] = (
        None
    )
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = True
    threads: Annotated[int, typer.Option(help="CPU threads.", callback=within(1, 1024))] = 2
    device: Device = "cpu"
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of weights and draws (icons, lettering, matcher).", callback=seed_in_range
        ),
    ] = 0
    diffusion: Annotated[bool, typer.Option(help="Off: train the one-shot control (matcher).")] = (
        True
    )
    steps: Annotated[
        list[int] | None,
        typer.Option(
            help="Coarse and fine steps, instead of minutes; given twice (matcher).",
            callback=within(1, 10**9),
        ),
    ] = None
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this stage; may be repeated (lettering): grey, single, fonts, photographs."
        ),
    ] = None
    work: Annotated[
        Path | None, typer.Option(help="Checkpoints. Default: runs/MODEL.", parser=as_path)
    ] = None


@with_options
def train(
    model: Annotated[str, typer.Argument(help="icons, icons-judge, lettering or matcher.")],
    options: TrainOptions,
    as_json: Json = False,
) -> None:
    """Train a zoo model. Icons from artwork and words (fetched by npm and pip), lettering from fonts (by npm), matcher
    from photographs (by apt).

    \b
    overpaint train icons --minutes 150
    overpaint train icons-judge --minutes 30 --no-resume
    overpaint train matcher --minutes 100 --threads 1
    overpaint train lettering --minutes 900 --threads 1
    """  # noqa: D301
    from overpaint.model.loading import check_device

    name = "icons-judge" if model == "judge" else model
    recipe = _recipe(name, options)
    work = options.work or Path("runs") / name
    out = options.out or work / "model"
    check_device(options.device)
    check_writable(out.parent)
    with progress(as_json) as on_progress:
        weights = recipe(
            out=out, work=work, minutes=options.minutes, device=options.device, resume=options.resume,
            threads=options.threads, on_progress=on_progress,
        )  # fmt: skip
    print_facts({"weights": str(weights)}, as_json=as_json)


def _recipe(name: str, options: TrainOptions) -> Any:
    """Return the training function of `name`; refuse options that it does not have."""
    from overpaint.train import icons, judge, lettering, matcher

    seed, steps = options.seed, options.steps or ()
    recipes: dict[str, Any] = {
        "icons": partial(icons.train, seed=seed),
        "icons-judge": judge.train,
        "lettering": partial(lettering.train, seed=seed, stages=options.stage or ()),
        "matcher": partial(matcher.train, seed=seed, diffusion=options.diffusion, steps=steps),
    }
    if name not in recipes:
        raise ValueError(
            f"no recipe for {name!r}: choose icons, icons-judge, lettering or matcher."
        )
    if name == "icons-judge" and seed:
        raise ValueError(f"`seed` of icons-judge is fixed, got {seed}: leave it out.")
    if name != "lettering" and options.stage:
        raise ValueError(f"`--stage` is for lettering: leave it out for {name}.")
    if name != "matcher" and (steps or not options.diffusion):
        raise ValueError(
            f"`--steps` and `--no-diffusion` are for matcher: leave them out for {name}."
        )
    return recipes[name]
