r"""Screening: a first-order estimate of every state's indirect effect, from one backward pass.

Restoring a state moves its activation from :math:`a'` (corrupted run) to :math:`a` (clean run), so to first order the
objective moves by :math:`\langle \partial J / \partial a',\, a - a' \rangle`, summed over denoising steps. One clean
run, one corrupted run and one backward pass through its last K steps give that number for all states at once, where
exact tracing draws a picture for each state. Screening ranks the states; `trace.unet` and `trace.text_encoder` confirm
the best ones. Memory grows with K, since the sites' activations of both runs and the graph of these steps are held.

For the text encoder the gradient is taken at the text features, through the same K steps, and from there through the
encoder to every state.

Source: Syed et al., 2023, https://arxiv.org/abs/2310.10348 (attribution patching, for language models).
Deviations: in a diffusion model a site runs at every step; the estimate is summed over the last K.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from overpaint.model import sites
from overpaint.model.sampling import Drawing, Progress
from overpaint.model.sites import KINDS, Kind, Site
from overpaint.scorers.protocols import Scorer
from overpaint.trace import states
from overpaint.trace.attribution import Attribution, Objective, Run, choose
from overpaint.trace.corruption import Noise, Prompted, corruptions, role_positions
from overpaint.trace.effects import Effects
from overpaint.trace.memory import rows_that_fit
from overpaint.trace.renderer import Renderer, seeds_of
from overpaint.trace.selection import site_columns
from overpaint.trace.states import ROLES
from overpaint.trace.unet_trace import Branches, Source, check_source

__all__ = ["best", "text_encoder", "unet", "with_note"]

Row = dict[str, Any]
Attribute = Callable[[Attribution, Sequence[Run]], Tensor]
_DRAWING = Drawing(batch_size=8)  # the graph of the last steps takes memory for each run of a batch


def unet(
    model: Any,
    probes: Sequence[Prompted],
    *,
    last: int = 5,
    objective: Objective | None = None,
    source: Source = "clean_trajectory",
    branches: Branches = "both",
    kinds: Sequence[Kind] = KINDS,
    noise: Noise = Noise(),
    drawing: Drawing = _DRAWING,
    scorer: Scorer | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Estimate the effect of every site of the UNet.

    Args:
        model: A `TextToImage`; its weights, their `requires_grad` and `.grad` are left as they were.
        probes: Prompts with the concept's words.
        last: Number of last steps that the gradient passes through, K, from 1 to `drawing.steps`.
        objective: `"score"` is the score of the corrupted run's picture, `"latents"` is minus half the squared
            distance of its latents to the clean ones. If `None` the score, where it has a gradient.
        source: Source of the restored activations, as in `trace.unet`.
        branches: Restored in both branches of the guidance, or in the conditional one alone.
        kinds: Kinds of site.
        noise: Number of noise samples for each prompt, and their standard deviation.
        drawing: Steps, guidance, solver and seeds; `batch_size` is the number of runs (prompt, noise, seed) of a
            batch, and `memory` limits activations and the graph of the last steps. A probe with a seed of its own uses
            that instead.
        scorer: Returns scores from pictures and probes; the shipped judge if `None`.
        on_progress: Called with (finished runs, runs, label).

    Returns:
        Effects with one row for each site and run; the column `attribution` is filled.

    Raises:
        ValueError: A probe or a setting is out of range, or `objective="score"` and the scores have no gradient.
    """
    check_source(source, branches)
    traced = [site for site in sites.find_unet(model.unet) if site.kind in kinds]
    modules = [site.module(model) for site in traced]

    def attribute(attribution: Attribution, batch: Sequence[Run]) -> Tensor:
        return attribution.of_unet(modules, batch, source=source, branches=branches)

    def rows_of(run: Run, numbers: Tensor) -> list[Row]:
        modes = {"role": "", "source": source, "branches": branches}
        return [
            {**_row(site, run), **modes, "attribution": float(number)}
            for site, number in zip(traced, numbers, strict=True)
        ]

    settings = {"source": source, "branches": branches, "kinds": list(kinds)}
    return _screen(
        model, probes, traced, attribute, rows_of, ("screen.unet", settings), last=last, objective=objective,
        noise=noise, drawing=drawing, scorer=scorer, on_progress=on_progress,
    )  # fmt: skip


