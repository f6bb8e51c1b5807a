"""Expected seconds of the parts of `quality_edit`, on two cores that do nothing else."""

from edit_methods import METHODS, PLAIN
from edit_prompts import TARGETS, Asked

__all__ = ["ATTACK", "LAYERS", "QUICK", "RATE", "SECONDS", "edit_cost", "pictures"]

RATE = 6.5  # pictures a second, 8 steps, with text features and labels
ATTACK = 25.0  # seconds of one attack
LAYERS = 15.0  # seconds of finding LocoEdit's layers for one kind
_READING = 0.006  # seconds of an everyday caption, read with and without an edit
SECONDS = {
    "auto": 4.0, "auto, weight tuned": 4.0, "finetune": 20.0, "oce": 1.5, "speed": 1.0, "hirm": 0.7, "dp": 0.5,
    "uce, to pads": 0.6, "prompt filter": 0.0, "no edit": 0.0,
}  # fmt: skip
"""Seconds of one edit by its first settings; `QUICK` for a method that is not listed."""
QUICK = 0.2


def pictures(asked: Asked, name: str) -> int:
    """Return how many pictures one concept and method needs, those of the unedited model not counted twice."""
    if name == PLAIN:
        return len(asked.prompts)
    method = METHODS[name]
    roles = [p.role for p in asked.prompts if p.role != "replacement"]
    if method.rewrites:  # the prompts of `target` become those of `replacement`
        return sum(role in TARGETS[1:] for role in roles)
    return sum(role in TARGETS or not method.local for role in roles)


def edit_cost(asked: Asked, name: str, captions: int) -> float:
    """Return the expected seconds of one edit and its pictures.

    Args:
        asked: The concept and its prompts.
        name: The method.
        captions: Everyday captions that are read.
    """
    reading = 0.0 if name == PLAIN or METHODS[name].rewrites else _READING * captions
    return pictures(asked, name) / RATE + SECONDS.get(name, QUICK) + reading
