"""Causal tracing of the text encoder: which sublayer, at which token, carries the attribute?

The concept's embeddings are corrupted; then one state at a time (the output of one sublayer at one
position) is put back as it was in the clean pass. All of a prompt's states ride in one batch: row 0
is clean, row 1 corrupted, and a hook copies row 0's state into row r. The resulting text features
go through an ordinary generation with equal start noise and a clean empty prompt.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, section 3.
Deviations: two controls the paper lacks. An encoder of equal architecture and untrained weights
shows what the architecture alone does; noise on other words shows what is not about the concept.
Both are measured on text features, which cost no picture.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module

from overpaint import features, hooks, sites
from overpaint.sample import denoise
from overpaint.sites import Site
from overpaint.trace.corrupt import ROLES, Corruption, Prompted, corruptions, noisy, places
from overpaint.trace.effects import Effects, recovery
from overpaint.trace.runs import Scorer, check_settings, equal_chunks, recovered, scorer_name

__all__ = ["encode_restored", "text_encoder", "untrained"]

Restoration = Sequence[tuple[Module, Sequence[int]]]
State = tuple[Site, str, int]


def text_encoder(
    model: Any,
    probes: Sequence[Prompted],
    *,
    seeds: Sequence[int] = (0,),
    noise_samples: int = 1,
    sigma: float | str = "3std",
    steps: int = 20,
    guidance_scale: float | None = None,
    positions: Sequence[str] = ROLES,
    score: Scorer | None = None,
    generate: bool = True,
    control: bool = True,
    batch_size: int = 32,
    minimum_gap: float = 0.02,
    on_progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Trace every (sublayer, position) state of the text encoder.

    Args:
        model: A `TextToImage`; its weights and modules are left as they were.
        probes: Prompts with the concept's words.
        seeds: Start noise of the pictures.
        noise_samples: Corruptions a prompt.
        sigma: Their standard deviation, or `"3std"`: three times that of the concepts' embeddings.
        steps: Denoising steps.
        guidance_scale: The model's own if `None`.
        positions: Token roles to restore at: `subject` (all of the concept's tokens but the last),
            `last_subject`, `after` (the next token, if the prompt goes on), `eos`, `pad`.
        score: From pictures (N, 3, H, W) in [0, 1] and N probes to N scores; the shipped judge if
            `None`, which takes pictures of 64x64 pixels.
        generate: Draw and score pictures; else only distances of text features are measured.
        control: Measure text features also in an untrained encoder and with other words corrupted.
        batch_size: Pictures at a time.
        minimum_gap: Runs whose clean score is not this much above the corrupted one have no `recovery`.
        on_progress: Called with the states done and the states in all.

    Returns:
        Effects with a row a state, prompt, seed and noise sample.

    Raises:
        ValueError: A probe or a setting is out of range.
    """
    check_settings(seeds=seeds, steps=steps, rows=batch_size)
    made, scale = corruptions(model, probes, noise_samples=noise_samples, sigma=sigma)
    found = sites.find_text(model.text_encoder)
    scorer = (score or features.load().score) if generate else None
    strength = model.guidance_scale if guidance_scale is None else guidance_scale
    draw = _Draw(model, scorer, steps, strength, batch_size, minimum_gap)
    other = untrained(model.text_encoder) if control else None
    total = sum(len(found) * len(places(c, positions)) for c in made)
    rows: list[dict[str, Any]] = []
    done = 0
    for corruption in made:
        states = [(site, *place) for site in found for place in places(corruption, positions)]
        embeds = _encode_states(model.text_encoder, corruption, states)
        measured = _rows(corruption, states, embeds, control="")
        rows += [r for seed in seeds for r in draw.scored(corruption, measured, embeds, seed)]
        if other is not None:
            rows += _controls(model.text_encoder, other, corruption, positions)
        done += len(states)
        if on_progress is not None:
            on_progress(done, total)
    protocol = {
        **model.protocol(steps=steps, guidance_scale=strength),
        "trace": "text_encoder",
        "seeds": list(seeds),
        "noise_samples": noise_samples,
        "sigma": scale,
        "scorer": scorer_name(scorer),
        "minimum_gap": minimum_gap,
        "probes": len(probes),
    }
    return Effects.of(rows, protocol)


@torch.no_grad()
def encode_restored(
    encoder: Any, corruption: Corruption, restorations: Sequence[Restoration], *, rows: int = 64
) -> Tensor:
    """Encode one prompt clean, corrupted, and corrupted with states restored.

    Args:
        encoder: A `CLIPTextModel`.
        corruption: Prompt and noise.
        restorations: For each further row, the modules and positions to copy from the clean row.
        rows: Restored rows at a time; every batch has a clean and a corrupted row of its own.

    Returns:
        Text features, shape (2 + R, L, D): clean, corrupted, restored.
    """
    parts: list[Tensor] = []
    chunks = equal_chunks(list(restorations), rows, rows=lambda n: n + 2, multiple=8, fill=())
    for chunk, used in chunks:
        ids = corruption.ids.to(encoder.device).expand(len(chunk) + 2, -1)
        with noisy(encoder, corruption, first=1), hooks.patch(_copiers(chunk)):
            embeds = encoder(ids)[0]
        parts.append(embeds[: used + 2] if not parts else embeds[2 : used + 2])
    return torch.cat(parts)


