"""Change what a model knows, in closed form: edits are data, applied and reverted exactly."""

from overpaint.edit import export
from overpaint.edit.auto import auto
from overpaint.edit.baselines import random_site, swap_embedding
from overpaint.edit.change import Change, Movement
from overpaint.edit.finetune import finetune
from overpaint.edit.joint import stack
from overpaint.edit.loco import loco
from overpaint.edit.plot import plot
from overpaint.edit.quickfix import quickfix
from overpaint.edit.time import time
from overpaint.edit.uce import debias, uce

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
