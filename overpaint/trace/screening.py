r"""Screening: a first-order estimate of every state's indirect effect, from one pass back.

Restoring a state moves its activation from :math:`a'` (corrupted run) to :math:`a` (clean run), so to first order the
objective moves by :math:`\langle \partial J / \partial a',\, a - a' \rangle`, summed over denoising steps. One clean
run, one corrupted run and one pass back through its last K steps give that number for all states at once, where exact
tracing draws a picture a state. It ranks states; what it ranks high is for `trace.unet` and `trace.text_encoder` to
confirm. Memory grows with K: the sites' activations of both runs and the graph of these steps are held.

For the text encoder the gradient is taken at the text features, through the same K steps, and from there through the
encoder to every state.

Source: Syed et al., 2023, https://arxiv.org/abs/2310.10348 (attribution patching, for language models).
Deviations: in a diffusion model a site runs at every step; the estimate is summed over the last K.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from overpaint.model import sites
from overpaint.model.sites import KINDS, Kind, Site
from overpaint.trace import memory as memory_of
from overpaint.trace import states
from overpaint.trace.attribution import Attribution, Objective, Run, choose
from overpaint.trace.corruption import ROLES, Prompted, corruptions, places
from overpaint.trace.effects import Effects
from overpaint.trace.renderer import (
    Renderer,
    Scorer,
    about,
    check_seeds,
    check_source,
    seeds_of,
)
from overpaint.trace.unet_trace import Branches, Source

__all__ = ["best", "noted", "text_encoder", "unet"]


def unet(
    model: Any,
    probes: Sequence[Prompted],
    *,
    last: int = 5,
    objective: Objective | None = None,
    source: Source = "clean_trajectory",
    branches: Branches = "both",
    kinds: Sequence[Kind] = KINDS,
    seeds: Sequence[int] = (0,),
    noise_samples: int = 1,
    sigma: float | str = "3std",
    steps: int = 10,
    guidance_scale: float | None = None,
    solver: str = "dpm",
    score: Scorer | None = None,
    batch_size: int = 8,
    memory: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Estimate the effect of every site of the UNet.

    Args:
        model: A `TextToImage`; its weights, their `requires_grad` and `.grad` are left as they were.
        probes: Prompts with the concept's words.
        last: Through how many of the last steps the gradient goes, K, from 1 to `steps`.
        objective: `"score"` is the score of the corrupted run's picture, `"latents"` minus half the squared distance of
            its latents to the clean ones. If `None` the score, where it has a gradient.
        source: Where restored activations would come from, as in `trace.unet`.
        branches: Restored in both branches of the guidance, or in the conditional one alone.
        kinds: Which kinds of site.
        seeds: Start noise of the pictures; a probe that comes with a seed uses that instead.
        noise_samples: Corruptions a prompt.
        sigma: Their standard deviation, or `"3std"`: three times that of the concepts' embeddings.
        steps: Denoising steps.
        guidance_scale: The model's own if `None`.
        solver: `"own"` is the model's scheduler, `"ddim"`, or `"dpm"`.
        score: From pictures and probes to scores; the shipped judge if `None`.
        batch_size: Runs (prompt, noise, seed) at a time.
        memory: MiB for activations and the graph of the last steps; lowers `batch_size` to what fits.
        on_progress: Called with the runs done and the runs in all.

    Returns:
        Effects with a row a site and run, whose column `attribution` is filled.

    Raises:
        ValueError: A probe or a setting is out of range, or `objective="score"` and the score has no gradient.
    """
    found = [site for site in sites.find_unet(model.unet) if site.kind in kinds]
    _check(found, last, steps, seeds, source, branches)
    renderer = Renderer.of(
        model, score=score, steps=steps, guidance_scale=guidance_scale, solver_name=solver, direction="restore",
        minimum_gap=0.0, batch_size=batch_size, memory=None,
    )  # fmt: skip
    made, scale = corruptions(model, probes, noise_samples=noise_samples, sigma=sigma)
    attribution = Attribution(renderer, last, choose(renderer, objective, probes[0]))
    modules = [site.module(model) for site in found]
    rows: list[dict[str, Any]] = []
    runs = [(c, seed) for c in made for seed in seeds_of(c.probe, seeds)]
    size = _fitting(
        attribution, runs[0], memory, batch_size,
        lambda a, batch: a.of_unet(modules, batch, source=source, branches=branches),
    )  # fmt: skip
    for batch in _batches(runs, size, on_progress):
        numbers = attribution.of_unet(modules, batch, source=source, branches=branches)
        rows += [
            {**_row(site, run), "role": "", "source": source, "branches": branches, "attribution": float(numbers[s, r])}
            for r, run in enumerate(batch)
            for s, site in enumerate(found)
        ]  # fmt: skip
    protocol = renderer.protocol(
        "screen.unet", probes, last=last, objective=attribution.objective, source=source, branches=branches,
        kinds=list(kinds), seeds=list(seeds), noise_samples=noise_samples, sigma=scale,
    )  # fmt: skip
    return Effects.of(rows, protocol)


