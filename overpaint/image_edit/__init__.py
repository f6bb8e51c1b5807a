"""Edit pictures with a text-to-image model (DiffEditor): move, resize, paste, drag, and change the look of objects."""

from overpaint.image_edit.editing import appearance, drag, landmarks, move, paste
from overpaint.image_edit.energies import Weights
from overpaint.image_edit.result import Edited
from overpaint.image_edit.settings import Settings, overpaint, published

__all__ = [
    "Edited",
    "Settings",
    "Weights",
    "appearance",
    "drag",
    "landmarks",
    "move",
    "overpaint",
    "paste",
    "published",
]
