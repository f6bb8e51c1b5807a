"""What to ask a model: prompts with the words that carry an attribute."""

from overpaint.probes.files import read
from overpaint.probes.prompts import KINDS, VOCABULARIES, Probe, load

__all__ = ["KINDS", "VOCABULARIES", "Probe", "load", "read"]
