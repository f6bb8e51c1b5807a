"""Edit pictures by the features of a text-to-image model (DiffEditor): move and resize objects."""

from overpaint.image_edit.editing import move
from overpaint.image_edit.energies import Weights
from overpaint.image_edit.result import Edited
from overpaint.image_edit.settings import Settings, overpaint, published

__all__ = ["Edited", "Settings", "Weights", "move", "overpaint", "published"]
