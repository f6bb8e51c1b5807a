"""The command line: one function a verb. Exit codes live here, what it shows in `terminal`, and nowhere else.

Exit codes: 0 done, 1 a fault of ours, 2 bad input, 130 Ctrl-C. Errors are one line on stderr; with `--json` stdout
holds one JSON object and nothing else.
"""

import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from overpaint.cli.edit import apply, edit
from overpaint.cli.evaluate import evaluate
from overpaint.cli.export import export
from overpaint.cli.match import match
from overpaint.cli.studio import studio
from overpaint.cli.terminal import (
    Device,
    Json,
    Model,
    Seed,
    Steps,
    check_writable,
    load_model,
    print_facts,
    print_json,
    progress,
    table,
)
from overpaint.cli.trace import trace

__all__ = ["app", "main"]

app = typer.Typer(
    name="overpaint",
    help="Find where an image model keeps what it knows, and paint over it.",
    add_completion=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=arguments, standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except TyperException as error:
        return _complain(error.format_message())
    except (ValueError, OSError, ImportError) as error:
        _maybe_trace()
        return _complain(str(error))
    except Exception as error:  # a fault of ours: say so in one line, with the way to see more
        _maybe_trace()
        text = f"{type(error).__name__}: {error} (a fault of overpaint: set OVERPAINT_TRACEBACK=1 to see where)"
        return _complain(text, code=1)
    if code == 130:
        return _complain("stopped by Ctrl-C", code=130)
    return code if isinstance(code, int) else 0


def _complain(text: str, *, code: int = 2) -> int:
    sys.stderr.write(f"overpaint: {' '.join(text.split())}\n")
    return code


def _maybe_trace() -> None:
    if os.environ.get("OVERPAINT_TRACEBACK"):
        traceback.print_exc()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and summary.json.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pictures, same code.")] = False,
    erase: Annotated[str, typer.Option(help="What to paint over.")] = "openmoji style",
    replace: Annotated[str, typer.Option(help="What to put in its place.")] = "noto style",
    model: Annotated[str, typer.Option(help="A zoo name, a folder or a hub id.")] = "icons",
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Trace, edit, judge and report: the whole loop on the shipped model.

    \b
    overpaint demo --out runs/demo
    overpaint demo --out runs/fluent --erase "fluent style" --replace "twemoji style" --quick
    """  # noqa: D301
    from overpaint import demo as whole

    check_writable(out)
    loaded = load_model(model, device)
    with progress(as_json) as stage:
        summary = whole.run(
            loaded, out, erase=erase, replace=replace, size=whole.QUICK if quick else whole.FULL, seed=seed,
            on_progress=stage,
        )  # fmt: skip
    if as_json:
        return print_json(summary)
    _print_summary(summary, erase=erase, replace=replace, out=out)
    return None


@app.command()
def load(model: Model, device: Device = "cpu", as_json: Json = False) -> None:
    """Say what a model is made of.

    \b
    overpaint load icons
    overpaint load ./sd14 --json
    """  # noqa: D301
    loaded = load_model(model, device)
    parts = {
        name: type(part).__name__
        for name in (*_PARTS, "tokenizer", "tokenizer_2", "scheduler")
        for part in [getattr(loaded.pipe, name, None)]
        if part is not None
    }
    counts = {
        f"{name}_parameters": sum(p.numel() for p in getattr(loaded.pipe, name).parameters())
        for name in _PARTS
        if getattr(loaded.pipe, name, None) is not None
    }
    print_facts({"model": loaded.name, **parts, **counts}, as_json=as_json)


@app.command()
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
    with progress(as_json) as stage:
        pictures = loaded.generate(
            prompts, seed=seed, steps=steps, guidance_scale=guidance_scale,
            on_progress=lambda done, total: stage(done, total, "drawing"),
        )  # fmt: skip
    paths = pictures.save(out)
    print_facts({"pictures": [str(p) for p in paths]}, as_json=as_json)


@app.command()
def sites(model: Model, device: Device = "cpu", as_json: Json = False) -> None:
    """List the places that can be traced, in the order they run.

    \b
    overpaint sites icons
    overpaint sites icons --json
    """  # noqa: D301
    from overpaint.model.sites import find

    found = find(load_model(model, device))
    if as_json:
        print_json({"sites": [{"name": s.name, "kind": s.kind, "path": s.path} for s in found]})
    else:
        table(("site", "kind", "module"), [(s.name, s.kind, s.path) for s in found])


app.command()(trace)
app.command()(edit)
app.command()(apply)
app.command()(export)
app.command()(match)
app.command()(studio)
app.command()(evaluate)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Holds saved results.")],
    card: Annotated[
        Path | None,
        typer.Option(help="An edited model's folder: put the judge's figures on its card too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the page again from saved results; the same as JSON lies beside it.

    \b
    overpaint report runs/demo
    overpaint report runs/demo --card runs/edited
    """  # noqa: D301
    from overpaint import report as pages

    check_writable(folder, make=False)
    made = {"report": str(pages.write(folder))}
    if card is not None:
        made["card"] = str(pages.to_card(folder, card))
    print_facts(made, as_json=as_json)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="icons, icons-judge or matcher.")],
    minutes: Annotated[float, typer.Option(help="Wall time, earlier runs counted in.")] = 150.0,
    out: Annotated[Path | None, typer.Option(help="Default: runs/MODEL/model.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of weights and draws; icons and matcher.")] = 0,
    diffusion: Annotated[
        bool, typer.Option(help="Off: matcher's control, which answers once.")
    ] = True,
    steps: Annotated[
        list[int] | None, typer.Option(help="In place of minutes: twice, coarse and fine; matcher.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Checkpoints. Default: runs/MODEL.")] = None,
    as_json: Json = False,
) -> None:
    """Train a zoo model: icons from public artwork (npm fetches it), matcher from photographs (apt does).

    \b
    overpaint train icons --minutes 150
    overpaint train icons-judge --minutes 30 --no-resume
    overpaint train matcher --minutes 100 --threads 1
    """  # noqa: D301
    from overpaint.train import icons, judge, matcher

    recipes: dict[str, Any] = {
        "icons": partial(icons.train, seed=seed),
        "icons-judge": judge.train,
        "judge": judge.train,
        "matcher": partial(matcher.train, seed=seed, diffusion=diffusion, steps=steps or ()),
    }
    if model not in recipes:
        raise ValueError(f"no recipe for {model!r}: choose icons, icons-judge or matcher.")
    name = "icons-judge" if model == "judge" else model
    if name == "icons-judge" and seed:
        raise ValueError(f"`seed` of icons-judge is fixed, got {seed}: leave it out.")
    if name != "matcher" and (steps or not diffusion):
        raise ValueError(
            f"`--steps` and `--no-diffusion` are for matcher: leave them out for {name}."
        )
    work = work or Path("runs") / name
    target = out or work / "model"
    check_writable(target.parent)
    with progress(as_json) as stage:
        written = recipes[model](
            out=target, work=work, minutes=minutes, device=device, resume=resume, threads=threads,
            on_progress=lambda p: stage(int(1000 * p.share), 1000, f"{p.stage}, loss {p.loss:.4f}"),
        )  # fmt: skip
    print_facts({"weights": str(written)}, as_json=as_json)


# --- what the verbs share ---------------------------------------------------------------------------------------------


def _print_summary(summary: Mapping[str, float], *, erase: str, replace: str, out: Path) -> None:
    """Print the demo's one screen."""

    def percent(key: str) -> str:
        value = summary.get(key, math.nan)
        return "–" if value is None or math.isnan(value) else f"{100 * value:.0f} %"

    rows = [
        (f"{erase} recognised, before", percent("target_before")),
        (f"{erase} recognised, after", percent("target_after")),
        (f"seen as {replace}, after", percent("replaced_after")),
        ("its neighbours lost", percent("others_drop")),
        ("objects lost", percent("objects_drop")),
        ("the model's objects / styles recognised", f"{percent('object_top1')} / {percent('style_top1')}"),
        ("the same, pairs never trained", f"{percent('heldout_object_top1')} / {percent('heldout_style_top1')}"),
        ("the edit took", f"{summary['edit_seconds']:.2f} s"),
        ("all of it took", f"{summary['seconds']:.0f} s"),
        ("report", str(out / "report.html")),
    ]  # fmt: skip
    table((f"{erase} → {replace}", ""), rows)
