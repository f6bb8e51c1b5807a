"""Causal tracing of the text encoder: which sublayer, at which token, carries the attribute?

The concept's embeddings are corrupted; then one state at a time (the output of one sublayer at one
position) is put back as it was in the clean pass. All of a prompt's states ride in one batch: row 0
is clean, row 1 corrupted, and a hook copies row 0's state into row r. The resulting text features
go through an ordinary generation with equal start noise and a clean empty prompt; equal features are
drawn once. `direction="corrupt"` is the mirror image: one corrupted state in the clean pass.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, section 3.
Deviations: two controls the paper lacks. An encoder of equal architecture and untrained weights
shows what the architecture alone does; noise on other words shows what is not about the concept.
The untrained encoder gets the same draws, as strong relative to its own embeddings. The first is
measured on text features, which cost no picture; the second also on pictures if asked.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.model import hooks, sites, text_features
from overpaint.model.sites import Site
from overpaint.trace import provenance, resume
from overpaint.trace.corruption import (
    ROLES,
    Corruption,
    Prompted,
    corruptions,
    noisy,
    places,
)
from overpaint.trace.effects import Effects
from overpaint.trace.renderer import (
    Direction,
    Renderer,
    Scorer,
    about,
    check_seeds,
    equal_chunks,
    finite,
    head_columns,
    head_numbers,
    named_sites,
    on_first,
    recovered,
    seeds_of,
    selected,
)

__all__ = ["CONTROLS", "encode_restored", "text_encoder", "untrained"]

CONTROLS = ("untrained", "other span")
# A module, the positions to copy, and, where only some columns of its input are copied (a head), which.
Copy = tuple[Module, Sequence[int]] | tuple[Module, Sequence[int], slice]
Restoration = Sequence[Copy]


@dataclass(frozen=True)
class State:
    """One state to copy: sites (one, or a group) at one position, whole or a single head."""

    name: str
    sites: tuple[Site, ...]
    role: str
    position: int
    head: int | None = None


def text_encoder(
    model: Any,
    probes: Sequence[Prompted],
    *,
    direction: Direction = "restore",
    positions: Sequence[str] = ROLES,
    heads: bool = False,
    groups: Mapping[str, Sequence[Site]] | None = None,
    only: Collection[tuple[str, str]] | None = None,
    generate: bool = True,
    control: bool = True,
    draw_control: bool = False,
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
    """Trace every (sublayer, position) state of the text encoder, of both where there are two.

    Args:
        model: A `TextToImage`; its weights and modules are left as they were.
        probes: Prompts with the concept's words.
        direction: `"restore"` clean states in the corrupted pass, or `"corrupt"` those of the clean pass.
        positions: Token roles to copy at: `subject` (all of the concept's tokens but the last),
            `last_subject`, `after` (the next token, if the prompt goes on), `eos`, `pad`.
        heads: Each head of the attention sublayers by itself, besides whole sublayers.
        groups: Several sites together, by a name of yours; instead of single sites.
        only: (site, role) of the states to trace; all if `None`.
        generate: Draw and score pictures; else only distances of text features are measured.
        control: Measure text features also in an untrained encoder and with other words corrupted.
        draw_control: Draw pictures for the corrupted other words too, which doubles the work.
        seeds: Start noise of the pictures; a probe that comes with a seed uses that instead.
        noise_samples: Corruptions a prompt.
        sigma: Their standard deviation, or `"3std"`: three times that of the concepts' embeddings.
        steps: Denoising steps.
        guidance_scale: The model's own if `None`.
        solver: `"dpm"`, a multistep solver whose ten steps do for fifty, `"ddim"`, or `"own"`, the model's scheduler.
        score: From pictures (N, 3, H, W) in [0, 1] and N probes to N scores; the shipped judge if
            `None`, which takes pictures of 64x64 pixels.
        minimum_gap: Runs whose clean score is not this much above the corrupted one have no `recovery`.
        batch_size: Pictures at a time, at most.
        memory: MiB for activations; lowers `batch_size` to what fits.
        folder: Keeps finished prompts, so that a sweep that was stopped goes on; one process at a time.
        on_progress: Called with the prompts done, in thousandths, and their number times 1000.

    Returns:
        Effects with a row a state, prompt, seed and noise sample.

    Raises:
        ValueError: A probe or a setting is out of range, or no state is left.
        UnsupportedModel: Text features, latents or scores became NaN.
        OSError: `folder` cannot be written.
    """
    check_seeds(seeds)
    renderer = Renderer.of(
        model, score=score, steps=steps, guidance_scale=guidance_scale, solver_name=solver, direction=direction,
        minimum_gap=minimum_gap, batch_size=batch_size, memory=memory, draw=generate,
    )  # fmt: skip
    made, scale = corruptions(model, probes, noise_samples=noise_samples, sigma=sigma)
    found = sites.find_texts(model.text_encoders)
    named = named_sites(found, groups)
    states_of = partial(_states, named=named, positions=positions, heads=heads, only=only)
    selected([s for c in made for s in states_of(model.text_encoders, c)], None, lambda s: s)
    fresh = [untrained(encoder) for encoder in model.text_encoders] if control else None
    twins, fresh_scale = _twins(model, fresh, made, noise_samples=noise_samples, sigma=sigma)
    units = {
        p.id: [pair for pair in zip(made, twins, strict=True) if pair[0].probe.id == p.id]
        for p in probes
    }
    negative = model.encode([""])
    text_rows = 64 if memory is None else renderer.rows
    drawn_passes = ("", "other span") if draw_control else ("",)

    def compute(unit: str) -> list[dict[str, Any]]:
        before = list(units).index(unit)

        def tick(share: float) -> None:
            if on_progress is not None:
                on_progress(round(1000 * (before + share)), 1000 * len(units))

        own = seeds_of(units[unit][0][0].probe, seeds)
        turns = noise_samples * len(own) * len(drawn_passes)
        pictures, rows = _Pictures(renderer, negative, tick, turns), []
        for corruption, twin in units[unit]:
            for name, encoders, corrupted in _passes(model.text_encoders, fresh, corruption, twin):
                states = states_of(encoders, corrupted)
                if not states:
                    continue
                embeds = _encode_states(encoders, corrupted, states, direction, text_rows)
                measured = _rows(corrupted, states, embeds, control=name, direction=direction)
                drawn = generate and name in drawn_passes
                for seed in own if drawn else (None,):
                    scored = pictures.measure(corrupted, embeds, seed)
                    rows += [
                        {**r, "seed": seed, **s} for r, s in zip(measured, scored, strict=True)
                    ]
        tick(1.0)
        return rows

    protocol = renderer.protocol(
        "text_encoder", probes, folder=folder, positions=list(positions), heads=heads,
        sites=[name for name, _ in named], groups=provenance.members(groups),
        only=None if only is None else sorted(map(list, only)), control=control, draw_control=draw_control,
        seeds=list(seeds), noise_samples=noise_samples, sigma=scale, sigma_untrained=fresh_scale,
    )  # fmt: skip
    return Effects.of(resume.sweep(folder, protocol, list(units), compute), protocol)


@torch.no_grad()
def encode_restored(
    encoders: Module | Sequence[Module],
    corruption: Corruption,
    restorations: Sequence[Restoration],
    *,
    rows: int = 64,
    direction: Direction = "restore",
) -> Tensor:
    """Encode one prompt clean, corrupted, and with states copied from one to the other.

    Args:
        encoders: The model's text encoders, or its only one.
        corruption: Prompt and noise.
        restorations: For each further row, the modules and positions to copy; with a slice as third entry those
            columns of the module's input.
        rows: Rows at a time; every batch has a clean and a corrupted row of its own.
        direction: `"restore"` copies clean states into the corrupted pass, `"corrupt"` the other way.

    Returns:
        Text features, shape (2 + R, L, D): clean, corrupted, one a restoration.

    Raises:
        UnsupportedModel: They are not finite.
    """
    towers = (encoders,) if isinstance(encoders, Module) else tuple(encoders)
    device = next(towers[0].parameters()).device
    parts: list[Tensor] = []
    chunks = equal_chunks(list(restorations), rows, rows=lambda n: n + 2, multiple=8, fill=())
    past = None if direction == "restore" else 2
    for chunk, used in chunks:
        ids = [i.to(device).expand(len(chunk) + 2, -1) for i, _ in corruption.parts]
        whole, single = _copiers(chunk, source=int(direction == "corrupt"))
        with ExitStack() as stack:
            for index, tower in enumerate(towers):
                stack.enter_context(noisy(tower, corruption, first=1, past=past, part=index))
            stack.enter_context(hooks.patch(whole))
            stack.enter_context(hooks.patch_inputs(single))
            embeds = text_features(towers, ids)
        parts.append(embeds[: used + 2] if not parts else embeds[2 : used + 2])
    cure = "load it in float32, or lower `sigma`"
    return finite(torch.cat(parts), "text features", cure, f" in {corruption.probe.prompt!r}")


def untrained(encoder: Any, *, seed: int = 1) -> Any:
    """Return an encoder of the same architecture with freshly drawn weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(encoder)(encoder.config)
    return fresh.to(encoder.device, encoder.dtype).eval().requires_grad_(False)


def _copiers(
    restorations: Sequence[Restoration], *, source: int
) -> tuple[dict[Module, Any], dict[Module, Any]]:
    """Return functions that copy the source row's states into rows: of modules' outputs, and of heads' inputs."""
    whole: dict[Module, list[tuple[int, list[int], slice]]] = {}
    single: dict[Module, list[tuple[int, list[int], slice]]] = {}
    for row, restoration in enumerate(restorations, start=2):
        for module, positions, *columns in restoration:
            entry = (row, list(positions), columns[0] if columns else slice(None))
            (single if columns else whole).setdefault(module, []).append(entry)

    def copier(copies: list[tuple[int, list[int], slice]]) -> Callable[[Tensor], Tensor]:
        def copy(output: Tensor) -> Tensor:
            changed = output.clone()
            for row, positions, columns in copies:
                changed[row, positions, columns] = output[source, positions, columns]
            return changed

        return copy

    return (
        {module: copier(copies) for module, copies in whole.items()},
        {module: on_first(copier(copies)) for module, copies in single.items()},
    )


def _passes(
    encoders: Sequence[Module],
    fresh: Sequence[Module] | None,
    corruption: Corruption,
    twin: Corruption | None,
) -> list[tuple[str, Sequence[Module], Corruption]]:
    """Return the run itself and its controls: name, encoders, what is corrupted."""
    passes = [("", encoders, corruption)]
    if fresh is not None and twin is not None:
        other = corruption.elsewhere()
        passes += [("untrained", fresh, twin)]
        passes += [] if other is None else [("other span", encoders, other)]
    return passes


def _twins(
    model: Any,
    fresh: Sequence[Module] | None,
    made: Sequence[Corruption],
    *,
    noise_samples: int,
    sigma: float | str,
) -> tuple[Sequence[Corruption | None], float | None]:
    """Return for each corruption the one of the untrained encoder, and the first encoder's noise.

    A factor such as `"3std"` is of that encoder's own embeddings, so that relative to them the noise is as strong as in
    the trained one, and its draws are the same.
    """
    if fresh is None:
        return [None] * len(made), None
    bare = SimpleNamespace(
        tokenizer=model.tokenizer, tokenizers=model.tokenizers, text_encoders=fresh
    )
    probes = [corruption.probe for corruption in made[::noise_samples]]
    return corruptions(bare, probes, noise_samples=noise_samples, sigma=sigma)


def _states(
    encoders: Sequence[Module],
    corruption: Corruption,
    *,
    named: Sequence[tuple[str, tuple[Site, ...]]],
    positions: Sequence[str],
    heads: bool,
    only: Collection[tuple[str, str]] | None,
) -> list[State]:
    model = _parts(encoders)
    states = [
        State(name, chosen, role, position, head)
        for name, chosen in named
        for head in head_numbers(model, chosen, heads)
        for role, position in places(corruption, positions)
    ]
    return [state for state in states if only is None or (state.name, state.role) in only]


def _encode_states(
    encoders: Sequence[Module],
    corruption: Corruption,
    states: Sequence[State],
    direction: Direction,
    rows: int,
) -> Tensor:
    model = _parts(encoders)

    def copies(state: State) -> list[Copy]:
        if state.head is None:
            return [(site.module(model), [state.position]) for site in state.sites]
        linear, columns = head_columns(model, state.sites[0], state.head)
        return [(linear, [state.position], columns)]

    plan = [copies(state) for state in states]
    return encode_restored(encoders, corruption, plan, rows=rows, direction=direction)


def _parts(encoders: Sequence[Module]) -> Any:
    """Return the encoders as `Site.module` looks them up in a model."""
    return SimpleNamespace(text_encoder=encoders[0], text_encoders=tuple(encoders), unet=None)


def _rows(
    corruption: Corruption,
    states: Sequence[State],
    embeds: Tensor,
    *,
    control: str,
    direction: Direction,
) -> list[dict[str, Any]]:
    """Return a row a state with the recovery of the text features."""
    everywhere = recovered(embeds, direction=direction)
    pads = recovered(embeds[:, corruption.eos :], direction=direction)
    probe = corruption.probe
    return [
        {
            **about(state.name, state.sites), "role": state.role, "position": state.position,
            "head": state.head, "window": "", "direction": direction, "control": control,
            "probe": probe.id, "attribute": probe.kind, "prompt": probe.prompt,
            "concept": probe.concept, "noise": corruption.sample,
            "embed_recovery": everywhere[i], "embed_recovery_pads": pads[i],
        }
        for i, state in enumerate(states)
    ]  # fmt: skip


class _Pictures:
    """Draws and scores the pictures of one prompt's text features; equal features are drawn once."""

    def __init__(
        self, renderer: Renderer, negative: Tensor, on_share: Callable[[float], None], passes: int
    ) -> None:
        self.renderer, self.negative, self.on_share = renderer, negative, on_share
        self.passes, self.done = passes, 0
        self._known: dict[tuple[int, str], tuple[float, Tensor]] = {}

    def measure(
        self, corruption: Corruption, embeds: Tensor, seed: int | None
    ) -> list[dict[str, Any]]:
        """Return the columns of every row of `embeds` from the third on; empty ones without a seed."""
        if seed is None:
            return [{}] * (len(embeds) - 2)
        keys = [(seed, _digest(row)) for row in embeds]
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._known}
        new = sorted(first.items(), key=lambda item: item[1])
        chunks = list(equal_chunks(new, self.renderer.rows)) if new else []
        for number, (chunk, used) in enumerate(chunks):
            chosen = embeds[[i for _, i in chunk]]
            latents = self.renderer.denoise(
                seed, len(chunk), chosen, self.negative,
                on_step=lambda step, _, before=number: self._tell(before * self.renderer.steps + step, len(chunks)),
            )[:used]  # fmt: skip
            scores = self.renderer.scores(latents, corruption.probe)
            for (key, _), number_, latent in zip(chunk[:used], scores, latents.cpu(), strict=True):
                self._known[key] = number_, latent
        self.done += 1
        found = [self._known[key] for key in keys]
        latents = torch.stack([latent for _, latent in found])
        return self.renderer.measured([score for score, _ in found], latents)

    def _tell(self, steps: int, chunks: int) -> None:
        share = min(1.0, steps / (chunks * self.renderer.steps))
        self.on_share((self.done + share) / self.passes)


def _digest(row: Tensor) -> str:
    return hashlib.sha256(row.double().cpu().contiguous().numpy().tobytes()).hexdigest()
