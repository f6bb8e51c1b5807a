"""A world of lettering without downloads: two faces of matplotlib and two photographs of scikit-learn."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from overpaint.scene_text.line import Line
from overpaint.train.lettering_fonts import Face, make_face
from overpaint.train.lettering_scenes import World

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def faces() -> tuple[Face, ...]:
    """Return DejaVu Sans Bold under the name of the first stages' face, and DejaVu Serif."""
    named = {"Roboto-Bold": "DejaVuSans-Bold.ttf", "DejaVuSerif": "DejaVuSerif.ttf"}
    return tuple(
        make_face(name, name.partition("-")[0], (FOLDER / file).read_bytes())
        for name, file in named.items()
    )


def small_world(*, held_out_words: bool = False, line: Line | None = None) -> World:
    """Return a world of two faces and two smooth photographs."""
    rng = np.random.default_rng(0)
    photos = tuple(
        np.asarray(
            Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        )
        for _ in range(2)
    )
    return World(faces(), photos, line or Line(), held_out_words)
