"""Direct effect: which cross-attention layers, shown another prompt, change the picture?

A window of m consecutive cross-attention layers reads a target prompt, the others the original one;
nothing is corrupted and nothing restored. All M - m + 1 windows of a prompt ride in one denoising
batch: row 0 has the original prompt, row 1 the target everywhere, and at the layers of its window a
hook feeds row r the text features of row 1. Only rows of the conditional branch are touched.

Where the concept is to go (style, objects) the best window is the one whose pictures show least of
it; where a fact is to come, the one whose pictures show most of the target.

Source: Basu et al., 2024 (LocoGen), https://arxiv.org/abs/2405.01008. Its text has M - m + 1
windows, its pseudocode one less: all are run here.
Deviations: every window has its full width (the authors' code narrows the last ones to one layer);
features are replaced where a layer reads them, so that K and V follow with whatever weights it has.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.model.sites import Site
from overpaint.model.token_spans import find_span
from overpaint.probes import Probe
from overpaint.trace import provenance
from overpaint.trace.corruption import Prompted
from overpaint.trace.effects import Effects, recovery
from overpaint.trace.renderer import (
    Renderer,
    Scorer,
    about,
    check_seeds,
    equal_chunks,
    recovered,
    seeds_of,
)
from overpaint.trace.resume import sweep

__all__ = ["Pick", "Target", "draw", "pick_window", "smallest_window", "swap"]

Pick = Literal["min", "max"]
Target = str | Callable[[Any], Prompted]


def swap(
    model: Any,
    probes: Sequence[Prompted],
    *,
    target: Target,
    window: int = 2,
    pick: Pick = "min",
    seeds: Sequence[int] = (0,),
    steps: int = 10,
    guidance_scale: float | None = None,
    solver: str = "dpm",
    score: Scorer | None = None,
    minimum_gap: float = 0.02,
    batch_size: int = 32,
    memory: float | None = None,
    folder: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Show every window of cross-attention layers another prompt, and score what they draw.

    Args:
        model: A `TextToImage`; its weights and modules are left as they were.
        probes: Prompts with the concept's words.
        target: The words to put in the concept's place, or a function from a probe to the probe of
            the target prompt, where the words around it change too.
        window: How many consecutive layers, m.
        pick: `"min"` scores how much the pictures show of the probe's concept, which should go
            (style, objects); `"max"` how much they show of the target's, which should come (facts).
        seeds: Start noise, equal in all rows of a prompt; a probe that comes with a seed uses that instead.
        steps: Denoising steps.
        guidance_scale: The model's own if `None`.
        solver: `"own"` is the model's scheduler, `"ddim"`, or `"dpm"`, a multistep solver.
        score: From pictures (N, 3, H, W) in [0, 1] and N probes to N scores; the shipped judge if
            `None`, which takes pictures of 64x64 pixels.
        minimum_gap: Prompts that the target everywhere does not change by this much have no `recovery`.
        batch_size: Rows of a batch, at most.
        memory: MiB for activations; lowers `batch_size` to what fits.
        folder: Keeps finished prompts, so that a run that was stopped goes on.
        on_progress: Called with the runs (prompt, seed) done, in thousandths, and their number times 1000.

    Returns:
        Effects with a row a window, prompt and seed; `site` is the window's first layer, `direction`
        `"corrupt"`, since the clean run is changed. For want of columns of their own, `score_clean`
        is that of the original prompt, `score_corrupted` that of the target prompt in all layers,
        `score_restored` that of the window. `indirect_effect` holds the direct effect: how far the
        window moved the score in the direction of `pick`, that is score_clean - score_restored for
        `"min"`; `recovery` is its share of what the target in all layers does, and
        `latent_recovery` the share of the way to its latents.

    Raises:
        ValueError: A window outside the model, a concept that is not in its prompt once, or another
            setting out of range.
        UnsupportedModel: A cross-attention layer does not read its text once a step.
    """
    layers = [site for site in sites.find_unet(model.unet) if site.kind == "cross_attn"]
    _check(probes, seeds, window, pick, len(layers))
    pairs = [(probe, _aim(model, probe, target)) for probe in probes]
    renderer = Renderer.of(
        model, score=score, steps=steps, guidance_scale=guidance_scale, solver_name=solver, direction="corrupt",
        minimum_gap=minimum_gap, batch_size=batch_size, memory=memory,
    )  # fmt: skip
    windows = [layers[i : i + window] for i in range(len(layers) - window + 1)]
    runs = {f"{p.id}:{seed}": (p, aim, seed) for p, aim in pairs for seed in seeds_of(p, seeds)}
    negative = model.encode([""])

    def compute(run: str) -> list[dict[str, Any]]:
        probe, aim, seed = runs[run]
        before = list(runs).index(run)

        def tick(share: float) -> None:
            if on_progress is not None:
                on_progress(1000 * before + int(1000 * share), 1000 * len(runs))

        texts = torch.cat([model.encode([asked.prompt]) for asked in (probe, aim)])
        latents = draw(renderer, texts, negative, windows, seed=seed, on_step=tick)
        scores = renderer.scores(latents, probe if pick == "min" else aim)
        found = _rows(probe, [w[0] for w in windows], latents, scores, pick, minimum_gap)
        return [{**row, "seed": seed} for row in found]

    protocol = renderer.protocol(
        "swap", probes, folder=folder, window=window, pick=pick, cross_attention=[site.path for site in layers],
        seeds=list(seeds), targets=[aim.prompt for _, aim in pairs],
        asked_of_targets=provenance.asked([aim for _, aim in pairs]),
    )  # fmt: skip
    return Effects.of(sweep(folder, protocol, list(runs), compute), protocol)


