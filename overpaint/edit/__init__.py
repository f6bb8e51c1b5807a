"""Change the weights of a model, mostly in closed form: an edit is data, applied and reverted exactly."""

from overpaint.edit import export
from overpaint.edit.change import Change
from overpaint.edit.everyday_drift import Collateral, collateral
from overpaint.edit.methods.automatic import auto
from overpaint.edit.methods.baselines import random_site, swap_embedding
from overpaint.edit.methods.double_projection import dp
from overpaint.edit.methods.finetune import finetune
from overpaint.edit.methods.hirm import hirm
from overpaint.edit.methods.loco import loco
from overpaint.edit.methods.oce import oce
from overpaint.edit.methods.quickfix import quickfix
from overpaint.edit.methods.rename import rename
from overpaint.edit.methods.speed import speed
from overpaint.edit.methods.time_edit import time
from overpaint.edit.methods.uce import debias, uce
from overpaint.edit.movement import Movement
from overpaint.edit.pairs_file import load_pairs
from overpaint.edit.stacking import complete, stack
from overpaint.edit.weight_plot import plot

__all__ = [
    "Change",
    "Collateral",
    "Movement",
    "auto",
    "collateral",
    "complete",
    "debias",
    "dp",
    "export",
    "finetune",
    "hirm",
    "load_pairs",
    "loco",
    "oce",
    "plot",
    "quickfix",
    "random_site",
    "rename",
    "speed",
    "stack",
    "swap_embedding",
    "time",
    "uce",
]
