"""Backgrounds of lines: crops of photographs, plain colors, gradients and simple textures."""

from typing import Protocol

import cv2
import numpy as np

from overpaint.scene_text.line import Line

__all__ = ["DARK", "LIGHT", "background"]

# Ranges of the greys of letters and background, one of each, 0 to 255: letters of low contrast teach little.
DARK, LIGHT = (0, 90), (165, 255)


class _Scene(Protocol):
    """The parts of a world that backgrounds are made of."""

    @property
    def photos(self) -> tuple[np.ndarray, ...]:
        """RGB uint8 (H, W, 3)."""
        ...

    @property
    def line(self) -> Line:
        """Sizes of the line."""
        ...


def background(rng: np.random.Generator, world: _Scene, *, in_color: bool = True) -> np.ndarray:
    """Return a background of the size of the line, RGB uint8 (H, W, 3).

    Seven in ten are crops of photographs, with changed light; the others are plain, a gradient or a texture. Without
    color the background is a plain dark or light grey.
    """
    height, width = world.line.height, world.line.width
    if not in_color:
        return np.full((height, width, 3), rng.uniform(*(DARK, LIGHT)[rng.integers(2)]), np.uint8)
    if rng.random() < 0.7 and world.photos:
        ground = _crop(rng, world.photos[rng.integers(len(world.photos))], height, width)
        ground = ground * rng.uniform(0.7, 1.2) + rng.uniform(-25, 25)
    else:
        ground = _drawn(rng, height, width)
    return np.clip(ground, 0, 255).round().astype(np.uint8)


def _crop(rng: np.random.Generator, photo: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a part of a photograph, at most reduced to a quarter, at times mirrored; float32."""
    largest = min(4.0, photo.shape[1] / width, photo.shape[0] / height)
    scale = largest if largest < 0.8 else rng.uniform(min(0.8, largest), largest)
    rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
    y = rng.integers(photo.shape[0] - rows + 1)
    x = rng.integers(photo.shape[1] - columns + 1)
    part = photo[y : y + rows, x : x + columns]
    method = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    part = cv2.resize(part, (width, height), interpolation=method).astype(np.float32)
    return part[:, ::-1] if rng.random() < 0.5 else part


def _drawn(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a plain color, a gradient, stripes, blotches or grain; float32."""
    first = rng.uniform(0, 255, 3)
    kind = rng.integers(5)
    if kind == 0:
        return np.broadcast_to(first, (height, width, 3)).astype(np.float32)
    second = np.clip(first + rng.normal(0, 45, 3), 0, 255)
    angle = rng.uniform(0, 2 * np.pi)
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    along = (xs * np.cos(angle) + ys * np.sin(angle)) / width
    if kind == 1:
        share = np.clip(along + 0.5, 0, 1)
    elif kind == 2:
        share = 0.5 + 0.5 * np.sin(along * rng.uniform(10, 120))
    elif kind == 3:
        cells = rng.random(
            (height // int(rng.integers(2, 9)) + 1, width // int(rng.integers(2, 17)) + 1)
        )
        share = cv2.resize(cells.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    else:
        share = np.clip(rng.normal(0.5, 0.2, (height, width)), 0, 1)
    return (first * (1 - share[..., None]) + second * share[..., None]).astype(np.float32)