def text_encoder(
    model: Any,
    probes: Sequence[Prompted],
    *,
    last: int = 5,
    objective: Objective | None = None,
    positions: Sequence[str] = ROLES,
    seeds: Sequence[int] = (0,),
    noise_samples: int = 1,
    sigma: float | str = "3std",
    steps: int = 10,
    guidance_scale: float | None = None,
    solver: str = "dpm",
    score: Scorer | None = None,
    batch_size: int = 8,
    memory: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Estimate the effect of every (sublayer, position) state of the text encoder, of both where there are two.

    Args:
        model: As in `unet`, like all that is not explained here.
        probes: Prompts with the concept's words.
        last: Through how many of the last steps the gradient goes.
        objective: `"score"`, `"latents"` or `None`.
        positions: Token roles, as in `trace.text_encoder`.
        seeds: Start noise.
        noise_samples: Corruptions a prompt.
        sigma: Their standard deviation, or a factor such as `"3std"`.
        steps: Denoising steps.
        guidance_scale: The model's own if `None`.
        solver: `"own"`, `"ddim"` or `"dpm"`.
        score: From pictures and probes to scores.
        batch_size: Runs at a time.
        memory: MiB for activations and the graph.
        on_progress: Called with the runs done and the runs in all.

    Returns:
        Effects with a row a state and run, whose column `attribution` is filled.

    Raises:
        ValueError: As in `unet`.
    """
    found = sites.find_texts(model.text_encoders)
    _check(found, last, steps, seeds, "clean_trajectory", "both")
    renderer = Renderer.of(
        model, score=score, steps=steps, guidance_scale=guidance_scale, solver_name=solver, direction="restore",
        minimum_gap=0.0, batch_size=batch_size, memory=None,
    )  # fmt: skip
    made, scale = corruptions(model, probes, noise_samples=noise_samples, sigma=sigma)
    attribution = Attribution(renderer, last, choose(renderer, objective, probes[0]))
    modules = [site.module(model) for site in found]
    rows: list[dict[str, Any]] = []
    runs = [(c, seed) for c in made for seed in seeds_of(c.probe, seeds)]
    size = _fitting(
        attribution, runs[0], memory, batch_size, lambda a, batch: a.of_text(modules, batch)
    )
    for batch in _batches(runs, size, on_progress):
        numbers = attribution.of_text(modules, batch)
        rows += [
            {**_row(site, run), "role": role, "position": place, "attribution": float(numbers[s, r, place])}
            for r, run in enumerate(batch)
            for s, site in enumerate(found)
            for role, place in places(run[0], positions)
        ]  # fmt: skip
    protocol = renderer.protocol(
        "screen.text_encoder", probes, last=last, objective=attribution.objective, positions=list(positions),
        seeds=list(seeds), noise_samples=noise_samples, sigma=scale,
    )  # fmt: skip
    return Effects.of(rows, protocol)


def best(effects: Effects, share: float = 0.2) -> tuple[tuple[str, str], ...]:
    """Return the (site, role) states of largest mean attribution, best first.

    Args:
        effects: What `unet` or `text_encoder` of this file returned.
        share: Of the states, above 0 to 1; their number is rounded up.

    Raises:
        ValueError: `share` is out of range, or the effects hold no attributions.
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"`share` must be above 0 and at most 1, got {share!r}: 0.2 keeps a fifth."
        )
    means = _means(effects, "attribution")
    if not means:
        raise ValueError(
            "these effects hold no attributions: pass what `screen.unet` or `screen.text_encoder` returned."
        )
    ranked = sorted(means, key=lambda state: -means[state])
    return tuple(ranked[: math.ceil(share * len(ranked) - 1e-9)])


