"""`overpaint trace`: causal tracing of the text encoder or the UNet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.options import (
    ClipSkip,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    Steps,
    as_path,
    not_empty,
    with_options,
    within,
)
from overpaint.cli.terminal import (
    check_writable,
    load_model,
    print_facts,
    print_json,
    print_table,
    progress,
)

if TYPE_CHECKING:
    from overpaint.model.sampling import Progress
    from overpaint.trace import Effects

__all__ = ["trace"]

_PART_OPTIONS = {
    "source": ("unet",),
    "branches": ("unet",),
    "windows": ("unet",),
    "target": ("swap",),
    "window": ("swap",),
    "features_only": ("text",),
    "heads": ("text", "unet"),
    "noise_samples": ("text", "unet"),
    "sigma": ("text", "unet"),
    "direction": ("text", "unet"),
}


@dataclass(frozen=True)
class TraceOptions:
    """Options of `overpaint trace`."""

    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the effects; a stopped trace is resumed there.", parser=as_path
        ),
    ] = Path("runs/trace")
    part: Annotated[str, typer.Option(help="text, unet, or swap (the direct effect).")] = "text"
    kind: Annotated[str, typer.Option(help="Kind of the probes: style, object, color, ...")] = (
        "style"
    )
    vocabulary: Annotated[str, typer.Option(help="icons, or natural for photographs.")] = "icons"
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A CSV of case_number,prompt,evaluation_seed instead of the probes.",
            parser=as_path,
        ),
    ] = None
    concept: Annotated[
        str | None, typer.Option(help="The words of the concept in the prompts of the CSV.")
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            help="Largest number of probes.",
            show_default="8, or the whole CSV",
            callback=within(1, 1_000_000),
        ),
    ] = None
    source: Annotated[str, typer.Option(help="unet: clean_trajectory or same_latent.")] = (
        "clean_trajectory"
    )
    branches: Annotated[str, typer.Option(help="unet: both or cond.")] = "both"
    direction: Annotated[str, typer.Option(help="restore or corrupt.")] = "restore"
    heads: Annotated[bool, typer.Option("--heads", help="Each attention head too.")] = False
    windows: Annotated[
        bool, typer.Option("--windows", help="unet: each third of the steps too.")
    ] = False
    target: Annotated[str, typer.Option(help="swap: the words to put in the concept's place.")] = ""
    window: Annotated[
        int, typer.Option(help="swap: layers swapped together.", callback=within(1, 1000))
    ] = 2
    screen: Annotated[
        float | None,
        typer.Option(
            help="Draw only this share of the states, the best by gradient.",
            callback=within(1e-6, 1),
        ),
    ] = None
    features_only: Annotated[
        bool, typer.Option("--features-only", help="text: draw no pictures.")
    ] = False
    scorer: Annotated[
        str | None,
        typer.Option(
            help="A CLIP (folder or hub id) instead of icons-judge, for pictures of any size.",
            callback=not_empty,
        ),
    ] = None
    noise_samples: Annotated[
        int, typer.Option(help="Corruptions a prompt.", callback=within(1, 10_000))
    ] = 1
    sigma: Annotated[
        str,
        typer.Option(help="Standard deviation of the noise: a number, or a factor such as 3std."),
    ] = "3std"
    solver: Annotated[str, typer.Option(help="own, ddim or dpm.")] = "dpm"
    memory: Annotated[
        float | None, typer.Option(help="MiB for activations.", callback=within(1, 1e9))
    ] = None
    seed: Seed = 0
    steps: Steps = 10


@with_options
def trace(
    model: Model,
    options: TraceOptions,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    clip_skip: ClipSkip = None,
    as_json: Json = False,
) -> None:
    """Trace which sites hold a kind of concept. `overpaint report` draws the result.

    \b
    overpaint trace icons --kind color
    overpaint trace icons --part unet --source same_latent --windows --memory 512
    overpaint trace ./sd14 --vocabulary natural --scorer ./clip --limit 40
    overpaint trace icons --part swap --target "noto style"
    """  # noqa: D301
    from overpaint import trace
    from overpaint.scorers import Clip

    _check(options)
    check_writable(options.out)
    chosen = _probes(options)
    noise = trace.Noise(options.noise_samples, _sigma(options.sigma))
    drawing = trace.Drawing(
        steps=options.steps, solver=options.solver, seeds=(options.seed,), memory=options.memory
    )
    loaded = load_model(model, device, dtype, clip_skip)
    run = _Run(
        loaded, chosen, drawing, noise,
        None if options.scorer is None else Clip(options.scorer, device=device).score, options,
    )  # fmt: skip
    with progress(as_json) as on_progress:
        estimate = None if options.screen is None else _estimate(run, on_progress)
        effects = _effects(run, estimate, on_progress)
    if estimate is not None:
        effects = trace.screening.with_note(effects, estimate, share=options.screen or 1.0)
    _print_effects(effects, effects.save(run.path("")), as_json=as_json)


@dataclass(frozen=True)
class _Run:
    """A model, its traced part, and the settings of every step."""

    model: Any
    probes: Sequence[Any]
    drawing: Any
    noise: Any
    scorer: Any
    options: TraceOptions

    @property
    def mode(self) -> dict[str, Any]:
        """Settings that only the tracers of the UNet take."""
        o = self.options
        return {"source": o.source, "branches": o.branches} if o.part == "unet" else {}

    def path(self, suffix: str, ending: str = ".parquet") -> Path:
        """Return where effects are saved: `text.parquet`, `unet-same_latent.parquet`, `swap-runs`, ..."""
        part = self.options.part
        name = f"unet-{self.options.source}" if part == "unet" else part
        return self.options.out / f"{name}{suffix}{ending}"


def _probes(options: TraceOptions) -> Sequence[Any]:
    from overpaint import probes

    if options.prompts is not None:
        table = probes.load_file(options.prompts, kind=options.kind, concept=options.concept)
        return table[: options.limit]
    table = probes.load(options.kind, vocabulary=options.vocabulary)
    return table[: 8 if options.limit is None else options.limit]


def _estimate(run: _Run, on_progress: "Progress") -> "Effects":
    """Return the effects of all states estimated by gradient, and save them."""
    from overpaint.trace import screening

    screen: Any = screening.text_encoder if run.options.part == "text" else screening.unet
    estimate = screen(
        run.model, run.probes, last=min(5, run.options.steps), noise=run.noise,
        drawing=replace(run.drawing, batch_size=8), scorer=run.scorer, on_progress=on_progress, **run.mode,
    )  # fmt: skip
    estimate.save(run.path("-screen"))
    return estimate


def _effects(run: _Run, estimate: "Effects | None", on_progress: "Progress") -> "Effects":
    """Trace the part that the options name: all states, or the best of an estimate."""
    from overpaint import trace

    o = run.options
    best = None
    if estimate is not None and o.screen is not None:
        best = trace.screening.best(estimate, o.screen)
    shared: dict[str, Any] = {
        "drawing": run.drawing, "scorer": run.scorer, "folder": run.path("-runs", ""), "on_progress": on_progress,
    }  # fmt: skip
    if o.part == "swap":
        return trace.prompt_swap(run.model, run.probes, target=o.target, window=o.window, **shared)
    shared |= {"direction": o.direction, "noise": run.noise}
    if o.part == "text":
        states: Any = trace.TextStates(heads=o.heads, only=best)
        generate = not o.features_only
        return trace.text_encoder(run.model, run.probes, states=states, generate=generate, **shared)
    states = trace.UNetStates(
        heads=o.heads, windows=tuple(trace.WINDOWS) if o.windows else ("",),
        only=None if best is None else [site for site, _ in best],
    )  # fmt: skip
    return trace.unet(run.model, run.probes, states=states, **run.mode, **shared)


def _check(options: TraceOptions) -> None:
    part, screen, direction = options.part, options.screen, options.direction
    if part not in ("text", "unet", "swap"):
        raise ValueError(f"unknown part {part!r}: choose text, unet or swap.")
    if part == "swap" and not options.target:
        raise ValueError(
            "a swap needs words for the concept's place: name them with --target, for example --target 'noto style'."
        )
    _check_part(options)
    if options.concept is not None and options.prompts is None:
        raise ValueError(
            "--concept names words in the prompts of a CSV: give the file with --prompts, or leave --concept out."
        )
    if options.prompts is not None and options.vocabulary != "icons":
        raise ValueError(
            "--vocabulary selects the probes that ship with the package, and --prompts replaces them: leave one of "
            "them out."
        )
    if options.features_only and options.scorer is not None:
        raise ValueError(
            "--scorer reads pictures and --features-only draws none: leave one of them out."
        )
    if part == "swap" and screen is not None:
        raise ValueError("--screen ranks single states and a swap has none: leave one of them out.")
    if screen is not None and direction != "restore":
        raise ValueError(
            f"--screen estimates what restoring a state does, not what --direction {direction} does: leave one of them "
            "out."
        )


def _check_part(options: TraceOptions) -> None:
    """Raise if an option is given that the traced part does not read."""
    defaults = TraceOptions()
    for name, parts in _PART_OPTIONS.items():
        if options.part not in parts and getattr(options, name) != getattr(defaults, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is for --part {' or '.join(parts)}, not for {options.part}: leave {option} out."
            )


def _sigma(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a factor, or an error that `Noise` reports


def _proxy(effects: "Effects") -> float | None:
    """Return the rank correlation of the text features' recovery, which needs no picture, and the pictures' effects."""
    names = ("embed_recovery", "indirect_effect")
    if min(effects.mean(name).num_rows for name in names) < 3:
        return None
    return effects.agreement(effects, value=names[0], other_value=names[1]).mean


def _print_effects(effects: "Effects", path: Path, *, as_json: bool) -> None:
    """Print the ten best states and where the effects of all of them are saved."""
    test = effects.test()
    rows = sorted(test.table.to_pylist(), key=lambda row: -row["mean"])[:10]
    facts: dict[str, Any] = {"effects": str(path), "dropped": effects.dropped}
    if "screen" in effects.protocol:
        facts["screen"] = effects.protocol["screen"]
    if (proxy := _proxy(effects)) is not None:
        facts["spearman_features_pictures"] = proxy
    possible = not test.reason
    if not possible and test.protocol["value"] != "embed_recovery":
        facts["causal"] = test.reason
    if as_json:
        return print_json({**facts, "threshold": test.protocol["threshold"], "top": rows})
    columns = {
        "site": [r["site"] for r in rows],
        "token": [r["role"] or "all" for r in rows],
        "head": ["all" if r["head"] is None else str(r["head"]) for r in rows],
        "steps": [r["window"] or "all" for r in rows],
        test.protocol["value"].replace("_", " "): [f"{r['mean']:.3f}" for r in rows],
        "95 % interval": [f"{r['low']:.3f} to {r['high']:.3f}" for r in rows],
        "p (Holm)": [f"{r['p_holm']:.3f}" for r in rows],
        "causal": [{True: "yes", False: "no", None: "-"}[r["causal"] if possible else None] for r in rows],
        "n": [str(r["n"]) for r in rows],
    }  # fmt: skip
    for name in ("token", "head", "steps"):  # not a word of what all rows have in common
        if set(columns[name]) == {"all"}:
            del columns[name]
    print_table(
        tuple(columns), list(zip(*columns.values(), strict=True)), whole=("site", "token", "95 % interval")
    )  # fmt: skip
    picture = path.with_suffix(".png")
    effects.plot(path=picture)
    return print_facts({**facts, "picture": str(picture)}, as_json=False)
