"""Direct effect: the change of the picture if a few cross-attention layers read another prompt.

A window of m consecutive cross-attention layers reads a target prompt, the others the original one;
nothing is corrupted and nothing restored. All M - m + 1 windows of a prompt share a denoising
batch: row 0 has the original prompt, row 1 the target everywhere, and at the layers of its window a
hook feeds row r the text features of row 1. Only rows of the conditional branch are changed.

If the concept is to be removed (style, objects), the best window is the one whose pictures show least of
it; if a fact is to be changed, the one whose pictures show most of the target.

Source: Basu et al., 2024 (LocoGen), https://arxiv.org/abs/2405.01008. Its text has M - m + 1
windows, its pseudocode one less: all are run here.
Deviations: every window has its full width (the authors' code narrows the last ones to one layer);
features are replaced where a layer reads them, so that K and V are computed with the layer's present weights.
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
from overpaint.model.sampling import Drawing, Progress
from overpaint.model.sites import Site
from overpaint.model.token_spans import find_span
from overpaint.probes import Probe
from overpaint.probes.text import cut_words
from overpaint.scorers.protocols import Scorer
from overpaint.trace import provenance
from overpaint.trace.batches import equal_chunks
from overpaint.trace.corruption import Prompted, check_probes
from overpaint.trace.effects import Effects
from overpaint.trace.renderer import Renderer, distance_recovery, score_recovery, seeds_of
from overpaint.trace.resume import sweep
from overpaint.trace.selection import site_columns

__all__ = ["Pick", "Target", "draw", "pick_window", "prompt_swap", "smallest_window"]

Pick = Literal["min", "max"]
Target = str | Callable[[Any], Prompted]


def prompt_swap(
    model: Any,
    probes: Sequence[Prompted],
    *,
    target: Target,
    window: int = 2,
    pick: Pick = "min",
    drawing: Drawing = Drawing(),
    scorer: Scorer | None = None,
    minimum_gap: float = 0.02,
    folder: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Measure the direct effect of each window of cross-attention layers that reads another prompt.

    Args:
        model: A `TextToImage`; its weights and modules are left as they were.
        probes: Prompts with the concept's words.
        target: Words that replace the concept's, or a function that returns the probe of the target prompt from a
            probe, for prompts whose other words change too.
        window: Number of consecutive layers, m.
        pick: `"min"` scores how much the pictures show of the probe's concept, which is to be removed
            (style, objects); `"max"` how much they show of the target's, which is to be shown (facts).
        drawing: Steps, guidance, solver, seeds and batch; the start noise is the same in all rows of a prompt. A probe
            with a seed of its own uses that instead.
        scorer: Returns N scores from pictures (N, 3, H, W) in [0, 1] and N probes; the shipped judge if
            `None`, which reads pictures of 64x64 pixels.
        minimum_gap: Smallest change of the score by the target in all layers; prompts with a smaller one have no
            `recovery`.
        folder: Finished prompts are saved there, so that a stopped run can continue; one process at a time.
        on_progress: Called with (finished runs times 1000, runs times 1000, label); a run is a prompt and seed.

    Returns:
        Effects with one row for each window, prompt and seed; `site` is the window's first layer, `direction`
        is `"corrupt"`, because the clean run is changed. `score_clean` is the score of the original prompt,
        `score_corrupted` that of the target prompt in all layers, `score_restored` that of the window.
        `direct_effect` is the change of the score by the window in the direction of `pick`, which is
        score_clean - score_restored for `"min"`; `recovery` is its share of the change by the target in all layers, and
        `latent_recovery` the share of the distance to its latents.

    Raises:
        ValueError: A window outside the model, a concept that is not in its prompt exactly once, or another
            setting out of range.
        UnsupportedModel: A cross-attention layer does not read its text once a step.
    """
    layers = [site for site in sites.find_unet(model.unet) if site.kind == "cross_attn"]
    _check(probes, window, pick, len(layers))
    pairs = [(probe, _target_probe(model, probe, target)) for probe in probes]
    renderer = Renderer.of(
        model, drawing, scorer=scorer, direction="corrupt", minimum_gap=minimum_gap
    )
    windows = [layers[i : i + window] for i in range(len(layers) - window + 1)]
    runs = {
        f"{probe.id}:{seed}": (probe, other, seed)
        for probe, other in pairs
        for seed in seeds_of(probe, drawing.seeds)
    }
    negative = model.encode([""])

    def compute(run: str) -> list[dict[str, Any]]:
        probe, other, seed = runs[run]
        before = list(runs).index(run)

        def report(share: float) -> None:
            if on_progress is not None:
                on_progress(1000 * before + int(1000 * share), 1000 * len(runs), "swapping prompts")

        texts = torch.cat([model.encode([each.prompt]) for each in (probe, other)])
        latents = draw(renderer, texts, negative, windows, seed=seed, on_step=report)
        scores = renderer.scores(latents, probe if pick == "min" else other)
        rows = _rows(probe, [w[0] for w in windows], latents, scores, pick, minimum_gap)
        return [{**row, "seed": seed} for row in rows]

    protocol = renderer.protocol(
        "swap", probes, folder=folder, window=window, pick=pick, cross_attention=[site.path for site in layers],
        seeds=list(drawing.seeds), targets=[other.prompt for _, other in pairs],
        asked_of_targets=provenance.probe_fields([other for _, other in pairs]),
    )  # fmt: skip
    return Effects.of(sweep(folder, protocol, list(runs), compute), protocol)


