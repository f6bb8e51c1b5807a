"""Causal tracing of the text encoder: the effect of each sublayer at each token.

The concept's embeddings are corrupted; then one state at a time (the output of one sublayer at one
position) is restored to its value in the clean pass. All states of a prompt share a batch: row 0
is clean, row 1 corrupted, and a hook copies row 0's state into row r. The resulting text features
go through an ordinary generation with equal start noise and a clean empty prompt; equal features are
drawn once. `direction="corrupt"` is the mirror image: one corrupted state in the clean pass.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, section 3.
Deviations: two controls the paper lacks. An encoder of equal architecture and untrained weights
shows the effect of the architecture alone; noise on other words shows effects that do not depend on the concept.
The untrained encoder gets the same random draws, scaled to its own embeddings. The controls are
measured on text features, without pictures; the second also on pictures with `controls="pictures"`.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.model import hooks, sites, text_features
from overpaint.model.sampling import Drawing, Progress
from overpaint.model.sites import Site
from overpaint.scorers.protocols import Scorer
from overpaint.trace import provenance, resume
from overpaint.trace.batches import equal_chunks, head_columns, on_first
from overpaint.trace.corruption import (
    Corruption,
    Noise,
    Prompted,
    corruptions,
    noisy,
    role_positions,
)
from overpaint.trace.effects import Effects
from overpaint.trace.renderer import Direction, Renderer, distance_recovery, finite, seeds_of
from overpaint.trace.selection import (
    TextStates,
    head_numbers,
    named_sites,
    selected,
    site_columns,
)

__all__ = ["CONTROLS", "Controls", "encode_restored", "text_encoder", "untrained"]

Controls = Literal["none", "features", "pictures"]
CONTROLS: tuple[Controls, ...] = ("none", "features", "pictures")
# A module, the positions to copy, and for a head the columns of the module's input to copy.
Copy = tuple[Module, Sequence[int]] | tuple[Module, Sequence[int], slice]
Restoration = Sequence[Copy]
Row = dict[str, Any]
Pass = tuple[str, Sequence[Module], Corruption]  # name of the control, encoders, corrupted prompt


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
    states: TextStates = TextStates(),
    direction: Direction = "restore",
    generate: bool = True,
    controls: Controls = "features",
    noise: Noise = Noise(),
    drawing: Drawing = Drawing(),
    scorer: Scorer | None = None,
    minimum_gap: float = 0.02,
    folder: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Trace the (sublayer, position) states of the text encoder, of both encoders where there are two.

    Args:
        model: A `TextToImage`; its weights and modules are left as they were.
        probes: Prompts with the concept's words.
        states: Positions, heads, groups or single states to trace; all states by default.
        direction: `"restore"` clean states in the corrupted pass, or `"corrupt"` states of the clean pass.
        generate: Draw and score pictures; otherwise only distances of text features are measured.
        controls: `"features"` also measures text features in an untrained encoder and with other words corrupted;
            `"pictures"` also draws pictures for the corrupted other words, which doubles the work; `"none"` does
            neither.
        noise: Number of noise samples for each prompt, and their standard deviation.
        drawing: Steps, guidance, solver, seeds and batch of the pictures. A probe with a seed of its own uses that
            instead.
        scorer: Returns N scores from pictures (N, 3, H, W) in [0, 1] and N probes; the shipped judge if
            `None`, which reads pictures of 64x64 pixels.
        minimum_gap: Smallest gap between clean and corrupted score; runs with a smaller one have no `recovery`.
        folder: Finished prompts are saved there, so that a stopped trace can continue; one process at a time.
        on_progress: Called with (finished prompts times 1000, prompts times 1000, label).

    Returns:
        Effects with one row for each state, prompt, seed and noise sample.

    Raises:
        ValueError: A probe or a setting is out of range, or no state is left.
        UnsupportedModel: Text features, latents or scores became NaN.
        OSError: `folder` cannot be written.
    """
    if controls not in CONTROLS:
        raise ValueError(f"`controls` must be 'none', 'features' or 'pictures', got {controls!r}.")
    renderer = Renderer.of(
        model, drawing, scorer=scorer, direction=direction, minimum_gap=minimum_gap, draw=generate
    )
    corrupted, sigma = corruptions(model, probes, noise)
    named = named_sites(sites.find_texts(model.text_encoders), states.groups)
    fresh = None if controls == "none" else [untrained(e) for e in model.text_encoders]
    twins, fresh_sigma = _twins(model, fresh, corrupted, noise)
    run = _Run(
        renderer, named, states, seeds=drawing.seeds if generate else (),
        drawn=("", "other span") if controls == "pictures" else ("",),
        rows=64 if drawing.memory is None else renderer.rows, on_progress=on_progress,
    )  # fmt: skip
    for corruption, twin in zip(corrupted, twins, strict=True):
        passes = _passes(model.text_encoders, fresh, corruption, twin)
        run.units.setdefault(corruption.probe.id, []).append(passes)
    selected([s for c in corrupted for s in run.states(model.text_encoders, c)], None, lambda s: s)
    protocol = renderer.protocol(
        "text_encoder", probes, folder=folder, positions=list(states.positions), heads=states.heads,
        sites=[name for name, _ in named], groups=provenance.group_members(states.groups),
        only=None if states.only is None else sorted(map(list, states.only)), control=controls != "none",
        draw_control=controls == "pictures", seeds=list(drawing.seeds), noise_samples=noise.samples, sigma=sigma,
        sigma_untrained=fresh_sigma,
    )  # fmt: skip
    return Effects.of(resume.sweep(folder, protocol, list(run.units), run.rows_of), protocol)


