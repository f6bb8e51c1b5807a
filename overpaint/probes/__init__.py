"""What to ask a model: prompts with the words that carry an attribute, and sets of cases that judge an edit."""

from overpaint.probes.files import read
from overpaint.probes.prompts import KINDS, VOCABULARIES, Probe, load
from overpaint.probes.sets import FORMS, Case, EvaluationSet, own, read_set

__all__ = [
    "FORMS",
    "KINDS",
    "VOCABULARIES",
    "Case",
    "EvaluationSet",
    "Probe",
    "load",
    "own",
    "read",
    "read_set",
]
