"""`overpaint match`: find each pixel of one picture in another."""

from pathlib import Path
from typing import Annotated, Any

import typer

from overpaint.cli.options import Force, Json, Seed, as_path, not_empty, within
from overpaint.cli.terminal import (
    check_absent,
    check_writable,
    print_facts,
    progress,
)

__all__ = ["match"]

_Samples = Annotated[
    int,
    typer.Option(help="Hypotheses; 2 or more give an uncertainty.", callback=within(1, 10_000)),
]
_Steps = Annotated[
    int, typer.Option(help="Of denoising, for each hypothesis.", callback=within(1, 1000))
]
_FILES = (
    "flow.flo", "flow.npy", "std.npy", "warped.png", "wheel.png", "arrows.png", "confidence.png",
)  # fmt: skip


def match(
    image_a: Annotated[Path, typer.Argument(help="The picture that is searched.", parser=as_path)],
    image_b: Annotated[
        Path, typer.Argument(help="The picture to find in IMAGE_A, pixel by pixel.", parser=as_path)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for flow and views.", parser=as_path)
    ] = Path("runs/match"),
    matcher: Annotated[
        str, typer.Option(help="A matcher's folder, or the shipped one.", callback=not_empty)
    ] = ("matcher"),
    samples: _Samples = 8,
    steps: _Steps = 5,
    refine: Annotated[bool, typer.Option(help="Refine the flow by optical flow.")] = True,
    cycle: Annotated[
        bool,
        typer.Option(
            "--cycle", help="Match in both directions, and print the forward-backward error."
        ),
    ] = False,
    dark: Annotated[
        bool, typer.Option("--dark", help="Draw the views on a dark background.")
    ] = False,
    force: Force = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Match two pictures. Writes flow.flo, flow.npy and std.npy, the first as seen from the second, and three views.

    \b
    overpaint match a.png b.png -o out/
    overpaint match left.jpg right.jpg -o out --cycle --json
    overpaint match a.png b.png -o fast --samples 1 --steps 1 --seed 3
    """  # noqa: D301
    from overpaint.images.charts import DARK, LIGHT
    from overpaint.match import dense, verdict

    check_absent(*(out / name for name in _FILES), force=force)
    check_writable(out)
    with progress(as_json) as on_progress:
        result = dense(
            image_a, image_b, matcher=matcher, samples=samples, steps=steps, seed=seed, cycle=cycle,
            refine=refine, on_progress=on_progress,
        )  # fmt: skip
    paths = result.save(out, image_b, theme=DARK if dark else LIGHT)
    lengths = result.flow.norm(dim=0)
    height, width = result.std.shape
    facts: dict[str, Any] = (
        {"verdict": result.verdict, "sure": result.sure}
        if as_json
        else {"verdict": verdict.describe(result.sure)}
    )
    facts |= {
        "size": f"{width}x{height}",
        "moved_median": lengths.median().item(),
        "moved_most": lengths.max().item(),
        "inside": result.inside.float().mean().item(),
    }
    if samples > 1:
        facts |= {"std_median": result.std.median().item()}
    if result.consistency is not None:
        consistency = result.consistency[result.inside]
        empty = not consistency.numel()
        facts |= {"missed_median": float("nan") if empty else consistency.median().item()}
    print_facts(facts | {name: str(path) for name, path in paths.items()}, as_json=as_json)
