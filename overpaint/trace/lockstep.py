"""Causal tracing of the UNet: which layer carries the attribute?

One denoising batch holds the clean row, the corrupted row and one row a restored site. At every
step a hook copies the source's activation into row r at site r; nothing is stored, so memory does
not grow with the steps.

The source decides what an effect means. `clean_trajectory` (the paper) copies from the clean run,
whose latents differ: also a site that the prompt never reached hands over the clean picture.
`same_latent` (the control) copies from the clean prompt evaluated on the restored row's own
latents, so that only what the prompt says is handed over. Show both.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, sections 3 and 4.
Deviations: the `same_latent` control; which guidance branches the paper restores is not stated,
both by default.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from overpaint import features, hooks, sites
from overpaint.errors import UnsupportedModel
from overpaint.sample import denoise
from overpaint.sites import KINDS, Kind, Site
from overpaint.trace.corrupt import Corruption, Prompted, corruptions
from overpaint.trace.effects import Effects, recovery
from overpaint.trace.encoder import encode_restored
from overpaint.trace.runs import Scorer, check_settings, equal_chunks, recovered, scorer_name

__all__ = ["Branches", "Source", "restore", "unet"]

Source = Literal["clean_trajectory", "same_latent"]
Branches = Literal["both", "cond"]


def unet(
    model: Any,
    probes: Sequence[Prompted],
    *,
    source: Source = "clean_trajectory",
    branches: Branches = "both",
    kinds: Sequence[Kind] = KINDS,
    chunk: int = 8,
    seeds: Sequence[int] = (0,),
    noise_samples: int = 1,
    sigma: float | str = "3std",
    steps: int = 20,
    guidance_scale: float | None = None,
    score: Scorer | None = None,
    minimum_gap: float = 0.02,
    on_progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Trace every layer of the UNet.

    Args:
        model: A `TextToImage`; its weights and modules are left as they were.
        probes: Prompts with the concept's words.
        source: Where restored activations come from, see above.
        branches: Restore in both branches of the guidance, or in the conditional one alone.
        kinds: Which kinds of site.
        chunk: Sites a batch, about; more is faster and takes more memory.
        seeds: Start noise of the pictures.
        noise_samples: Corruptions a prompt.
        sigma: Their standard deviation, or `"3std"`: three times that of the concepts' embeddings.
        steps: Denoising steps.
        guidance_scale: The model's own if `None`.
        score: From pictures (N, 3, H, W) in [0, 1] and N probes to N scores; the shipped judge if
            `None`, which takes pictures of 64x64 pixels.
        minimum_gap: Runs whose clean score is not this much above the corrupted one have no `recovery`.
        on_progress: Called with the denoising steps done and the steps in all.

    Returns:
        Effects with a row a site, prompt, seed and noise sample.

    Raises:
        ValueError: A probe or a setting is out of range.
        UnsupportedModel: A site's hook does not fire once a step.
    """
    check_settings(seeds=seeds, steps=steps, rows=chunk)
    _check_modes(source, branches, kinds)
    made, scale = corruptions(model, probes, noise_samples=noise_samples, sigma=sigma)
    found = [site for site in sites.find_unet(model.unet) if site.kind in kinds]
    scorer = score or features.load().score
    strength = model.guidance_scale if guidance_scale is None else guidance_scale
    negative = model.encode([""])
    rows: list[dict[str, Any]] = []
    runs = [(corruption, seed) for corruption in made for seed in seeds]

    def tick(run: int, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(run * total + done, len(runs) * total)

    for run, (corruption, seed) in enumerate(runs):
        pair = encode_restored(model.text_encoder, corruption, [])
        latents = restore(
            model, pair, negative, [[site] for site in found], seed=seed, steps=steps,
            guidance_scale=strength, source=source, branches=branches, chunk=chunk, on_step=partial(tick, run),
        )  # fmt: skip
        scores = _scores(model, latents, corruption.probe, scorer, chunk + 2)
        rows += [
            {**row, "seed": seed, "source": source, "branches": branches}
            for row in _rows(corruption, found, latents, scores, minimum_gap)
        ]
    protocol = {
        **model.protocol(steps=steps, guidance_scale=strength),
        "trace": "unet",
        "source": source,
        "branches": branches,
        "seeds": list(seeds),
        "noise_samples": noise_samples,
        "sigma": scale,
        "scorer": scorer_name(scorer),
        "minimum_gap": minimum_gap,
        "probes": len(probes),
    }
    return Effects.of(rows, protocol)


def restore(
    model: Any,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    restored: Sequence[Sequence[Site]],
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    source: Source = "clean_trajectory",
    branches: Branches = "both",
    chunk: int = 8,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoise clean, corrupted and restored rows in lockstep.

    Args:
        model: A `TextToImage`.
        prompt_embeds: Clean and corrupted text features, shape (2, L, D).
        negative_embeds: Text features of the empty prompt, shape (1, L, D).
        restored: For each further row, the sites to copy from the source.
        seed: Start noise, the same in every row.
        steps: Denoising steps.
        guidance_scale: Weight of the prompt.
        source: `"clean_trajectory"` or `"same_latent"`.
        branches: `"both"` or `"cond"`.
        chunk: Restored rows a batch, up to three more where the kernels ask for it.
        on_step: Called after each step with the steps done in all batches, and their sum.

    Returns:
        Final latents, shape (2 + R, C, h, w): clean, corrupted, restored.

    Raises:
        UnsupportedModel: A site's hook does not fire once a step, or batches disagree on the clean
            row: a hook of someone else, or a model that is not deterministic.
    """
    parts: list[Tensor] = []
    twins = source == "same_latent"
    chunks = list(
        equal_chunks(list(restored), chunk, rows=partial(_size, twins=twins), multiple=4, fill=())
    )
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, max(done, len(chunks) * steps))

    for sites_of_rows, used in chunks:
        batch = _Batch(len(sites_of_rows), twins=twins, both=branches == "both")
        latents = batch.run(
            model, prompt_embeds, negative_embeds, sites_of_rows,
            seed=seed, steps=steps, guidance_scale=guidance_scale, on_step=tick,
        )  # fmt: skip
        if parts and not torch.allclose(parts[0][:2], latents[:2], atol=1e-4):
            raise UnsupportedModel(
                "two equal runs of this model differ, so effects cannot be told from noise: remove "
                "other hooks and use deterministic kernels."
            )
        parts.append(latents[: used + 2] if not parts else latents[2 : used + 2])
    return torch.cat(parts)


class _Batch:
    """Rows of one denoising batch: clean, corrupted, R restored and, for `same_latent`, R twins.

    A twin has the clean prompt and, at every step, the latents of its restored row.
    """

    def __init__(self, restored: int, *, twins: bool, both: bool) -> None:
        self.restored, self.twins, self.both = restored, twins, both
        self.rows = _size(restored, twins=twins)

    def run(
        self,
        model: Any,
        prompt_embeds: Tensor,
        negative_embeds: Tensor,
        sites_of_rows: Sequence[Sequence[Site]],
        *,
        seed: int,
        steps: int,
        guidance_scale: float,
        on_step: Callable[[], None],
    ) -> Tensor:
        """Return the final latents without the twins."""
        clean, corrupted = prompt_embeds[:1], prompt_embeds[1:]
        embeds = [clean, corrupted.expand(1 + self.restored, -1, -1)]
        embeds += [clean.expand(self.restored, -1, -1)] if self.twins else []
        taken = 0

        def after(done: int, latents: Tensor) -> Tensor:
            nonlocal taken
            taken = done
            on_step()
            return self._level(latents)

        with hooks.patch(self._copiers(model, sites_of_rows, guided=guidance_scale != 1)) as calls:
            latents = denoise(
                model,
                model.initial_latents([seed]).repeat(self.rows, 1, 1, 1),
                torch.cat(embeds),
                negative_embeds,
                steps=steps,
                guidance_scale=guidance_scale,
                on_step=after,
                generators=[Generator().manual_seed(seed + 1) for _ in range(self.rows)],
            )
        if any(count != taken for count in calls.values()):
            raise UnsupportedModel(
                f"a site's module ran {sorted(set(calls.values()))} times in {taken} steps: this "
                "UNet does not run its layers once a step, so it cannot be traced."
            )
        return latents[: 2 + self.restored]

    def _level(self, latents: Tensor) -> Tensor:
        """Give each twin the latents of its restored row."""
        if not self.twins:
            return latents
        return torch.cat([latents[: 2 + self.restored], latents[2 : 2 + self.restored]])

    def _copiers(
        self, model: Any, sites_of_rows: Sequence[Sequence[Site]], *, guided: bool
    ) -> dict[torch.nn.Module, Callable[[Tensor], Tensor]]:
        """Return for each module a function that copies source rows into restored rows."""
        wanted: dict[torch.nn.Module, list[int]] = {}
        for row, chosen in enumerate(sites_of_rows, start=2):
            for site in chosen:
                wanted.setdefault(site.module(model), []).append(row)
        # The guided batch holds the unconditional rows first, then as many conditional ones.
        offsets = [0] if not guided else [0, self.rows] if self.both else [self.rows]

        def copier(rows: list[int]) -> Callable[[Tensor], Tensor]:
            into = [offset + row for offset in offsets for row in rows]
            of = [offset + self._source(row) for offset in offsets for row in rows]

            def copy(output: Tensor) -> Tensor:
                changed = output.clone()
                changed[into] = output[of]
                return changed

            return copy

        return {module: copier(rows) for module, rows in wanted.items()}

    def _source(self, row: int) -> int:
        return row + self.restored if self.twins else 0


def _size(restored: int, *, twins: bool) -> int:
    """Return the rows of a batch: clean, corrupted, restored and their twins."""
    return 2 + restored * (2 if twins else 1)


def _check_modes(source: str, branches: str, kinds: Sequence[str]) -> None:
    if source not in ("clean_trajectory", "same_latent"):
        raise ValueError(f"`source` must be 'clean_trajectory' or 'same_latent', got {source!r}.")
    if branches not in ("both", "cond"):
        raise ValueError(f"`branches` must be 'both' or 'cond', got {branches!r}.")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"`kinds` must be among {', '.join(KINDS)}, got {list(kinds)!r}.")


def _scores(model: Any, latents: Tensor, probe: Prompted, score: Scorer, size: int) -> list[float]:
    numbers: list[float] = []
    for part in latents.split(size):
        numbers += [float(n) for n in score(model.decode(part).cpu(), [probe] * len(part))]
    return numbers


def _rows(
    corruption: Corruption, found: Sequence[Site], latents: Tensor, scores: list[float], gap: float
) -> list[dict[str, Any]]:
    probe = corruption.probe
    clean, corrupted, *restored = scores
    return [
        {
            "site": site.name, "part": site.part, "kind": site.kind, "index": site.index,
            "path": site.path, "role": "", "control": "", "probe": probe.id,
            "attribute": probe.kind, "prompt": probe.prompt, "concept": probe.concept,
            "noise": corruption.sample, "score_clean": clean, "score_corrupted": corrupted,
            "score_restored": number, "indirect_effect": number - corrupted,
            "recovery": recovery(clean, corrupted, number, gap=gap), "latent_recovery": latent,
        }
        for site, number, latent in zip(found, restored, recovered(latents), strict=True)
    ]  # fmt: skip
