"""Causal tracing of the UNet: clean, corrupted and restored rows share one batch.

At every step each restored row starts from its own latents; a hook at its sites copies the source's
activation into it. No activation is stored, so memory does not grow with the number of steps. The
source is

clean_trajectory  the clean row, with the clean run's latents (the paper)
same_latent       a twin row: the clean prompt on the restored row's own latents (a control)

Layers that run before the first cross-attention read no text. Under `same_latent` restoring them
has exactly no effect; under `clean_trajectory` they act only by leaking the clean latents.

`direction="corrupt"` is the mirror image: the row is clean, and the source the corrupted run.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, sections 3 and 4.
Deviations: the `same_latent` control, single heads, windows of steps and the mirror image. The paper does not state
which branches of the guidance it restores; here both by default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from overpaint.scorers.protocols import Scorer
from overpaint.trace import provenance, resume
from overpaint.trace.batches import equal_chunks, head_columns, on_first
from overpaint.trace.corruption import Corruption, Noise, Prompted, corruptions
from overpaint.trace.effects import Effects
from overpaint.trace.renderer import Direction, Renderer, seeds_of
from overpaint.trace.selection import (
    UNetStates,
    head_numbers,
    named_sites,
    selected,
    site_columns,
)
from overpaint.trace.states import WINDOWS
from overpaint.trace.text_encoder_trace import encode_restored

__all__ = ["Branches", "Intervention", "Source", "check_source", "restore", "unet"]

Source = Literal["clean_trajectory", "same_latent"]
Branches = Literal["both", "cond"]


@dataclass(frozen=True)
class Intervention:
    """Activations that one row copies from its source.

    Attributes:
        sites: Sites whose output is copied.
        head: Number of the only head to copy, before the output projection; `None` for the whole output.
        window: Name in `WINDOWS` of the steps at which it is copied.
        name: Name in the table; the site's name if there is one site.
    """

    sites: tuple[Site, ...]
    head: int | None = None
    window: str = ""
    name: str = ""

    def active(self, step: int, steps: int) -> bool:
        """Return whether the row copies activations at `step`, counted from 0, of `steps` steps."""
        low, high = WINDOWS[self.window]  # some schedulers take one step more than `steps`
        return round(low * steps) <= step and (high == 1 or step < round(high * steps))


def unet(
    model: Any,
    probes: Sequence[Prompted],
    *,
    states: UNetStates = UNetStates(),
    source: Source = "clean_trajectory",
    branches: Branches = "both",
    direction: Direction = "restore",
    noise: Noise = Noise(),
    drawing: Drawing = Drawing(),
    scorer: Scorer | None = None,
    minimum_gap: float = 0.02,
    folder: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Trace the sites of the UNet.

    Args:
        model: A `TextToImage`; its weights and modules are left as they were.
        probes: Prompts with the concept's words.
        states: Kinds, heads, windows of steps, groups or single sites to trace; all sites at every step by default.
        source: Source of the copied activations: `"clean_trajectory"` or `"same_latent"`, explained above.
        branches: Copy in both branches of the guidance (`"both"`), or in the conditional one alone (`"cond"`).
        direction: `"restore"` clean states in the corrupted run, or `"corrupt"` states of the clean run.
        noise: Number of noise samples for each prompt, and their standard deviation.
        drawing: Steps, guidance, solver, seeds and batch. A probe with a seed of its own uses that instead.
        scorer: Returns N scores from pictures (N, 3, H, W) in [0, 1] and N probes; the shipped judge if
            `None`, which reads pictures of 64x64 pixels.
        minimum_gap: Smallest gap between clean and corrupted score; runs with a smaller one have no `recovery`.
        folder: Finished runs are saved there, so that a stopped trace can continue; one process at a time.
        on_progress: Called with (finished runs times 1000, runs times 1000, label); a run is a prompt, noise sample
            and seed.

    Returns:
        Effects with one row for each site, prompt, seed and noise sample.

    Raises:
        ValueError: A probe or a setting is out of range, or no site is left.
        UnsupportedModel: A site's hook does not fire once a step, or text features, latents or scores became NaN.
        OSError: `folder` cannot be written.
    """
    check_source(source, branches)
    renderer = Renderer.of(
        model, drawing, scorer=scorer, direction=direction, minimum_gap=minimum_gap
    )
    corrupted, sigma = corruptions(model, probes, noise)
    traced = [site for site in sites.find_unet(model.unet) if site.kind in states.kinds]
    named = selected(named_sites(traced, states.groups), states.only, lambda entry: entry[0])
    plan = _plan(model, named, states)
    units = {
        f"{c.probe.id}:{c.sample}:{seed}": (c, seed)
        for c in corrupted
        for seed in seeds_of(c.probe, drawing.seeds)
    }
    negative = model.encode([""])
    modes = {"source": source, "branches": branches, "direction": direction}

    def compute(unit: str) -> list[dict[str, Any]]:
        corruption, seed = units[unit]
        before = list(units).index(unit)

        def report(count: int, total: int) -> None:
            if on_progress is not None:
                done = 1000 * before + 1000 * count // total
                label = f"tracing the UNet, {source.replace('_', ' ')}"
                on_progress(done, 1000 * len(units), label)

        embeds = encode_restored(model.text_encoders, corruption, [], clip_skip=model.clip_skip)
        latents = restore(
            renderer, embeds, negative, plan, seed=seed, source=source, branches=branches, on_step=report,
        )  # fmt: skip
        rows = renderer.measured(renderer.scores(latents, corruption.probe), latents)
        return [
            {**_row(corruption, i), "seed": seed, **modes, **m}
            for i, m in zip(plan, rows, strict=True)
        ]

    protocol = renderer.protocol(
        "unet", probes, folder=folder, source=source, branches=branches, kinds=list(states.kinds), heads=states.heads,
        windows=list(states.windows), sites=[name for name, _ in named],
        groups=provenance.group_members(states.groups), only=None if states.only is None else sorted(states.only),
        seeds=list(drawing.seeds), noise_samples=noise.samples, sigma=sigma,
    )  # fmt: skip
    return Effects.of(resume.sweep(folder, protocol, list(units), compute), protocol)


