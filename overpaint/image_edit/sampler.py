"""Invert pictures and denoise the edited latents, with bank, guidance, regional noise and time travel.

Source: Mou et al., 2024 (DiffEditor), https://arxiv.org/abs/2402.02583; Mou et al., 2024 (DragonDiffusion),
https://arxiv.org/abs/2307.02421.
Deviations: an own loop, since a step can be repeated; each part has a window as fractions of the steps.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from overpaint.image_edit import features as feature_maps
from overpaint.image_edit.bank import Bank, attentions
from overpaint.image_edit.energies import Energy, on_grid
from overpaint.image_edit.guidance import factor, gradient, normalised
from overpaint.image_edit.inversion import Levels, Trajectory, invert, levels_of, rollback
from overpaint.image_edit.settings import Settings, window_steps
from overpaint.model.sampling import Progress

__all__ = ["Outcome", "Plan", "noise_generator", "run"]


@dataclass(frozen=True, eq=False)
class Plan:
    """A task in terms of latents of R inverted pictures.

    Attributes:
        latents: Clean latents of the pictures, (R, C, h, w); the first is the picture that is edited.
        prompts: Caption of each picture.
        start: Returns the latents that denoising starts from, (1, C, h, w), for those of the inversion, (R, C, h, w).
        projection: Returns keys or values to use for a layer's own (B, tokens, D) and the stored ones (R, tokens, D).
        energy: Returns the energies for features of the latents, (C, H, W) for each level, and of the inverted
            pictures, (R, C, H, W) for each level, on a grid of twice the latents' size.
        region: Cells that the gradient of the edit changes, bool (h, w).
        noisy: Cells with the noise of `eta_inside`, bool (h, w).
        bank_window: Window of the bank in the release.
        energy_scale: Factor of the gradient in the release.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    start: Callable[[Tensor], Tensor]
    projection: Callable[[Tensor, Tensor], Tensor]
    energy: Callable[[Sequence[Tensor], Sequence[Tensor]], Energy]
    region: Tensor
    noisy: Tensor
    bank_window: tuple[float, float]
    energy_scale: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of `run`.

    Attributes:
        latents: Clean latents of the edited picture, (1, C, h, w).
        initial: Latents that denoising started from.
        trajectory: Latents of the inversion.
        log: One entry for each step.
        bank_bytes: Memory of the bank.
    """

    latents: Tensor
    initial: Tensor
    trajectory: Trajectory
    log: tuple[dict[str, Any], ...]
    bank_bytes: int


@dataclass
class _Run:
    """State of one run: the model with its text features, and the schedules of all parts."""

    model: Any
    plan: Plan
    settings: Settings
    generator: Generator
    levels: Levels
    bank: Bank
    embeds: Tensor
    negative: Tensor
    tick: Callable[[str], None]
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        given_window = self.settings.bank_window
        window = self.plan.bank_window if given_window is None else given_window
        count, settings = self.settings.steps, self.settings
        self.banked = window_steps(window, count) if settings.bank else frozenset()
        self.guided = frozenset()
        if settings.guidance:
            sparse = window_steps(settings.sparse_window, count, stride=True)
            self.guided = window_steps(settings.guidance_window, count) | sparse
        self.noisy = window_steps(settings.sde_window, count) if settings.sde else frozenset()
        self.repeated = (
            window_steps(settings.travel_window, count, stride=True)
            if settings.travel
            else frozenset()
        )

    def predict(self, latents: Tensor, t: int, embeds: Tensor | None = None) -> Tensor:
        """Return the prediction for latents, float32; by default with the picture's own prompt."""
        rows = self.embeds[: len(latents)] if embeds is None else embeds
        output = self.model.noise_pred(
            latents.to(self.model.dtype), torch.tensor(t, device=latents.device), rows
        )
        return output.to(latents.dtype)

    def invert(self) -> Trajectory:
        """Return the trajectory of the pictures; keys and values of the steps that use them are put into the bank."""
        return invert(
            self.predict, self.plan.latents, self.levels, refinements=self.settings.refinements,
            recorder=lambda step: self.bank.record(step) if step in self.banked else nullcontext(),
            on_step=lambda: self.tick("inverting"),
        )  # fmt: skip

    def guide(self, latents: Tensor, step: int, trajectory: Trajectory) -> tuple[Tensor, Energy]:
        """Return what is subtracted from the latents after `step`, and the energies before it."""
        t, modules = self.levels.timesteps[step], feature_maps.blocks(self.model.unet)
        grid = (2 * latents.shape[-2], 2 * latents.shape[-1])

        def maps(values: Tensor) -> list[Tensor]:
            return on_grid(feature_maps.features(lambda: self.predict(values, t), modules), grid)

        with torch.no_grad():
            stored = maps(trajectory.latents[step])
        region = self.plan.region if self.settings.regional else None
        values, energy = gradient(
            lambda z: self.plan.energy([m[0] for m in maps(z)], stored),
            latents,
            region,
            loss_scale=1024.0 if self.model.dtype == torch.float16 else 1.0,
        )
        if self.settings.update == "latents":
            return self.settings.step_size * normalised(values), energy
        scale = self.settings.energy_scale
        strength = self.plan.energy_scale if scale is None else scale
        alphas = self.levels.alphas[step : step + 2]
        return factor(self.settings.update, *alphas) * strength * torch.nan_to_num(values), energy

    def step(
        self, latents: Tensor, step: int, trajectory: Trajectory, entry: dict[str, Any]
    ) -> Tensor:
        """Return the latents after `step`, and write what was done into `entry`."""
        t, scale = self.levels.timesteps[step], self.settings.guidance_scale
        with (
            self.bank.replace(step, self.plan.projection) if step in self.banked else nullcontext()
        ):
            if scale == 1:
                prediction = self.predict(latents, t)
            else:
                both = torch.cat([self.negative, self.embeds[:1]])
                uncond, cond = self.predict(torch.cat([latents, latents]), t, both).chunk(2)
                prediction = uncond + scale * (cond - uncond)
        result = self._with_noise(prediction, t, latents, step)
        entry["prediction_rms"] = float(prediction.square().mean().sqrt())
        if step in self.guided:
            change, energy = self.guide(latents, step, trajectory)
            result = result - change
            entry["energies"] = energy.terms
            entry["change_rms"] = float(change.square().mean().sqrt())
        return result

    def _with_noise(self, prediction: Tensor, t: int, latents: Tensor, step: int) -> Tensor:
        """Return the unguided step; at steps with noise its share differs between the region and the rest."""
        scheduler = self.levels.scheduler
        if step not in self.noisy:
            return scheduler.step(prediction, t, latents).prev_sample
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        inside, outside = (
            scheduler.step(prediction, t, latents, eta=eta, variance_noise=noise).prev_sample
            for eta in (self.settings.eta_inside, self.settings.eta_outside)
        )
        return torch.where(self.plan.noisy, inside, outside)


