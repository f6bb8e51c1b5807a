"""Causal tracing of the UNet in lockstep: clean, corrupted and restored rows ride in one batch.

At every step each restored row starts from its own latents; a hook at its sites copies the source's
activation into it. No activation is stored, so memory does not grow with the number of steps. The
source is

clean_trajectory  the clean row, with the clean run's latents (the paper)
same_latent       a twin row: the clean prompt on the restored row's own latents (a control)

Layers that run before the first cross-attention see no text. Under `same_latent` restoring them
does exactly nothing; under `clean_trajectory` they act only by leaking the clean latents.

`direction="corrupt"` is the mirror image: the row is clean, and the source the corrupted run.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, sections 3 and 4.
Deviations: the `same_latent` control, single heads, windows of steps and the mirror image; which
guidance branches the paper restores is not stated, both by default.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.model.sites import KINDS, Kind, Site
from overpaint.trace import provenance, resume
from overpaint.trace.corruption import Corruption, Prompted, corruptions
from overpaint.trace.effects import Effects
from overpaint.trace.renderer import (
    Direction,
    Renderer,
    Scorer,
    about,
    check_seeds,
    check_source,
    equal_chunks,
    head_columns,
    head_numbers,
    named_sites,
    on_first,
    seeds_of,
    selected,
)
from overpaint.trace.states import WINDOWS
from overpaint.trace.text_encoder_trace import encode_restored

__all__ = ["WINDOWS", "Branches", "Intervention", "Source", "restore", "unet"]

Source = Literal["clean_trajectory", "same_latent"]
Branches = Literal["both", "cond"]


@dataclass(frozen=True)
class Intervention:
    """What one row takes from its source.

    Attributes:
        sites: Whose output.
        head: Of attention sites this head alone, before the output projection; `None` for the whole output.
        window: At which steps, a name in `WINDOWS`.
        name: What the table calls it; the site's name if there is one site.
    """

    sites: tuple[Site, ...]
    head: int | None = None
    window: str = ""
    name: str = ""

    def active(self, step: int, steps: int) -> bool:
        """Say whether it acts at step 0 to `steps` - 1."""
        low, high = WINDOWS[self.window]  # some schedulers take a step more than asked
        return round(low * steps) <= step and (high == 1 or step < round(high * steps))


def unet(
    model: Any,
    probes: Sequence[Prompted],
    *,
    source: Source = "clean_trajectory",
    branches: Branches = "both",
    direction: Direction = "restore",
    kinds: Sequence[Kind] = KINDS,
    heads: bool = False,
    windows: Sequence[str] = ("",),
    groups: Mapping[str, Sequence[Site]] | None = None,
    only: Collection[str] | None = None,
    seeds: Sequence[int] = (0,),
    noise_samples: int = 1,
    sigma: float | str = "3std",
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
    """Trace every layer of the UNet.

    Args:
        model: A `TextToImage`; its weights and modules are left as they were.
        probes: Prompts with the concept's words.
        source: Where copied activations come from, see above.
        branches: Copy in both branches of the guidance, or in the conditional one alone.
        direction: `"restore"` clean states in the corrupted run, or `"corrupt"` those of the clean run.
        kinds: Which kinds of site.
        heads: Each head of the attention sites by itself, besides whole sites.
        windows: When to copy, each by itself: `""` at every step, `"early"`, `"middle"`, `"late"` a third of them.
        groups: Several sites together, by a name of yours; instead of single sites.
        only: Names of the sites to trace; all of `kinds` if `None`.
        seeds: Start noise of the pictures; a probe that comes with a seed uses that instead.
        noise_samples: Corruptions a prompt.
        sigma: Their standard deviation, or `"3std"`: three times that of the concepts' embeddings.
        steps: Denoising steps.
        guidance_scale: The model's own if `None`.
        solver: `"dpm"`, a multistep solver whose ten steps do for fifty, `"ddim"`, or `"own"`, the model's scheduler.
        score: From pictures (N, 3, H, W) in [0, 1] and N probes to N scores; the shipped judge if
            `None`, which takes pictures of 64x64 pixels.
        minimum_gap: Runs whose clean score is not this much above the corrupted one have no `recovery`.
        batch_size: Rows of a batch, at most.
        memory: MiB for activations; lowers `batch_size` to what fits.
        folder: Keeps finished runs, so that a sweep that was stopped goes on; one process at a time.
        on_progress: Called with the runs (prompt, noise, seed) done, in thousandths, and their number times 1000.

    Returns:
        Effects with a row a site, prompt, seed and noise sample.

    Raises:
        ValueError: A probe or a setting is out of range, or no site is left.
        UnsupportedModel: A site's hook does not fire once a step, or text features, latents or scores became NaN.
        OSError: `folder` cannot be written.
    """
    _check_modes(source, branches, kinds, windows, seeds)
    renderer = Renderer.of(
        model, score=score, steps=steps, guidance_scale=guidance_scale, solver_name=solver, direction=direction,
        minimum_gap=minimum_gap, batch_size=batch_size, memory=memory,
    )  # fmt: skip
    made, scale = corruptions(model, probes, noise_samples=noise_samples, sigma=sigma)
    found = [site for site in sites.find_unet(model.unet) if site.kind in kinds]
    named = selected(named_sites(found, groups), only, lambda entry: entry[0])
    plan = [
        Intervention(s, h, w, n)
        for n, s in named
        for h in head_numbers(model, s, heads)
        for w in windows
    ]
    units = {
        f"{c.probe.id}:{c.sample}:{seed}": (c, seed)
        for c in made
        for seed in seeds_of(c.probe, seeds)
    }
    negative = model.encode([""])

    def compute(unit: str) -> list[dict[str, Any]]:
        corruption, seed = units[unit]
        before = list(units).index(unit)

        def tick(count: int, total: int) -> None:
            if on_progress is not None:
                on_progress(1000 * before + 1000 * count // total, 1000 * len(units))

        pair = encode_restored(model.text_encoders, corruption, [])
        latents = restore(
            renderer,
            pair,
            negative,
            plan,
            seed=seed,
            source=source,
            branches=branches,
            on_step=tick,
        )
        rows = renderer.measured(renderer.scores(latents, corruption.probe), latents)
        asked = {"seed": seed, "source": source, "branches": branches, "direction": direction}
        return [{**_row(corruption, i), **asked, **m} for i, m in zip(plan, rows, strict=True)]

    protocol = renderer.protocol(
        "unet", probes, folder=folder, source=source, branches=branches, kinds=list(kinds), heads=heads,
        windows=list(windows), sites=[name for name, _ in named], groups=provenance.members(groups),
        only=None if only is None else sorted(only), seeds=list(seeds), noise_samples=noise_samples, sigma=scale,
    )  # fmt: skip
    rows = resume.sweep(folder, protocol, list(units), compute)
    return Effects.of(rows, protocol)


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
    """Denoise clean, corrupted and one further row an intervention in lockstep.

    Args:
        renderer: Model, steps, guidance, direction and batch.
        prompt_embeds: Clean and corrupted text features, shape (2, L, D).
        negative_embeds: Text features of the empty prompt, shape (1, L, D).
        plan: What each further row takes from its source.
        seed: Start noise, the same in every row.
        source: `"clean_trajectory"` or `"same_latent"`.
        branches: `"both"` or `"cond"`.
        on_step: Called after each step with the steps done in all batches, and their sum.

    Returns:
        Final latents, shape (2 + R, C, h, w): clean, corrupted, one an intervention.

    Raises:
        UnsupportedModel: A site's hook does not fire once a step, or batches disagree on the clean
            row: a hook of someone else, or a model that is not deterministic.
    """
    twins = source == "same_latent"
    chunks = list(
        equal_chunks(
            list(plan), renderer.rows, rows=partial(_size, twins=twins), multiple=4, fill=Intervention(())
        )
    )  # fmt: skip
    parts: list[Tensor] = []
    for number, (chunk, used) in enumerate(chunks):
        batch = _Batch(renderer, chunk, twins=twins, both=branches == "both")

        def tick(step: int, number: int = number) -> None:
            if on_step is not None:
                on_step(
                    min(number * renderer.steps + step, len(chunks) * renderer.steps),
                    len(chunks) * renderer.steps,
                )

        latents = batch.run(prompt_embeds, negative_embeds, seed=seed, on_step=tick)
        if parts and not torch.allclose(parts[0][:2], latents[:2], atol=1e-4):
            raise UnsupportedModel(
                "two equal runs of this model differ, so effects cannot be told from noise: remove "
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
        self.rows = _size(len(plan), twins=twins)
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
            return self._level(latents)

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

    def _level(self, latents: Tensor) -> Tensor:
        """Give each twin the latents of its row."""
        if not self.twins:
            return latents
        past = 2 + len(self.plan)
        return torch.cat([latents[:past], latents[2:past]])

    def _copiers(self) -> tuple[dict[Module, Any], dict[Module, Any]]:
        """Return functions that copy source rows into rows: of modules' outputs, and of heads' inputs."""
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


def _size(restored: int, *, twins: bool) -> int:
    """Return the rows of a batch: clean, corrupted, restored and their twins."""
    return 2 + restored * (2 if twins else 1)


def _check_modes(
    source: str, branches: str, kinds: Sequence[str], windows: Sequence[str], seeds: Sequence[int]
) -> None:
    check_source(source, branches)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"`kinds` must be among {', '.join(KINDS)}, got {list(kinds)!r}.")
    if not windows or any(window not in WINDOWS for window in windows):
        raise ValueError(
            f"`windows` must be among {', '.join(map(repr, WINDOWS))}, got {list(windows)!r}."
        )
    check_seeds(seeds)


def _row(corruption: Corruption, intervention: Intervention) -> dict[str, Any]:
    probe = corruption.probe
    return {
        **about(intervention.name, intervention.sites), "role": "", "control": "",
        "window": intervention.window, "head": intervention.head, "probe": probe.id,
        "attribute": probe.kind, "prompt": probe.prompt, "concept": probe.concept,
        "noise": corruption.sample,
    }  # fmt: skip
