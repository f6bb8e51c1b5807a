"""Change what a model knows, in closed form: edits are data, applied and reverted exactly."""

from overpaint.edit import export
from overpaint.edit.algebra import stack
from overpaint.edit.change import Change, Movement
from overpaint.edit.methods.automatic import auto
from overpaint.edit.methods.baselines import random_site, swap_embedding
from overpaint.edit.methods.finetune import finetune
from overpaint.edit.methods.loco import loco
from overpaint.edit.methods.quickfix import quickfix
from overpaint.edit.methods.time_edit import time
from overpaint.edit.methods.uce import debias, uce
from overpaint.edit.weight_plot import plot

__all__ = [
    "Change",
    "Movement",
    "auto",
    "debias",
    "export",
    "finetune",
    "loco",
    "plot",
    "quickfix",
    "random_site",
    "stack",
    "swap_embedding",
    "time",
    "uce",
]
