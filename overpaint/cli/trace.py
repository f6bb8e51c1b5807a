"""`overpaint trace`: the one verb with many options."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.options import Device, Json, Model, Seed, Steps
from overpaint.cli.terminal import (
    check_writable,
    load_model,
    print_facts,
    print_json,
    print_table,
    progress,
)

if TYPE_CHECKING:
    from overpaint.trace import Effects

__all__ = ["trace"]


def trace(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Folder for the effects; a stopped trace goes on there.")
    ] = Path("runs/trace"),
    part: Annotated[str, typer.Option(help="text, unet, or swap (the direct effect).")] = "text",
    kind: Annotated[str, typer.Option(help="Which probes: style, object, color, ...")] = "style",
    vocabulary: Annotated[str, typer.Option(help="icons, or natural for photographs.")] = "icons",
    prompts: Annotated[
        Path | None, typer.Option(help="Your own: a CSV of case_number,prompt,evaluation_seed.")
    ] = None,
    concept: Annotated[
        str | None, typer.Option(help="Its words in the prompts of the CSV.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many probes.", show_default="8, or the whole CSV")
    ] = None,
    source: Annotated[
        str, typer.Option(help="unet: clean_trajectory or same_latent.")
    ] = "clean_trajectory",
    branches: Annotated[str, typer.Option(help="unet: both or cond.")] = "both",
    direction: Annotated[str, typer.Option(help="restore or corrupt.")] = "restore",
    heads: Annotated[bool, typer.Option("--heads", help="Each attention head too.")] = False,
    windows: Annotated[
        bool, typer.Option("--windows", help="unet: each third of the steps too.")
    ] = False,
    target: Annotated[
        str, typer.Option(help="swap: the words to put in the concept's place.")
    ] = "",
    window: Annotated[int, typer.Option(help="swap: how many layers at once.")] = 2,
    screen: Annotated[
        float | None, typer.Option(help="Draw only this share of the states, the best by gradient.")
    ] = None,
    features_only: Annotated[
        bool, typer.Option("--features-only", help="text: draw no pictures.")
    ] = False,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="A CLIP (folder or hub id) instead of icons-judge, for pictures of any size."
        ),
    ] = None,
    noise_samples: Annotated[int, typer.Option(help="Corruptions a prompt.")] = 1,
    sigma: Annotated[str, typer.Option(help="Their size: a number, or as in 3std.")] = "3std",
    solver: Annotated[str, typer.Option(help="own, ddim or dpm.")] = "dpm",
    memory: Annotated[float | None, typer.Option(help="MiB for activations.")] = None,
    seed: Seed = 0,
    steps: Steps = 10,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find where a kind of concept is kept; `overpaint report` draws the result.

    \b
    overpaint trace icons --kind color
    overpaint trace icons --part unet --source same_latent --windows --memory 512
    overpaint trace ./sd14 --vocabulary natural --scorer openai/clip-vit-base-patch32 --limit 40
    overpaint trace icons --part swap --target "noto style"
    """  # noqa: D301
    from overpaint import probes, trace
    from overpaint.scorers.clip import Clip

    _check(part, screen, target, direction)
    check_writable(out)
    if prompts is None:
        asked = probes.load(kind, vocabulary=vocabulary)[: 8 if limit is None else limit]
    else:
        asked = probes.load_file(prompts, kind=kind, concept=concept)[:limit]
    loaded = load_model(model, device)
    drawing = trace.Drawing(steps=steps, solver=solver, seeds=(seed,), memory=memory)
    clip = None if scorer is None else Clip(scorer, device=device).score
    noise = trace.Noise(noise_samples, _sigma(sigma))
    mode: dict[str, Any] = {"source": source, "branches": branches} if part == "unet" else {}
    name = {"text": "text", "unet": f"unet-{source}", "swap": "swap"}[part]
    with progress(as_json) as stage:
        estimate = None
        if screen is not None:
            run: Any = trace.screening.text_encoder if part == "text" else trace.screening.unet
            estimate = run(
                loaded, asked, last=min(5, steps), noise=noise, drawing=replace(drawing, batch_size=8), scorer=clip,
                on_progress=stage, **mode,
            )  # fmt: skip
            estimate.save(out / f"{name}-screen.parquet")
        shared: dict[str, Any] = {
            "drawing": drawing, "scorer": clip, "folder": out / f"{name}-runs", "on_progress": stage,
        }  # fmt: skip
        if part == "text":
            effects = trace.text_encoder(
                loaded, asked, states=trace.TextStates(heads=heads, only=_best(estimate, screen)),
                direction=direction, generate=not features_only, noise=noise, **shared,  # type: ignore[arg-type]
            )  # fmt: skip
        elif part == "unet":
            best = _best(estimate, screen)
            states = trace.UNetStates(
                heads=heads, windows=tuple(trace.WINDOWS) if windows else ("",),
                only=None if best is None else [site for site, _ in best],
            )  # fmt: skip
            effects = trace.unet(
                loaded, asked, states=states, direction=direction, noise=noise, **mode, **shared,  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            effects = trace.prompt_swap(loaded, asked, target=target, window=window, **shared)
    if estimate is not None and screen is not None:
        effects = trace.screening.with_note(effects, estimate, share=screen)
    _show(effects, effects.save(out / f"{name}.parquet"), as_json=as_json)


def _check(part: str, screen: float | None, target: str, direction: str) -> None:
    if part not in ("text", "unet", "swap"):
        raise ValueError(f"unknown part {part!r}: choose text, unet or swap.")
    if part == "swap" and not target:
        raise ValueError(
            "a swap needs a prompt to swap in: say --target, for example --target 'noto style'."
        )
    if part == "swap" and screen is not None:
        raise ValueError("--screen estimates states, and a swap has none: leave one of them out.")
    if screen is not None and direction != "restore":
        raise ValueError(
            f"--screen estimates what restoring a state does, not what --direction {direction} does: leave one of them "
            "out."
        )


def _sigma(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a factor, or an error that `Noise` reports


def _best(estimate: "Effects | None", share: float | None) -> tuple[tuple[str, str], ...] | None:
    from overpaint.trace import screening

    return None if estimate is None or share is None else screening.best(estimate, share)


def _proxy(effects: "Effects") -> float | None:
    """Return the rank correlation of the text features' recovery, which needs no picture, and the pictures' effects."""
    names = ("embed_recovery", "indirect_effect")
    if min(effects.mean(name).num_rows for name in names) < 3:
        return None
    return effects.agreement(effects, value=names[0], other_value=names[1]).mean


def _show(effects: "Effects", path: Path, *, as_json: bool) -> None:
    """Print the ten best states, and where all of them are."""
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
    print_table(
        ("site", "token", "head", "steps", test.protocol["value"], "95 % interval", "p (Holm)", "causal", "n"),
        [
            (
                r["site"], r["role"] or "all", "all" if r["head"] is None else str(r["head"]), r["window"] or "all",
                f"{r['mean']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", f"{r['p_holm']:.3f}",
                {True: "yes", False: "no", None: "-"}[r["causal"] if possible else None], str(r["n"]),
            )
            for r in rows
        ],
    )  # fmt: skip
    picture = path.with_suffix(".png")
    effects.plot(path=picture)
    return print_facts({**facts, "picture": str(picture)}, as_json=False)
