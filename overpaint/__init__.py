"""Overpaint: find where a text-to-image model stores a concept, and edit it there.

Importing the package imports nothing else: each public name is imported when it is first used, so that the command
line starts quickly.

>>> import overpaint as op
>>> probes = op.probes.load("style")
>>> probes[0].prompt
'an apple in noto style'
"""

TYPE_CHECKING = False  # as in `typing`; type checkers take it for true
if TYPE_CHECKING:
    from typing import Any

    from overpaint import (
        edit,
        evaluate,
        image_edit,
        images,
        match,
        metrics,
        optim,
        probes,
        report,
        scene_text,
        scorers,
        trace,
    )
    from overpaint.edit import Change
    from overpaint.errors import (
        CutPromptWarning,
        MissingExtra,
        OverpaintError,
        UnknownSite,
        UnsupportedModel,
    )
    from overpaint.evaluate import Scores
    from overpaint.images import Pictures
    from overpaint.model import Site, TextToImage, load
    from overpaint.trace import Effects

__version__ = "0.1.0"
__all__ = [
    "Change",
    "CutPromptWarning",
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
    "image_edit",
    "images",
    "load",
    "match",
    "metrics",
    "optim",
    "probes",
    "report",
    "scene_text",
    "scorers",
    "trace",
]

# the room of each public name that is not a room itself
_ROOMS = {
    "Change": "edit",
    "CutPromptWarning": "errors",
    "Effects": "trace",
    "MissingExtra": "errors",
    "OverpaintError": "errors",
    "Pictures": "images",
    "Scores": "evaluate",
    "Site": "model",
    "TextToImage": "model",
    "UnknownSite": "errors",
    "UnsupportedModel": "errors",
    "load": "model",
}


def __getattr__(name: str) -> "Any":
    """Import and return a public name at its first use."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'overpaint' has no attribute {name!r}")
    if name in _ROOMS:
        value = getattr(import_module(f"overpaint.{_ROOMS[name]}"), name)
    else:
        value = import_module(f"overpaint.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