def noted(exact: Effects, screened: Effects, *, share: float) -> Effects:
    """Return `exact` with a note in its protocol that only a share of the states was drawn, and how well chosen.

    Args:
        exact: Effects of the states that `best` chose.
        screened: The estimates it chose by.
        share: The share asked for.

    Returns:
        The same table; `protocol["screen"]` holds the share, the states estimated and drawn, and their rank
        correlation (`Effects.agreement`), `None` where fewer than three states were drawn.
    """
    drawn = _means(exact, exact.value())
    correlation = math.nan
    if len(drawn) >= 3:
        correlation = screened.agreement(exact, value="attribution", other_value=exact.value()).mean
    note = {
        "share": share,
        "states": len(_means(screened, "attribution")),
        "drawn": len(drawn),
        "spearman": None if math.isnan(correlation) else correlation,
        "last": screened.protocol.get("last"),
    }
    return Effects(exact.table, {**exact.protocol, "screen": note})


def _check(
    found: Sequence[Site],
    last: int,
    steps: int,
    seeds: Sequence[int],
    source: str,
    branches: str,
) -> None:
    if not found:
        raise ValueError(f"no sites are left: `kinds` must be among {', '.join(KINDS)}.")
    check_source(source, branches)
    if not 1 <= last <= max(steps, 1):
        raise ValueError(f"`last` must be from 1 to {steps}, the denoising steps, got {last}.")
    check_seeds(seeds)


def _fitting(
    attribution: Attribution,
    run: Run,
    memory: float | None,
    batch_size: int,
    attribute: Callable[[Attribution, Sequence[Run]], object],
) -> int:
    """Return how many runs fit; what they keep depends on the last steps alone, so only these are tried.

    Raises:
        ValueError: Not even one does.
    """
    if memory is None:
        return batch_size
    short = replace(attribution, renderer=replace(attribution.renderer, steps=attribution.last))
    fitting = memory_of.rows_that_fit(
        lambda rows: attribute(short, [run] * rows), memory, least=1, what="screening"
    )
    return min(batch_size, fitting)


def _batches(
    runs: Sequence[Run], size: int, on_progress: Callable[[int, int], None] | None
) -> Iterator[Sequence[Run]]:
    """Yield parts of `runs`, and report each when the next is asked for."""
    for start in range(0, len(runs), size):
        yield runs[start : start + size]
        if on_progress is not None:
            on_progress(min(start + size, len(runs)), len(runs))


def _row(site: Site, run: Run) -> dict[str, Any]:
    corruption, seed = run
    probe = corruption.probe
    return {
        **about(site.name, (site,)), "control": "", "window": "", "head": None, "direction": "restore",
        "probe": probe.id, "attribute": probe.kind, "prompt": probe.prompt, "concept": probe.concept,
        "noise": corruption.sample, "seed": seed,
    }  # fmt: skip


def _means(effects: Effects, value: str) -> dict[tuple[str, str], float]:
    """Return the mean of whole states at all steps, in the model itself, by (site, role)."""
    return {
        (state.site, state.role): states.average(pairs)
        for state, pairs in states.cells(effects.table, value).items()
        if state.head is None and not state.window
    }
