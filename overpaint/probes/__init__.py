"""Prompts: probes with the words that carry an attribute, and evaluation sets for one edit."""

from overpaint.probes.csv_files import load_file
from overpaint.probes.english import frequent_words, names
from overpaint.probes.evaluation_sets import (
    FORMS,
    Case,
    EvaluationSet,
    load_set,
    load_shipped_set,
)
from overpaint.probes.everyday_captions import everyday
from overpaint.probes.probe import KINDS, VOCABULARIES, Probe, load

__all__ = [
    "FORMS",
    "KINDS",
    "VOCABULARIES",
    "Case",
    "EvaluationSet",
    "Probe",
    "everyday",
    "frequent_words",
    "load",
    "load_file",
    "load_set",
    "load_shipped_set",
    "names",
]