@torch.no_grad()
def encode_restored(
    encoders: Module | Sequence[Module],
    corruption: Corruption,
    restorations: Sequence[Restoration],
    *,
    rows: int = 64,
    direction: Direction = "restore",
    clip_skip: int = 0,
) -> Tensor:
    """Encode one prompt clean, corrupted, and with states copied from one pass to the other.

    Args:
        encoders: The model's text encoders, or its only one.
        corruption: Prompt and noise.
        restorations: For each further row, the modules and positions to copy; with a slice as third entry those
            columns of the module's input.
        rows: Rows of a batch; every batch has a clean and a corrupted row of its own.
        direction: `"restore"` copies clean states into the corrupted pass, `"corrupt"` copies the other way.
        clip_skip: As in `text_features`.

    Returns:
        Text features, shape (2 + R, L, D): clean, corrupted, and one row for each restoration.

    Raises:
        UnsupportedModel: They are not finite.
    """
    towers = (encoders,) if isinstance(encoders, Module) else tuple(encoders)
    device = next(towers[0].parameters()).device
    parts: list[Tensor] = []
    chunks = equal_chunks(list(restorations), rows, rows=lambda n: n + 2, multiple=8, fill=())
    end = None if direction == "restore" else 2
    for chunk, used in chunks:
        ids = [i.to(device).expand(len(chunk) + 2, -1) for i, _ in corruption.parts]
        whole, single = _copiers(chunk, source=int(direction == "corrupt"))
        with ExitStack() as stack:
            for index, tower in enumerate(towers):
                stack.enter_context(noisy(tower, corruption, first=1, end=end, part=index))
            stack.enter_context(hooks.patch(whole))
            stack.enter_context(hooks.patch_inputs(single))
            embeds = text_features(towers, ids, clip_skip=clip_skip)
        parts.append(embeds[: used + 2] if not parts else embeds[2 : used + 2])
    remedy = "load it in float32, or lower `sigma`"
    return finite(torch.cat(parts), "text features", remedy, f" in {corruption.probe.prompt!r}")


