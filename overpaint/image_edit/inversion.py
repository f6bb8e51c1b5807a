r"""DDIM inversion of latents, with fixed-point refinement, and the linear form of each step.

A step of DDIM is linear in its latents and the prediction: :math:`x_s = a\,x_t + b\,f(x_t, t)`, with the later level
:math:`s`. For velocities it is the rotation :math:`x_s = \cos\delta\,x_t - \sin\delta\,v`, so that it can be inverted
also where the first step starts from pure noise (zero terminal signal-to-noise ratio); the form with the noise
prediction divides by zero there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.model.sampling import Denoiser, make_scheduler

__all__ = ["Levels", "Trajectory", "invert", "levels_of", "rollback"]


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels of the denoising steps, noisiest first.

    Attributes:
        scheduler: A DDIM scheduler with these steps.
        timesteps: Timestep of each step, N of them.
        alphas: Cumulative alpha before each step, and after the last one, N + 1 of them.
    """

    scheduler: Any
    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Latents before each denoising step.

    Attributes:
        levels: Their noise levels.
        latents: For each of N steps its input, noisiest first, then the clean latents: N + 1 of shape (R, C, h, w).
    """

    levels: Levels
    latents: tuple[Tensor, ...]


def levels_of(model: Denoiser, steps: int) -> Levels:
    """Return the levels of DDIM with the model's noise schedule and `steps` steps."""
    base = make_scheduler(model, "ddim")
    scheduler = type(base).from_config(base.config)
    scheduler.set_timesteps(steps)
    timesteps = tuple(int(t) for t in scheduler.timesteps)
    stride = scheduler.config.num_train_timesteps // steps
    table = scheduler.alphas_cumprod.tolist()
    later = [
        table[t - stride] if t >= stride else float(scheduler.final_alpha_cumprod)
        for t in timesteps
    ]
    # The level that one step ends at is the one that the next starts from, up to rounding of the timesteps.
    return Levels(scheduler, timesteps, (table[timesteps[0]], *later))


@torch.no_grad()
def invert(
    predict: Callable[[Tensor, int], Tensor],
    latents: Tensor,
    levels: Levels,
    *,
    refinements: int = 2,
    recorder: Callable[[int], AbstractContextManager[Any]] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Trajectory:
    r"""Return the latents before each step of DDIM that ends at `latents`.

    The step to :math:`x_s` is inverted by :math:`x_t \leftarrow (x_s - b\,f(x_t, t)) / a`, first with :math:`x_s` in
    place of :math:`x_t` in the network, as in the usual inversion, then `refinements` times with the last result.

    Args:
        predict: Returns the noise or velocity for latents and a timestep, float32.
        latents: Clean latents, float32, shape (R, C, h, w).
        levels: Levels of the steps.
        refinements: Further iterations for each step.
        recorder: Returns a context manager for a denoising step; the last call of the network for that step is inside.
        on_step: Called after each step.

    Raises:
        ValueError: A step discards its input, as a single step from pure noise does.

    Source: Song et al., 2021, https://arxiv.org/abs/2010.02502, equation 12, for the step; Pan et al., 2023,
    https://arxiv.org/abs/2309.04907, for the iteration.
    """
    inputs = [latents]
    for i in reversed(range(len(levels.timesteps))):
        t = levels.timesteps[i]
        a, b = _factors(levels.scheduler, t, latents)
        if not a.abs() > 1e-6:
            raise ValueError(
                f"a step of DDIM discards its input with `steps` {len(levels.timesteps)}, so it cannot be inverted: "
                "use more steps."
            )
        later, earlier = inputs[-1], inputs[-1]
        for iteration in range(refinements + 1):
            is_last = iteration == refinements and recorder is not None
            with recorder(i) if is_last and recorder is not None else nullcontext():
                prediction = predict(earlier, t)
            earlier = (later - b * prediction) / a
        inputs.append(earlier)
        if on_step is not None:
            on_step()
    return Trajectory(levels, tuple(reversed(inputs)))


@torch.no_grad()
def rollback(
    predict: Callable[[Tensor, int], Tensor], latents: Tensor, levels: Levels, step: int
) -> Tensor:
    r"""Return the latents before `step` for the latents after it, by one step of deterministic inversion.

    :math:`x_t = \sqrt{\alpha_t}\,\hat x_0 + \sqrt{1 - \alpha_t}\,\hat\epsilon` with both estimates from the network at
    the later level :math:`s`.

    Source: Mou et al., 2024 (DiffEditor), https://arxiv.org/abs/2402.02583, time travel.
    """
    count = len(levels.timesteps)
    later = levels.timesteps[step + 1] if step + 1 < count else 0
    clean, noise = _estimates(levels, predict(latents, later), latents, levels.alphas[step + 1])
    alpha = levels.alphas[step]
    return alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise


def _factors(scheduler: Any, t: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of latents and prediction in a step: its results for ones and zeros."""
    one, zero = like.new_ones(1, 1, 1, 1), like.new_zeros(1, 1, 1, 1)
    return scheduler.step(zero, t, one).prev_sample, scheduler.step(one, t, zero).prev_sample


def _estimates(
    levels: Levels, prediction: Tensor, latents: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return the clean latents and the noise that a prediction at the level `alpha` stands for."""
    kind = levels.scheduler.config.prediction_type
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "v_prediction":
        return signal * latents - noise * prediction, signal * prediction + noise * latents
    if kind == "sample":
        return prediction, (latents - signal * prediction) / max(noise, 1e-6)
    return (latents - noise * prediction) / max(signal, 1e-6), prediction
