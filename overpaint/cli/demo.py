"""`overpaint demo`: trace, edit, evaluate and report in one go."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from overpaint.cli.options import Device, Json, Seed, as_path, not_empty
from overpaint.cli.terminal import check_writable, load_model, print_json, print_table, progress

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for report.html and summary.json.", parser=as_path)
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pictures, same code.")] = False,
    erase: Annotated[str, typer.Option(help="The concept to erase.")] = "openmoji style",
    replace: Annotated[str, typer.Option(help="The concept to put in its place.")] = "noto style",
    model: Annotated[
        str, typer.Option(help="A zoo name, a folder or a hub id.", callback=not_empty)
    ] = "icons",
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Trace, edit, evaluate and report. Runs the whole loop on the shipped model.

    \b
    overpaint demo --out runs/demo
    overpaint demo --out fluent --erase "fluent style" --quick
    """  # noqa: D301
    from overpaint.demo import FULL, QUICK, run

    check_writable(out)
    loaded = load_model(model, device)
    with progress(as_json) as on_progress:
        summary = run(
            loaded, out, erase=erase, replace=replace, size=QUICK if quick else FULL, seed=seed,
            on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        return print_json(summary)
    return _print_summary(summary, erase=erase, replace=replace, out=out)


def _print_summary(summary: Mapping[str, float], *, erase: str, replace: str, out: Path) -> None:
    """Print the figures of `summary.json` that fit one screen."""

    def percent(key: str) -> str:
        value = summary.get(key, math.nan)
        return "–" if value is None or math.isnan(value) else f"{100 * value:.0f} %"

    rows = [
        (f"{erase} recognised, before", percent("target_before")),
        (f"{erase} recognised, after", percent("target_after")),
        (f"recognised as {replace}, after", percent("replaced_after")),
        ("other styles lost", percent("others_drop")),
        ("objects lost", percent("objects_drop")),
        ("objects / styles recognised, unedited", f"{percent('object_top1')} / {percent('style_top1')}"),
        ("the same, held-out pairs", f"{percent('heldout_object_top1')} / {percent('heldout_style_top1')}"),
        ("time of the edit", f"{summary['edit_seconds']:.2f} s"),
        ("time in all", f"{summary['seconds']:.0f} s"),
        ("report", str(out / "report.html")),
    ]  # fmt: skip
    print_table((f"{erase} → {replace}", ""), rows)
