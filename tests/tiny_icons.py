"""The recipe of `icons` at a size that trains a step in a moment, without artwork and downloads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import icon_worlds
import language_packages
import pytest

from overpaint.train import icon_world, icons, loop, text_tower

MERGES = 200
TINY = replace(
    icons.CPU, merges=MERGES, text_layers=1, text_width=32, vision_layers=1, vision_width=32,
    clip_batch=2, vae_channels=(8, 8, 8, 8), vae_batch=2, unet_channels=(32,), unet_batch=4,
    pictures=3, scenes=2,
)  # fmt: skip


def one_step(minutes: float, lr: float, steps: int | None = None, **options: Any) -> loop.Schedule:
    """Return a schedule of one step instead of minutes."""
    return loop.Schedule(minutes, lr, 1, **options)


def shrink(patch: pytest.MonkeyPatch, packages: Path) -> None:
    """Make `icons.train` train `TINY` on dots, with small packages that are written to `packages`."""
    language_packages.write(packages, patch)
    sets = icon_worlds.build().sets
    patch.setattr(icon_world, "fetch", lambda _: sets)
    patch.setattr(icons, "CPU", TINY)
    shorten(patch)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Make the text tower read the few sentences of the small packages, and a few lines a step."""
    patch.setattr(text_tower, "MERGES", MERGES)
    patch.setattr(text_tower, "SENTENCES", 8)
    for name in ("_FRAMED", "_SENTENCES", "_WORDS"):
        patch.setattr(text_tower, name, 4)