def check_source(source: str, branches: str) -> None:
    """Raise unless `source` and `branches` are known.

    Raises:
        ValueError: One is unknown.
    """
    if source not in ("clean_trajectory", "same_latent"):
        raise ValueError(f"`source` must be 'clean_trajectory' or 'same_latent', got {source!r}.")
    if branches not in ("both", "cond"):
        raise ValueError(f"`branches` must be 'both' or 'cond', got {branches!r}.")


def restore(
    renderer: Renderer,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    plan: Sequence[Intervention],
    *,
    seed: int,
    source: Source = "clean_trajectory",
    branches: Branches = "both",
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoise a clean row, a corrupted row and one row for each intervention, step by step in common batches.

    Args:
        renderer: Model, steps, guidance, direction and batch.
        prompt_embeds: Clean and corrupted text features, shape (2, L, D).
        negative_embeds: Text features of the empty prompt, shape (1, L, D).
        plan: The intervention of each further row.
        seed: Start noise, the same in every row.
        source: `"clean_trajectory"` or `"same_latent"`.
        branches: `"both"` or `"cond"`.
        on_step: Called after each step with the steps done in all batches, and their total.

    Returns:
        Final latents, shape (2 + R, C, h, w): clean, corrupted, and one row for each intervention.

    Raises:
        UnsupportedModel: A site's hook does not fire once a step, or batches disagree on the clean
            row, because of other hooks or a model that is not deterministic.
    """
    twins = source == "same_latent"
    chunks = list(
        equal_chunks(
            list(plan), renderer.rows, rows=partial(_batch_rows, twins=twins), multiple=4, fill=Intervention(())
        )
    )  # fmt: skip
    parts: list[Tensor] = []
    total = len(chunks) * renderer.steps
    for number, (chunk, used) in enumerate(chunks):
        batch = _Batch(renderer, chunk, twins=twins, both=branches == "both")

        def report(step: int, number: int = number) -> None:
            if on_step is not None:
                on_step(min(number * renderer.steps + step, total), total)

        latents = batch.run(prompt_embeds, negative_embeds, seed=seed, on_step=report)
        if parts and not torch.allclose(parts[0][:2], latents[:2], atol=1e-4):
            raise UnsupportedModel(
                "two equal runs of this model differ, so effects cannot be separated from noise: remove "
                "other hooks and use deterministic kernels."
            )
        parts.append(latents[: used + 2] if not parts else latents[2 : used + 2])
    return torch.cat(parts)


class _Batch:
    """Rows of one denoising batch: clean, corrupted, R further ones and, for `same_latent`, R twins.

    A twin has the source's prompt and, at every step, the latents of its row.
    """

    def __init__(
        self, renderer: Renderer, plan: Sequence[Intervention], *, twins: bool, both: bool
    ) -> None:
        self.renderer, self.plan, self.twins, self.both = renderer, plan, twins, both
        self.rows = _batch_rows(len(plan), twins=twins)
        self.step = 0

    def run(
        self,
        prompt_embeds: Tensor,
        negative_embeds: Tensor,
        *,
        seed: int,
        on_step: Callable[[int], None],
    ) -> Tensor:
        """Return the final latents without the twins."""
        count = len(self.plan)
        clean, corrupted = prompt_embeds[:1], prompt_embeds[1:]
        restoring = self.renderer.direction == "restore"
        base, source = (corrupted, clean) if restoring else (clean, corrupted)
        embeds = [clean, corrupted, base.expand(count, -1, -1)]
        embeds += [source.expand(count, -1, -1)] if self.twins else []

        def after(done: int, latents: Tensor) -> Tensor:
            self.step = done
            on_step(done)
            return self._copy_to_twins(latents)

        whole, single = self._copiers()
        with hooks.patch(whole) as calls, hooks.patch_inputs(single) as head_calls:
            latents = self.renderer.denoise(
                seed, self.rows, torch.cat(embeds), negative_embeds, on_step=after
            )
        counts = set(calls.values()) | set(head_calls.values())
        if counts - {self.step}:
            raise UnsupportedModel(
                f"a site's module ran {sorted(counts)} times in {self.step} steps: this "
                "UNet does not run its layers once a step, so it cannot be traced."
            )
        return latents[: 2 + count]

    def _copy_to_twins(self, latents: Tensor) -> Tensor:
        """Return `latents` with those of each row copied to its twin."""
        if not self.twins:
            return latents
        end = 2 + len(self.plan)
        return torch.cat([latents[:end], latents[2:end]])

    def _copiers(self) -> tuple[dict[Module, Any], dict[Module, Any]]:
        """Return two dicts from a module to a function that copies rows: whole outputs, and inputs of single heads."""
        model = self.renderer.model
        whole: dict[Module, list[tuple[int, Intervention, slice]]] = {}
        single: dict[Module, list[tuple[int, Intervention, slice]]] = {}
        for row, intervention in enumerate(self.plan, start=2):
            for site in intervention.sites:
                if intervention.head is None:
                    entry = (row, intervention, slice(None))
                    whole.setdefault(site.module(model), []).append(entry)
                else:
                    linear, columns = head_columns(model, site, intervention.head)
                    single.setdefault(linear, []).append((row, intervention, columns))
        return (
            {module: self._copier(entries) for module, entries in whole.items()},
            {module: on_first(self._copier(entries)) for module, entries in single.items()},
        )

    def _copier(self, entries: list[tuple[int, Intervention, slice]]) -> Callable[[Tensor], Tensor]:
        restoring = self.renderer.direction == "restore"
        # The guided batch holds the unconditional rows first, then as many conditional ones.
        guided = self.renderer.guidance_scale != 1
        offsets = [0] if not guided else [0, self.rows] if self.both else [self.rows]
        fixed, twin = int(not restoring), len(self.plan) if self.twins else 0

        def copy(output: Tensor) -> Tensor:
            changed = output.clone()
            for row, intervention, columns in entries:
                if intervention.active(self.step, self.renderer.steps):
                    into = [offset + row for offset in offsets]
                    of = [offset + (row + twin if twin else fixed) for offset in offsets]
                    changed[into, ..., columns] = output[of, ..., columns]
            return changed

        return copy


def _batch_rows(interventions: int, *, twins: bool) -> int:
    """Return the number of rows of a batch: clean, corrupted, restored and their twins."""
    return 2 + interventions * (2 if twins else 1)


def _plan(
    model: Any, named: Sequence[tuple[str, tuple[Site, ...]]], states: UNetStates
) -> list[Intervention]:
    """Return one intervention for each site or group, head and window."""
    return [
        Intervention(members, head, window, name)
        for name, members in named
        for head in head_numbers(model, members, states.heads)
        for window in states.windows
    ]


def _row(corruption: Corruption, intervention: Intervention) -> dict[str, Any]:
    probe = corruption.probe
    return {
        **site_columns(intervention.name, intervention.sites), "role": "", "control": "",
        "window": intervention.window, "head": intervention.head, "probe": probe.id,
        "attribute": probe.kind, "prompt": probe.prompt, "concept": probe.concept,
        "noise": corruption.sample,
    }  # fmt: skip