def run(
    model: Any,
    plan: Plan,
    settings: Settings,
    *,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Outcome:
    """Return the latents of an edit.

    Args:
        model: A `TextToImage`.
        plan: The task.
        settings: Parts and their windows.
        seed: Seed of the noise of `settings.sde`; nothing else is random.
        on_progress: Called after each step with (steps done, steps in total, label).

    Raises:
        ValueError: The latents became NaN or infinite, or the steps are too few to be inverted.
        UnsupportedModel: The UNet has no self-attention in its up blocks.
    """
    done = 0

    def tick(label: str) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, 2 * settings.steps, label)

    with torch.no_grad(), feature_maps.frozen(model.unet):
        embeds = model.encode([*plan.prompts, ""])
        state = _Run(
            model, plan, settings, noise_generator(seed), levels_of(model, settings.steps),
            Bank(attentions(model), model.dtype), embeds[:-1], embeds[-1:], tick,
        )  # fmt: skip
        trajectory = state.invert()
        initial = plan.start(trajectory.latents[0])
        latents = _denoise(state, initial, trajectory)
    if not torch.isfinite(latents).all():
        raise ValueError(
            "the latents became NaN or infinite: lower `guidance_scale`, `step_size` or `energy_scale`, or load the "
            "model in float32."
        )
    return Outcome(latents, initial, trajectory, tuple(state.log), state.bank.bytes)


def _denoise(state: _Run, latents: Tensor, trajectory: Trajectory) -> Tensor:
    for step in range(state.settings.steps):
        repeats = state.settings.repeats if step in state.repeated else 1
        entry: dict[str, Any] = {
            "step": step,
            "timestep": state.levels.timesteps[step],
            "repeats": repeats,
            "bank": step in state.banked,
            "noise": step in state.noisy,
        }
        later = latents
        for i in range(repeats):
            later = state.step(latents, step, trajectory, entry)
            if i + 1 < repeats:
                latents = rollback(state.predict, later, state.levels, step)
        latents = later
        state.log.append(entry)
        state.tick("editing")
    return latents


def noise_generator(seed: int) -> Generator:
    """Return a generator for a seed whose noise differs from the initial latents that the same seed draws.

    Otherwise a picture that was drawn with this seed would be edited with the noise that it was made from.
    """
    digest = hashlib.sha256(f"overpaint.image_edit {seed}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))
