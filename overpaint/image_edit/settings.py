"""Settings of an edit, and the two presets: `overpaint`, which is the default, and `published`."""

import math
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["UPDATES", "Settings", "overpaint", "published", "window_steps"]

UPDATES = ("latents", "x0", "eps")

Window = tuple[float, float]
"""First and last fraction of the denoising steps, from the noisiest: step i of N is in it if low <= i / N < high."""


@dataclass(frozen=True)
class Settings:
    r"""Settings of an edit. The defaults are the preset `overpaint`; `published()` returns the other one.

    Attributes:
        steps: Steps of inversion and of denoising, at least 2.
        refinements: Fixed-point refinements of each step of the inversion, 0 to 10; each is one call of the UNet.
        guidance_scale: Weight of the prompt in denoising; the inversion has none.
        diffusion: Run the model; off, the result is the edit in pixels alone, as in `Edited.pasted`.
        copy: Take latents, keys, values and target features of the target from a moved, scaled or warped copy of the
            picture, which is inverted too.
        fill: Fill the place that the object leaves before the inversion.
        residual: Add the detail that resizing and the autoencoder lose, moved with the object.
        composite: Take all pixels outside of the edited region from the picture, bit for bit. Inside of it the drift of
            the colors around it is subtracted, as in seamless cloning.
        paste_latents: Without `copy`: move the initial latents with the object.
        bank: Replace or extend keys and values of self-attention by those of the inversion.
        bank_window: Steps with `bank`; `None` for the window of the task in the release.
        guidance: Follow the gradient of the energies.
        guidance_window: Steps with `guidance`, every one.
        sparse_window: Steps with `guidance`, every second one if `steps` is 40 or more, else every one.
        update: `"latents"`: subtract `step_size` times the gradient, divided by its root mean square, from the latents
            after each step. `"x0"`: add the gradient to the noise prediction, for the clean picture only, as the
            release does. `"eps"`: add it to the noise prediction, as in algorithm 1 of DragonDiffusion.
        step_size: Length of an update by `"latents"`, in latents.
        energy_scale: Factor of the gradient for `"x0"` and `"eps"`; `None` for that of the task in the release.
        regional: The gradient of the edit changes the target only, and that of the content the rest only.
        sde: Add noise at the steps of `sde_window`.
        sde_window: Steps with `sde`.
        eta_inside: Share of the noise in the edited region, 0 for DDIM and 1 for DDPM.
        eta_outside: The same outside of the region.
        travel: Repeat the steps of `travel_window`.
        travel_window: Steps with `travel`, every second one if `steps` is 40 or more, else every one.
        repeats: Times that such a step is done.
        size: Longer side in pixels of the picture that is inverted; `None` for that of the model, at least 16 latents.
        crop: Share of the side of that picture that the object fills; `None` inverts the whole picture.
        grow: Pixels by which a mask is grown, so that it holds the soft rim of the object.
        feather: Pixels inside of the edited region over which the edit and the picture mix.

    Raises:
        ValueError: A setting is out of range.
    """

    steps: int = 20
    refinements: int = 2
    guidance_scale: float = 1.0
    diffusion: bool = True
    copy: bool = True
    fill: bool = True
    residual: bool = True
    composite: bool = True
    paste_latents: bool = True
    bank: bool = True
    bank_window: Window | None = (0.1, 1.0)
    guidance: bool = True
    guidance_window: Window = (0.0, 0.2)
    sparse_window: Window = (0.2, 0.6)
    update: str = "latents"
    step_size: float = 0.05
    energy_scale: float | None = None
    regional: bool = True
    sde: bool = False
    sde_window: Window = (0.22, 0.4)
    eta_inside: float = 0.4
    eta_outside: float = 0.0
    travel: bool = False
    travel_window: Window = (0.44, 0.6)
    repeats: int = 3
    size: int | None = None
    crop: float | None = 0.5
    grow: int = 2
    feather: float = 2.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 2, 1000),
            ("refinements", 0, 10),
            ("repeats", 1, 100),
            ("grow", 0, 100),
        ):
            self._check(name, low, high, whole=True)
        if self.size is not None:
            self._check("size", 16, 4096, whole=True)
        for name, low, high in (
            ("guidance_scale", 0, 100), ("step_size", 0, 10), ("eta_inside", 0, 1), ("eta_outside", 0, 1),
            ("feather", 0, 100),
        ):  # fmt: skip
            self._check(name, low, high)
        if self.energy_scale is not None:
            self._check("energy_scale", 0, 1e6)
        if self.crop is not None:
            self._check("crop", 0.05, 1)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name.endswith("window") and value is not None:
                _check_window(entry.name, value)
            if entry.type is bool and type(value) is not bool:
                raise ValueError(
                    f"`{entry.name}` must be true or false, got {value!r}: give one of them."
                )
        if self.update not in UPDATES:
            raise ValueError(
                f"`update` must be one of {', '.join(UPDATES)}, got {self.update!r}: choose one."
            )

    def _check(self, name: str, low: float, high: float, *, whole: bool = False) -> None:
        value = getattr(self, name)
        kinds: Any = int if whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
            number = "a whole number" if whole else "a number"
            raise ValueError(
                f"`{name}` must be {number} from {low} to {high}, got {value!r}: give one in this range."
            )


def overpaint(**changes: Any) -> Settings:
    """Return the preset `overpaint`, the defaults of `Settings`, with `changes`."""
    return Settings(**changes)


def published(**changes: Any) -> Settings:
    """Return the preset `published`, DiffEditor as in its paper and release, with `changes`.

    50 steps without refinement, guidance 4, every part of the release on, no copy, no fill, no residual, no composite.
    DragonDiffusion is `published(regional=False, sde=False, travel=False)`.

    Source: Mou et al., 2024 (DiffEditor), https://arxiv.org/abs/2402.02583; Mou et al., 2024 (DragonDiffusion),
    https://arxiv.org/abs/2307.02421; their public code.
    Deviations: cosines are mapped to [0, 1] in every energy, since the release divides by zero at -0.25 in moves;
    empty regions add no term; objects that leave the frame are clipped; no image prompt.
    """
    release: dict[str, Any] = {
        "steps": 50, "refinements": 0, "guidance_scale": 4.0, "copy": False, "fill": False, "residual": False,
        "composite": False, "bank_window": None, "update": "x0", "sde": True, "travel": True, "crop": None, "grow": 0,
        "feather": 0.0,
    }  # fmt: skip
    return Settings(**(release | changes))


def window_steps(window: Window, steps: int, *, stride: bool = False) -> frozenset[int]:
    """Return the denoising steps of a window, counted from the noisiest; at least one if the window is not empty.

    Args:
        window: First and last fraction.
        steps: Number of steps.
        stride: Leave out every second step if `steps` is 40 or more.
    """
    low, high = window
    if low >= high:
        return frozenset()
    first = min(math.ceil(low * steps - 1e-9), steps - 1)
    last = max(math.ceil(high * steps - 1e-9), first + 1)
    return frozenset(range(first, last, 2 if stride and steps >= 40 else 1))


def _check_window(name: str, window: Any) -> None:
    is_pair = isinstance(window, tuple) and len(window) == 2
    if (
        not is_pair
        or not all(isinstance(v, int | float) for v in window)
        or not 0 <= window[0] <= window[1] <= 1
    ):
        raise ValueError(
            f"`{name}` must be two fractions of the steps in order, got {window!r}: give such as (0.2, 0.6)."
        )
