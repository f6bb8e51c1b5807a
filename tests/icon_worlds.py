"""An icon world without artwork, for the tests of the training recipes."""

import hashlib

import numpy as np

from overpaint.train import captions, icon_world


def build(*, hold_out: bool = True, colored: bool = False) -> icon_world.World:
    """Return a world in which every icon is a dot: all of one color, or each of the color `color_of(name)`."""
    names = [
        *icon_world.OBJECTS.values(),
        *captions.more_objects().values(),
        *icon_world.ACTIONS.values(),
        *icon_world.FLAGS.values(),
        *icon_world.LOGOS,
    ]
    icons = {name: _dot(color_of(name) if colored else (0x12, 0x34, 0x56)) for name in names}
    icon_set = {"icons": icons, "width": 16, "height": 16}
    sets = {name: icon_set for name in icon_world.PACKAGES}
    return icon_world.World(sets, hold_out=hold_out)


def color_of(icon: str) -> tuple[int, int, int]:
    """Return the color of the icon's dot in a colored world."""
    red, green, blue = hashlib.sha256(icon.encode()).digest()[:3]
    return red, green, blue


def _dot(color: tuple[int, int, int]) -> dict[str, str]:
    return {"body": '<circle cx="8" cy="8" r="7" fill="#{:02x}{:02x}{:02x}"/>'.format(*color)}


class Recorded(icon_world.World):
    """A world that draws nothing and lists the (icon, icon set) pairs it was asked for, so that it is fast."""

    def __init__(self) -> None:
        super().__init__(build().sets)
        self.shown: list[tuple[str, str]] = []

    def icon(self, name: str, set_: str, size: int) -> np.ndarray:
        """Return an icon that is not visible."""
        self.shown.append((name, set_))
        return np.zeros((size, size, 4), np.float32)