def untrained(encoder: Any, *, seed: int = 1) -> Any:
    """Return an encoder of the same architecture with freshly drawn weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(encoder)(encoder.config)
    return fresh.to(encoder.device, encoder.dtype).eval().requires_grad_(False)


def _copiers(restorations: Sequence[Restoration]) -> dict[Module, Callable[[Tensor], Tensor]]:
    """Return for each module a function that copies the clean row's states into restored rows."""
    wanted: dict[Module, list[tuple[int, list[int]]]] = {}
    for row, restoration in enumerate(restorations, start=2):
        for module, positions in restoration:
            wanted.setdefault(module, []).append((row, list(positions)))

    def copier(copies: list[tuple[int, list[int]]]) -> Callable[[Tensor], Tensor]:
        def copy(output: Tensor) -> Tensor:
            changed = output.clone()
            for row, positions in copies:
                changed[row, positions] = output[0, positions]
            return changed

        return copy

    return {module: copier(copies) for module, copies in wanted.items()}


def _encode_states(encoder: Any, corruption: Corruption, states: Sequence[State]) -> Tensor:
    restorations = [[(encoder.get_submodule(s.path), [position])] for s, _, position in states]
    return encode_restored(encoder, corruption, restorations)


def _rows(
    corruption: Corruption, states: Sequence[State], embeds: Tensor, *, control: str
) -> list[dict[str, Any]]:
    """Return a row a state with the recovery of the text features."""
    everywhere = recovered(embeds)
    pads = recovered(embeds[:, corruption.eos :])
    probe = corruption.probe
    return [
        {
            "site": site.name, "part": site.part, "kind": site.kind, "index": site.index,
            "path": site.path, "role": role, "position": position, "control": control,
            "probe": probe.id, "attribute": probe.kind, "prompt": probe.prompt,
            "concept": probe.concept, "noise": corruption.sample,
            "embed_recovery": everywhere[i], "embed_recovery_pads": pads[i],
        }
        for i, (site, role, position) in enumerate(states)
    ]  # fmt: skip


def _controls(
    encoder: Any, other: Any, corruption: Corruption, positions: Sequence[str]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    runs = (("untrained", other, corruption), ("other span", encoder, corruption.elsewhere()))
    for name, module, corrupted in runs:
        if corrupted is None:
            continue
        found = sites.find_text(module)
        states = [(site, *place) for site in found for place in places(corrupted, positions)]
        embeds = _encode_states(module, corrupted, states)
        rows += _rows(corrupted, states, embeds, control=name)
    return rows


class _Draw:
    """Draws and scores pictures of text features; equal features are drawn once."""

    def __init__(
        self, model: Any, score: Scorer | None, steps: int, guidance: float, batch: int, gap: float
    ) -> None:
        self.model, self.score = model, score
        self.steps, self.guidance, self.batch, self.gap = steps, guidance, batch, gap
        self.negative = model.encode([""])
        self._known: dict[tuple[str, int, bytes], tuple[float, Tensor]] = {}

    def scored(
        self, corruption: Corruption, rows: list[dict[str, Any]], embeds: Tensor, seed: int
    ) -> list[dict[str, Any]]:
        """Return `rows` with the scores of the pictures of `embeds` from `seed`."""
        if self.score is None:
            return [{**row, "seed": seed} for row in rows]
        results = self._pictures(corruption.probe, embeds, seed)
        scores = [number for number, _ in results]
        latents = recovered(torch.stack([latent for _, latent in results]))
        clean, corrupted, *restored = scores
        return [
            {
                **row,
                "seed": seed,
                "score_clean": clean,
                "score_corrupted": corrupted,
                "score_restored": number,
                "indirect_effect": number - corrupted,
                "recovery": recovery(clean, corrupted, number, gap=self.gap),
                "latent_recovery": latent,
            }
            for row, number, latent in zip(rows, restored, latents, strict=True)
        ]

    def _pictures(self, probe: Prompted, embeds: Tensor, seed: int) -> list[tuple[float, Tensor]]:
        """Return score and final latents of each row."""
        keys = [
            (probe.id, seed, row.double().cpu().contiguous().numpy().tobytes()) for row in embeds
        ]
        self._known = {k: v for k, v in self._known.items() if k[0] == probe.id}
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._known}
        new = sorted(first.items(), key=lambda item: item[1])
        for chunk, used in equal_chunks(new, self.batch) if new else ():
            chosen = embeds[[i for _, i in chunk]]
            latents = denoise(
                self.model,
                self.model.initial_latents([seed] * len(chunk)),
                chosen,
                self.negative,
                steps=self.steps,
                guidance_scale=self.guidance,
                generators=[Generator().manual_seed(seed + 1) for _ in chunk],
            )[:used]
            assert self.score is not None
            scores = self.score(self.model.decode(latents).cpu(), [probe] * used)
            for (key, _), number, latent in zip(chunk[:used], scores, latents.cpu(), strict=True):
                self._known[key] = float(number), latent
        return [self._known[key] for key in keys]