def pick_window(effects: Effects) -> tuple[Site, ...]:
    """Return the layers of the best window: least mean score for `"min"`, greatest for `"max"`.

    Args:
        effects: Result of `prompt_swap`.

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
    drawing: Drawing = Drawing(),
    scorer: Scorer | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Return the prompt swap with the fewest layers whose best window meets `threshold`.

    Args:
        model: As in `prompt_swap`, like every parameter that is not explained here.
        probes: Prompts with the concept's words.
        target: Words of the target prompt, or a function.
        threshold: Mean score that the best window must not exceed (`"min"`) or must reach (`"max"`).
        pick: `"min"` or `"max"`.
        drawing: Steps, guidance, solver, seeds and batch.
        scorer: Returns scores from pictures and probes.
        on_progress: As in `prompt_swap`, from zero again for each width.

    Returns:
        The effects of the smallest width; `protocol["window"]` is the width, `pick_window` returns the layers.

    Raises:
        ValueError: Even all layers together do not meet the threshold, or as in `prompt_swap`.
    """
    count = sum(site.kind == "cross_attn" for site in sites.find_unet(model.unet))
    best, sign = float("nan"), 1 if pick == "max" else -1
    for window in range(1, count + 1):
        effects = prompt_swap(
            model, probes, target=target, window=window, pick=pick, drawing=drawing, scorer=scorer,
            on_progress=on_progress,
        )  # fmt: skip
        best = max(_means(effects).values(), key=lambda mean: sign * mean)
        if sign * best >= sign * threshold:
            return effects
    side = "at least" if pick == "min" else "at most"
    raise ValueError(
        f"no window meets the threshold of {threshold}: with the target in all {count} layers the "
        f"mean score is {best:.3f}. Give a threshold of {side} that, or another target."
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
    """Denoise the original prompt, the target prompt, and one row for each window in common batches.

    Args:
        renderer: Model, steps, guidance and batch.
        prompt_embeds: Text features of original and target, shape (2, L, D).
        negative_embeds: Text features of the empty prompt, shape (1, L, D).
        windows: For each further row, the cross-attention sites that read the target.
        seed: Start noise, the same in every row.
        on_step: Called after each step of a batch with the finished share.

    Returns:
        Final latents, shape (2 + W, C, h, w): original, target, windows.

    Raises:
        UnsupportedModel: A cross-attention layer does not read its text once a step.
    """
    parts: list[Tensor] = []
    original, target = prompt_embeds[:1], prompt_embeds[1:]
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

        texts = torch.cat([original, target, original.expand(len(chosen), -1, -1)])
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
    """Return for each layer a function that copies row 1's text to the rows whose window holds the layer.

    `first` is the first conditional row: the guided batch holds all unconditional rows before it.
    """
    rows_by_layer: dict[Module, list[int]] = {}
    for row, window in enumerate(windows, start=first + 2):
        for site in window:
            rows_by_layer.setdefault(site.module(model), []).append(row)

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

    return {module: partial(feed, rows) for module, rows in rows_by_layer.items()}


def _check(probes: Sequence[Prompted], window: int, pick: str, layers: int) -> None:
    check_probes(probes)
    if not 1 <= window <= layers:
        raise ValueError(
            f"`window` must be from 1 to {layers}, the cross-attention layers of this model, got {window}."
        )
    if pick not in ("min", "max"):
        raise ValueError(
            f"`pick` must be 'min' (least of the concept) or 'max' (most of the target), got {pick!r}."
        )


def _target_probe(model: Any, probe: Prompted, target: Target) -> Prompted:
    """Return the probe of the target prompt; its label is cut from the target as the probe's label from its concept."""
    if not isinstance(target, str):
        if not callable(target):
            raise TypeError(
                f"`target` must be one text or a function of a probe, got {target!r}: call `prompt_swap` for each "
                "target."
            )
        return target(probe)
    if not target.strip():
        raise ValueError("`target` is empty: name the words to show instead, as in 'noto style'.")
    find_span(
        model.tokenizer, probe.prompt, probe.concept
    )  # raises unless it is there exactly once
    words = r"\s+".join(re.escape(word) for word in probe.concept.split())
    prompt = re.sub(rf"(?<!\w){words}(?!\w)", lambda _: target, probe.prompt, flags=re.IGNORECASE)
    before, label, after = probe.concept.partition(getattr(probe, "label", probe.concept))
    cut = cut_words(model.tokenizer, prompt)
    rest = prompt.removesuffix(cut)
    if cut and target.strip().lower() not in rest.lower():
        raise ValueError(
            f"the target {target!r} in the prompt {prompt!r} is cut off by the limit of "
            f"{model.tokenizer.model_max_length} tokens: shorten the prompt, or put the concept first."
        )
    other = target.removeprefix(before).removesuffix(after) if label else target
    return Probe(probe.id, probe.kind, prompt, target, other.strip() or target)


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
    shares = distance_recovery(latents, direction="corrupt")
    return [
        {
            **site_columns(site.name, (site,)), "role": "", "control": "", "window": "",
            "branches": "cond", "direction": "corrupt",
            "probe": probe.id, "attribute": probe.kind, "prompt": probe.prompt,
            "concept": probe.concept, "noise": 0,
            "score_clean": original, "score_corrupted": everywhere, "score_restored": number,
            "direct_effect": sign * (number - original),
            "recovery": score_recovery(sign * everywhere, sign * original, sign * number, gap=gap),
            "latent_recovery": share,
        }
        for site, number, share in zip(starts, swapped, shares, strict=True)
    ]  # fmt: skip


def _means(effects: Effects) -> dict[int, float]:
    """Return the mean score of each window by the index of its first layer."""
    if effects.protocol.get("trace") != "swap":
        raise ValueError(
            f"these effects come from {effects.protocol.get('trace', 'elsewhere')!r}: pass the result of "
            "`trace.prompt_swap`."
        )
    scores: dict[int, list[float]] = {}
    columns = (effects.table[name].to_pylist() for name in ("index", "score_restored"))
    for index, number in zip(*columns, strict=True):
        scores.setdefault(index, []).append(number)
    return {index: sum(numbers) / len(numbers) for index, numbers in sorted(scores.items())}