def text_encoder(
    model: Any,
    probes: Sequence[Prompted],
    *,
    last: int = 5,
    objective: Objective | None = None,
    positions: Sequence[str] = ROLES,
    noise: Noise = Noise(),
    drawing: Drawing = _DRAWING,
    scorer: Scorer | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Estimate the effect of every (sublayer, position) state of the text encoder, of both where there are two.

    Args:
        model: As in `unet`, like every parameter that is not explained here.
        probes: Prompts with the concept's words.
        last: Number of last steps that the gradient passes through.
        objective: `"score"`, `"latents"` or `None`.
        positions: Token roles, as in `trace.TextStates`.
        noise: Number of noise samples for each prompt, and their standard deviation.
        drawing: Steps, guidance, solver, seeds and batch.
        scorer: Returns scores from pictures and probes.
        on_progress: Called with (finished runs, runs, label).

    Returns:
        Effects with one row for each state and run; the column `attribution` is filled.

    Raises:
        ValueError: As in `unet`.
    """
    traced = sites.find_texts(model.text_encoders)
    modules = [site.module(model) for site in traced]

    def attribute(attribution: Attribution, batch: Sequence[Run]) -> Tensor:
        return attribution.of_text(modules, batch)

    def rows_of(run: Run, numbers: Tensor) -> list[Row]:
        return [
            {**_row(site, run), "role": role, "position": place, "attribution": float(number[place])}
            for site, number in zip(traced, numbers, strict=True)
            for role, place in role_positions(run[0], positions)
        ]  # fmt: skip

    settings = {"positions": list(positions)}
    return _screen(
        model, probes, traced, attribute, rows_of, ("screen.text_encoder", settings), last=last, objective=objective,
        noise=noise, drawing=drawing, scorer=scorer, on_progress=on_progress,
    )  # fmt: skip


def _screen(
    model: Any,
    probes: Sequence[Prompted],
    traced: Sequence[Site],
    attribute: Attribute,
    rows_of: Callable[[Run, Tensor], list[Row]],
    trace: tuple[str, dict[str, Any]],
    *,
    last: int,
    objective: Objective | None,
    noise: Noise,
    drawing: Drawing,
    scorer: Scorer | None,
    on_progress: Progress | None,
) -> Effects:
    """Return the attributions of all runs, computed by `attribute` and converted to rows by `rows_of`.

    `trace` is the name of the trace and its settings, for the protocol.
    """
    if not traced:
        raise ValueError(f"no sites are left: `kinds` must be among {', '.join(KINDS)}.")
    if not 1 <= last <= drawing.steps:
        raise ValueError(
            f"`last` must be from 1 to {drawing.steps}, the denoising steps, got {last}."
        )
    renderer = Renderer.of(model, replace(drawing, memory=None), scorer=scorer)
    corrupted, sigma = corruptions(model, probes, noise)
    attribution = Attribution(renderer, last, choose(renderer, objective, probes[0]))
    runs = [(c, seed) for c in corrupted for seed in seeds_of(c.probe, drawing.seeds)]
    size = _fitting(attribution, runs[0], drawing, attribute)
    rows: list[Row] = []
    for start in range(0, len(runs), size):
        batch = runs[start : start + size]
        numbers = attribute(attribution, batch)
        rows += [row for r, run in enumerate(batch) for row in rows_of(run, numbers[:, r])]
        if on_progress is not None:
            on_progress(start + len(batch), len(runs), "screening")
    name, settings = trace
    protocol = renderer.protocol(
        name, probes, last=last, objective=attribution.objective, **settings, seeds=list(drawing.seeds),
        noise_samples=noise.samples, sigma=sigma,
    )  # fmt: skip
    return Effects.of(rows, protocol)


def best(effects: Effects, share: float = 0.2) -> tuple[tuple[str, str], ...]:
    """Return the (site, role) states of largest mean attribution, best first.

    Args:
        effects: Result of `unet` or `text_encoder` of this module.
        share: Share of the states to return, above 0 to 1; their number is rounded up.

    Raises:
        ValueError: `share` is out of range, or the effects hold no attributions.
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"`share` must be above 0 and at most 1, got {share!r}: 0.2 returns a fifth."
        )
    means = _means(effects, "attribution")
    if not means:
        raise ValueError(
            "these effects hold no attributions: pass the result of `screening.unet` or `screening.text_encoder`."
        )
    ranked = sorted(means, key=lambda state: -means[state])
    return tuple(ranked[: math.ceil(share * len(ranked) - 1e-9)])


def with_note(exact: Effects, screened: Effects, *, share: float) -> Effects:
    """Return `exact` with a note in its protocol on the screening that chose its states.

    Args:
        exact: Effects of the states that `best` chose.
        screened: The estimates that `best` used.
        share: The share of the states that `best` returned.

    Returns:
        The same table; `protocol["screen"]` holds the share, the numbers of states estimated and drawn, and their rank
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


def _fitting(attribution: Attribution, run: Run, drawing: Drawing, attribute: Attribute) -> int:
    """Return the largest number of runs in a batch that fits into `drawing.memory`.

    Memory depends only on the last steps, so only these are run to measure it.

    Raises:
        ValueError: Not even one run fits.
    """
    if drawing.memory is None:
        return drawing.batch_size
    short = replace(attribution, renderer=replace(attribution.renderer, steps=attribution.last))
    fitting = rows_that_fit(
        lambda rows: attribute(short, [run] * rows), drawing.memory, least=1, label="screening"
    )
    return min(drawing.batch_size, fitting)


def _row(site: Site, run: Run) -> Row:
    corruption, seed = run
    probe = corruption.probe
    return {
        **site_columns(site.name, (site,)), "control": "", "window": "", "head": None, "direction": "restore",
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
