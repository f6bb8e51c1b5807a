"""Overpaint: find where an image model keeps what it knows, and paint over it.

>>> import overpaint as op
>>> probes = op.probes.load("style")
>>> probes[0].prompt
'an apple in noto style'
"""

from overpaint import (
    edit,
    evaluate,
    match,
    optim,
    probes,
    report,
    trace,
)
from overpaint.edit import Change
from overpaint.errors import MissingExtra, OverpaintError, UnknownSite, UnsupportedModel
from overpaint.evaluate.results import Scores
from overpaint.images.pictures import Pictures
from overpaint.model import TextToImage, load
from overpaint.model.sites import Site
from overpaint.trace import Effects

__version__ = "0.1.0"
__all__ = [
    "Change",
    "Effects",
    "MissingExtra",
    "OverpaintError",
    "Pictures",
    "Scores",
    "Site",
    "TextToImage",
    "UnknownSite",
    "UnsupportedModel",
    "edit",
    "evaluate",
    "load",
    "match",
    "optim",
    "probes",
    "report",
    "trace",
]
