"""Change what a model knows, in closed form: edits are data, applied and reverted exactly."""

from overpaint.edit.baselines import random_site, swap_embedding
from overpaint.edit.change import Change
from overpaint.edit.quickfix import quickfix, stack

__all__ = ["Change", "quickfix", "random_site", "stack", "swap_embedding"]