def pick_window(effects: Effects) -> tuple[Site, ...]:
    """Return the layers of the best window: least mean score for `"min"`, greatest for `"max"`.

    Args:
        effects: What `swap` returned.

    Raises:
        ValueError: The effects are of another kind of trace.
    """
    means = _means(effects)
    best = min if effects.protocol["pick"] == "min" else max
    start = best(means, key=lambda index: means[index])
    paths = effects.protocol["cross_attention"]
    return tuple(
        Site(f"unet.cross_attn.{i}", "unet", "cross_attn", i, paths[i])
        for i in range(start, start + effects.protocol["window"])
    )


def smallest_window(
    model: Any,
    probes: Sequence[Prompted],
    *,
    target: Target,
    threshold: float,
    pick: Pick = "min",
    seeds: Sequence[int] = (0,),
    steps: int = 10,
    guidance_scale: float | None = None,
    solver: str = "dpm",
    score: Scorer | None = None,
    memory: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Widen the window layer by layer until its best place meets `threshold`; return that trace.

    Args:
        model: As in `swap`, like all that is not explained here.
        probes: Prompts with the concept's words.
        target: What to show instead.
        threshold: Mean score that the best window must not exceed (`"min"`) or must reach (`"max"`).
        pick: `"min"` or `"max"`.
        seeds: Start noise.
        steps: Denoising steps.
        guidance_scale: The model's own if `None`.
        solver: `"own"`, `"ddim"` or `"dpm"`.
        score: From pictures and probes to scores.
        memory: MiB for activations.
        on_progress: As in `swap`, anew for each width.

    Returns:
        The effects of the smallest width; `protocol["window"]` says it, `pick_window` its layers.

    Raises:
        ValueError: Even all layers together do not meet the threshold, or as in `swap`.
    """
    count = sum(site.kind == "cross_attn" for site in sites.find_unet(model.unet))
    best, sign = float("nan"), 1 if pick == "max" else -1
    for window in range(1, count + 1):
        effects = swap(
            model, probes, target=target, window=window, pick=pick, seeds=seeds, steps=steps,
            guidance_scale=guidance_scale, solver=solver, score=score, memory=memory, on_progress=on_progress,
        )  # fmt: skip
        best = max(_means(effects).values(), key=lambda mean: sign * mean)
        if sign * best >= sign * threshold:
            return effects
    side = "at least" if pick == "min" else "at most"
    raise ValueError(
        f"no window meets the threshold of {threshold}: with the target in all {count} layers the "
        f"mean score is {best:.3f}. Give {side} that, or another target."
    )


def draw(
    renderer: Renderer,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    windows: Sequence[Sequence[Site]],
    *,
    seed: int,
    on_step: Callable[[float], None] | None = None,
) -> Tensor:
    """Denoise the original prompt, the target prompt, and one row a window in lockstep.

    Args:
        renderer: Model, steps, guidance and batch.
        prompt_embeds: Text features of original and target, shape (2, L, D).
        negative_embeds: Text features of the empty prompt, shape (1, L, D).
        windows: For each further row, the cross-attention sites that read the target.
        seed: Start noise, the same in every row.
        on_step: Called after each step of a batch with the share that is done.

    Returns:
        Final latents, shape (2 + W, C, h, w): original, target, windows.

    Raises:
        UnsupportedModel: A cross-attention layer does not read its text once a step.
    """
    parts: list[Tensor] = []
    original, aim = prompt_embeds[:1], prompt_embeds[1:]
    chunks = list(
        equal_chunks(list(windows), renderer.rows, rows=lambda n: n + 2, multiple=4, fill=())
    )
    for number, (chosen, used) in enumerate(chunks):
        rows, taken = len(chosen) + 2, 0

        def after(done: int, _: Tensor, number: int = number) -> None:
            nonlocal taken
            taken = done
            if on_step is not None:
                on_step(min(1.0, (number + done / renderer.steps) / len(chunks)))

        texts = torch.cat([original, aim, original.expand(len(chosen), -1, -1)])
        feeders = _feeders(renderer.model, chosen, rows if renderer.guidance_scale != 1 else 0)
        with hooks.patch_inputs(feeders) as calls:
            latents = renderer.denoise(seed, rows, texts, negative_embeds, on_step=after)
        if any(count != taken for count in calls.values()):
            raise UnsupportedModel(
                f"a cross-attention layer ran {sorted(set(calls.values()))} times in {taken} steps: "
                "this UNet does not read its text once a step, so it cannot be swapped."
            )
        parts.append(latents[: used + 2] if not parts else latents[2 : used + 2])
    return torch.cat(parts)


def _feeders(
    model: Any, windows: Sequence[Sequence[Site]], first: int
) -> dict[Module, Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Return for each layer a function that gives row 1's text to the rows whose window holds it.

    `first` is the first conditional row: the guided batch holds all unconditional rows before.
    """
    wanted: dict[Module, list[int]] = {}
    for row, window in enumerate(windows, start=first + 2):
        for site in window:
            wanted.setdefault(site.module(model), []).append(row)

    def feed(
        rows: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = kwargs.get("encoder_hidden_states")
        if not isinstance(text, Tensor):
            raise UnsupportedModel(
                "a cross-attention layer of this UNet is not given its text as one tensor "
                "`encoder_hidden_states`: unload image prompts and other adapters first."
            )
        changed = text.clone()
        changed[rows] = text[first + 1]
        return args, {**kwargs, "encoder_hidden_states": changed}

    return {module: partial(feed, rows) for module, rows in wanted.items()}


def _check(
    probes: Sequence[Prompted], seeds: Sequence[int], window: int, pick: str, layers: int
) -> None:
    if not probes:
        raise ValueError(
            "`probes` is empty: give at least one, for example `probes.load('style')`."
        )
    check_seeds(seeds)
    if not 1 <= window <= layers:
        raise ValueError(
            f"`window` must be from 1 to {layers}, the cross-attention layers of this model, got {window}."
        )
    if pick not in ("min", "max"):
        raise ValueError(
            f"`pick` must be 'min' (the concept goes) or 'max' (the target comes), got {pick!r}."
        )


def _aim(model: Any, probe: Prompted, target: Target) -> Prompted:
    """Return the probe of the target prompt; its label is cut from the target as the probe's from its concept."""
    if not isinstance(target, str):
        return target(probe)
    if not target.strip():
        raise ValueError("`target` is empty: name the words to show instead, as in 'noto style'.")
    find_span(model.tokenizer, probe.prompt, probe.concept)  # must stand there once
    words = r"\s+".join(re.escape(word) for word in probe.concept.split())
    prompt = re.sub(rf"(?<!\w){words}(?!\w)", lambda _: target, probe.prompt, flags=re.IGNORECASE)
    before, found, after = probe.concept.partition(getattr(probe, "label", probe.concept))
    label = target.removeprefix(before).removesuffix(after) if found else target
    return Probe(probe.id, probe.kind, prompt, target, label.strip() or target)


def _rows(
    probe: Prompted,
    starts: Sequence[Site],
    latents: Tensor,
    scores: Sequence[float],
    pick: Pick,
    gap: float,
) -> list[dict[str, Any]]:
    original, everywhere, *swapped = scores
    sign = 1 if pick == "max" else -1
    moved = recovered(torch.cat([latents[1:2], latents[:1], latents[2:]]))
    return [
        {
            **about(site.name, (site,)), "role": "", "control": "", "window": "",
            "branches": "cond", "direction": "corrupt",
            "probe": probe.id, "attribute": probe.kind, "prompt": probe.prompt,
            "concept": probe.concept, "noise": 0,
            "score_clean": original, "score_corrupted": everywhere, "score_restored": number,
            "indirect_effect": sign * (number - original),
            "recovery": recovery(sign * everywhere, sign * original, sign * number, gap=gap),
            "latent_recovery": way,
        }
        for site, number, way in zip(starts, swapped, moved, strict=True)
    ]  # fmt: skip


def _means(effects: Effects) -> dict[int, float]:
    """Return the mean score of each window by its first layer."""
    if effects.protocol.get("trace") != "swap":
        raise ValueError(
            f"these effects come from {effects.protocol.get('trace', 'elsewhere')!r}: pass what "
            "`trace.swap` returned."
        )
    found: dict[int, list[float]] = {}
    columns = (effects.table[name].to_pylist() for name in ("index", "score_restored"))
    for index, number in zip(*columns, strict=True):
        found.setdefault(index, []).append(number)
    return {index: sum(numbers) / len(numbers) for index, numbers in sorted(found.items())}
