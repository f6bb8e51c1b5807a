"""The denoising loop with classifier-free guidance, its inversion, and its schedulers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from overpaint.errors import check_seed

__all__ = ["SOLVERS", "Denoiser", "Drawing", "Progress", "denoise", "invert", "make_scheduler"]

SOLVERS = ("own", "ddim", "dpm")

Progress = Callable[[int, int, str], None]
"""Called with (done, total, label)."""


@dataclass(frozen=True)
class Drawing:
    """Settings for drawing pictures.

    Attributes:
        steps: Number of denoising steps.
        guidance_scale: Weight of the prompt; `None` for the default of the model.
        solver: `"own"` for the scheduler of the model, `"ddim"` for DDIM, or `"dpm"` for DPM-Solver++, which needs
            fewer steps than DDIM.
        seeds: Seeds of the initial noise; one picture is drawn for each.
        batch_size: Largest number of rows in a batch.
        memory: Budget for activations in MiB; batches get smaller to fit. `None` for no limit.

    Raises:
        ValueError: A setting is out of range.
    """

    steps: int = 10
    guidance_scale: float | None = None
    solver: str = "dpm"
    seeds: Sequence[int] = (0,)
    batch_size: int = 32
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")
        _check_solver(self.solver)
        if not self.seeds:
            raise ValueError("`seeds` is empty: give at least one.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"`memory` must be a positive number of MiB, got {self.memory!r}.")
        seeds = tuple(check_seed(seed, "seeds") for seed in self.seeds)
        object.__setattr__(self, "seeds", seeds)


class Denoiser(Protocol):
    """The part of a model that `denoise` uses."""

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler; each run of `denoise` creates a new one with the same settings."""
        ...

    def noise_pred(self, latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the predicted noise or velocity, shape of `latents`."""
        ...


@torch.no_grad()
def denoise(
    model: Denoiser,
    latents: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    on_step: Callable[[int, Tensor], Tensor | None] | None = None,
    generators: Sequence[Generator] | None = None,
    scheduler: Any = None,
) -> Tensor:
    r"""Denoise `latents` with classifier-free guidance.

    Each step predicts :math:`\hat\epsilon = \epsilon(\varnothing) + w\,(\epsilon(c) - \epsilon(\varnothing))`. Both
    terms are computed in one batch: first all unconditional rows, then all conditional rows. If :math:`w = 1`, only the
    conditional rows are computed. Every call creates a new scheduler, so calls share no state.

    Args:
        model: Predicts the noise or the velocity, as its scheduler states.
        latents: Initial latents, shape (B, C, h, w).
        prompt_embeds: Text features, shape (B, L, D).
        negative_embeds: Text features of the unconditional branch, shape (1, L, D) or (B, L, D).
        steps: Argument of `scheduler.set_timesteps`; some schedulers (PNDM) take one more step.
        guidance_scale: Weight of the prompt, :math:`w`.
        on_step: Called after each step with the number of finished steps and the latents. If it returns latents, the
            next step uses those instead.
        generators: One for each row, for schedulers that add noise at each step.
        scheduler: Used instead of the scheduler of the model; `make_scheduler` returns one.

    Returns:
        Denoised latents, shape (B, C, h, w).
    """
    rows = latents.shape[0]
    base = model.scheduler if scheduler is None else scheduler
    scheduler = type(base).from_config(base.config)
    scheduler.set_timesteps(steps, device=latents.device)
    embeds = prompt_embeds
    if guidance_scale != 1:
        embeds = torch.cat([negative_embeds.expand(rows, -1, -1), prompt_embeds])
    options = _step_options(scheduler, generators)
    for done, t in enumerate(scheduler.timesteps, start=1):
        scaled = scheduler.scale_model_input(latents, t)
        if guidance_scale == 1:
            noise_pred = model.noise_pred(scaled, t, embeds)
        else:
            uncond, cond = model.noise_pred(torch.cat([scaled, scaled]), t, embeds).chunk(2)
            noise_pred = uncond + guidance_scale * (cond - uncond)
        latents = scheduler.step(noise_pred, t, latents, **options).prev_sample
        if on_step is not None:
            new_latents = on_step(done, latents)
            latents = latents if new_latents is None else new_latents
    return latents


@torch.no_grad()
def invert(
    model: Denoiser, latents: Tensor, prompt_embeds: Tensor, *, steps: int, iterations: int = 4
) -> Tensor:
    r"""Return the initial latents from which DDIM without guidance draws `latents`.

    A step of DDIM is :math:`x_s = a\,x_t + b\,\epsilon(x_t, t)`. It is undone by the fixed-point iteration
    :math:`x_t \leftarrow (x_s - b\,\epsilon(x_t, t)) / a` from :math:`x_t = x_s`; one iteration is the usual inversion.
    Draw with `denoise(..., guidance_scale=1, scheduler=make_scheduler(model, "ddim"))`.

    Args:
        model: Predicts the noise or the velocity, as its scheduler states.
        latents: Denoised latents, shape (B, C, h, w).
        prompt_embeds: Text features, shape (B, L, D).
        steps: Denoising steps.
        iterations: Calls of the UNet for each step, at least 1.

    Returns:
        Initial latents, shape (B, C, h, w).

    Raises:
        ValueError: A step discards its input, as a single step from pure noise does.

    Source: Song et al., 2021, https://arxiv.org/abs/2010.02502, equation 12, for the step; Pan et al., 2023,
    https://arxiv.org/abs/2309.04907, for the iteration, here without acceleration.
    """
    base = make_scheduler(model, "ddim")
    scheduler = type(base).from_config(base.config)
    scheduler.set_timesteps(steps, device=latents.device)
    one, zero = latents.new_ones(1, 1, 1, 1), latents.new_zeros(1, 1, 1, 1)
    for t in scheduler.timesteps.flip(0):
        # The step is linear, so its two factors are its results for ones and zeros.
        a = scheduler.step(zero, t, one).prev_sample
        b = scheduler.step(one, t, zero).prev_sample
        if not a.abs() > 1e-6:
            raise ValueError(
                f"a step of DDIM discards its input with `steps` {steps}, so it cannot be inverted: use more steps."
            )
        later = latents
        for _ in range(iterations):
            later = (latents - b * model.noise_pred(later, t, prompt_embeds)) / a
        latents = later
    return latents


def make_scheduler(model: Denoiser, name: str) -> Any:
    """Return the scheduler `name`, with the noise schedule and prediction type of `model`.

    Args:
        model: Model whose settings are used.
        name: `"own"` for the scheduler of the model, `"ddim"` for DDIM without added noise or clipping, or `"dpm"` for
            second-order DPM-Solver++, which needs fewer steps than DDIM.

    Raises:
        ValueError: `name` is not one of `SOLVERS`.

    Source: Song et al., 2021, https://arxiv.org/abs/2010.02502; Lu et al., 2022, https://arxiv.org/abs/2211.01095.
    """
    _check_solver(name)
    if name == "own":
        return model.scheduler
    import diffusers

    classes: dict[str, Any] = {
        "ddim": diffusers.DDIMScheduler,
        "dpm": diffusers.DPMSolverMultistepScheduler,
    }
    options = {"clip_sample": False} if name == "ddim" else {}  # latents are not limited to [-1, 1]
    return classes[name].from_config(model.scheduler.config, **options)


def _check_solver(name: str) -> None:
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: choose one of {', '.join(SOLVERS)}.")


def _step_options(scheduler: Any, generators: Sequence[Generator] | None) -> dict[str, Any]:
    if generators is None or "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": list(generators)}
