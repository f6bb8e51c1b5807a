"""Change what a model knows, in closed form: edits are data, applied and reverted exactly."""

from overpaint.edit import export
from overpaint.edit.baselines import random_site, swap_embedding
from overpaint.edit.change import Change, Movement
from overpaint.edit.joint import stack
from overpaint.edit.quickfix import quickfix

__all__ = [
    "Change",
    "Movement",
    "export",
    "quickfix",
    "random_site",
    "stack",
    "swap_embedding",
]