def untrained(encoder: Any, *, seed: int = 1) -> Any:
    """Return an encoder of the same architecture with freshly drawn weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(encoder)(encoder.config)
    return fresh.to(encoder.device, encoder.dtype).eval().requires_grad_(False)


def _copiers(
    restorations: Sequence[Restoration], *, source: int
) -> tuple[dict[Module, Any], dict[Module, Any]]:
    """Return two dicts from a module to a function that copies states: one for its output, one for inputs of heads."""
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
) -> list[Pass]:
    """Return the pass of the model itself and those of its controls."""
    passes: list[Pass] = [("", encoders, corruption)]
    if fresh is not None and twin is not None:
        other = corruption.on_other_words()
        passes += [("untrained", fresh, twin)]
        passes += [] if other is None else [("other span", encoders, other)]
    return passes


def _twins(
    model: Any, fresh: Sequence[Module] | None, corrupted: Sequence[Corruption], noise: Noise
) -> tuple[Sequence[Corruption | None], float | None]:
    """Return for each corruption its equivalent for the untrained encoder, and the standard deviation of their noise.

    The random draws are the same. A factor such as `"3std"` is of the untrained encoder's own embeddings, so that
    relative to them the noise is as strong as in the trained encoder.
    """
    if fresh is None:
        return [None] * len(corrupted), None
    bare = SimpleNamespace(
        tokenizer=model.tokenizer, tokenizers=model.tokenizers, tokenize=model.tokenize, text_encoders=fresh
    )  # fmt: skip
    probes = [corruption.probe for corruption in corrupted[:: noise.samples]]
    return corruptions(bare, probes, noise)


@dataclass
class _Run:
    """Computes the rows of one prompt after another.

    Attributes:
        renderer: Draws and scores.
        named: Names and members of the sites or groups.
        selection: Positions, heads and single states to trace.
        seeds: Seeds of the pictures; none where none are drawn.
        drawn: Names of the passes for which pictures are drawn.
        rows: Rows of a batch of the text encoder.
        on_progress: As in `text_encoder`.
        units: The passes of each noise sample, by the probe's id.
    """

    renderer: Renderer
    named: Sequence[tuple[str, tuple[Site, ...]]]
    selection: TextStates
    seeds: Sequence[int]
    drawn: Sequence[str]
    rows: int
    on_progress: Progress | None
    units: dict[str, list[list[Pass]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.negative = self.renderer.model.encode([""])

    def states(self, encoders: Sequence[Module], corruption: Corruption) -> list[State]:
        """Return the states of one corrupted prompt."""
        only, model = self.selection.only, _as_model(encoders)
        states = [
            State(name, members, role, position, head)
            for name, members in self.named
            for head in head_numbers(model, members, self.selection.heads)
            for role, position in role_positions(corruption, self.selection.positions)
        ]
        return [state for state in states if only is None or (state.name, state.role) in only]

    def rows_of(self, unit: str) -> list[Row]:
        """Return the rows of the probe with this id."""
        samples = self.units[unit]
        seeds = seeds_of(samples[0][0][2].probe, self.seeds) if self.seeds else []
        before, repeats = list(self.units).index(unit), len(samples) * len(seeds) * len(self.drawn)

        def report(share: float) -> None:
            if self.on_progress is not None:
                done, total = round(1000 * (before + share)), 1000 * len(self.units)
                self.on_progress(done, total, "tracing the text encoder")

        pictures = _Pictures(self.renderer, self.negative, report, repeats)
        rows: list[Row] = []
        for name, encoders, corruption in (entry for passes in samples for entry in passes):
            states = self.states(encoders, corruption)
            if not states:
                continue
            embeds = self._encode(encoders, corruption, states)
            measured = self._columns(corruption, states, embeds, control=name)
            drawn = bool(seeds) and name in self.drawn
            for seed in seeds if drawn else (None,):
                scored = pictures.measure(corruption, embeds, seed)
                rows += [{**m, "seed": seed, **s} for m, s in zip(measured, scored, strict=True)]
        report(1.0)
        return rows

    def _encode(
        self, encoders: Sequence[Module], corruption: Corruption, states: Sequence[State]
    ) -> Tensor:
        model = _as_model(encoders)

        def copies(state: State) -> list[Copy]:
            if state.head is None:
                return [(site.module(model), [state.position]) for site in state.sites]
            linear, columns = head_columns(model, state.sites[0], state.head)
            return [(linear, [state.position], columns)]

        plan = [copies(state) for state in states]
        return encode_restored(
            encoders, corruption, plan, rows=self.rows, direction=self.renderer.direction,
            clip_skip=self.renderer.model.clip_skip,
        )  # fmt: skip

    def _columns(
        self, corruption: Corruption, states: Sequence[State], embeds: Tensor, *, control: str
    ) -> list[Row]:
        """Return for each state the columns that identify it, and the recovery of the text features."""
        direction, probe = self.renderer.direction, corruption.probe
        everywhere = distance_recovery(embeds, direction=direction)
        pads = distance_recovery(embeds[:, corruption.eos :], direction=direction)
        return [
            {
                **site_columns(state.name, state.sites), "role": state.role, "position": state.position,
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
        self, renderer: Renderer, negative: Tensor, on_share: Callable[[float], None], repeats: int
    ) -> None:
        self.renderer, self.negative, self.on_share = renderer, negative, on_share
        self.repeats, self.done = repeats, 0
        self._cache: dict[tuple[int, str], tuple[float, Tensor]] = {}

    def measure(self, corruption: Corruption, embeds: Tensor, seed: int | None) -> list[Row]:
        """Return the columns of every row of `embeds` from the third on; empty ones without a seed."""
        if seed is None:
            return [{}] * (len(embeds) - 2)
        keys = [(seed, _digest(row)) for row in embeds]
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._cache}
        new = sorted(first.items(), key=lambda item: item[1])
        chunks = list(equal_chunks(new, self.renderer.rows)) if new else []
        for number, (chunk, used) in enumerate(chunks):
            rows = embeds[[i for _, i in chunk]]

            def report(step: int, _: Tensor, number: int = number) -> None:
                share = (number + step / self.renderer.steps) / len(chunks)
                self.on_share((self.done + min(1.0, share)) / self.repeats)

            latents = self.renderer.denoise(seed, len(chunk), rows, self.negative, on_step=report)
            scores = self.renderer.scores(latents[:used], corruption.probe)
            entries = zip(chunk[:used], scores, latents[:used].cpu(), strict=True)
            self._cache |= {key: (score, latent) for (key, _), score, latent in entries}
        self.done += 1
        scores, latents = zip(*(self._cache[key] for key in keys), strict=True)
        return self.renderer.measured(scores, torch.stack(latents))


def _as_model(encoders: Sequence[Module]) -> Any:
    """Return an object from which `Site.module` reads the encoders as it does from a model."""
    return SimpleNamespace(text_encoder=encoders[0], text_encoders=tuple(encoders), unet=None)


def _digest(row: Tensor) -> str:
    return hashlib.sha256(row.double().cpu().contiguous().numpy().tobytes()).hexdigest()
