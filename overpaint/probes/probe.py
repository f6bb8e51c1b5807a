"""Probe: a prompt and the words in it that carry an attribute; and the tables of probes in this package.

A table (`<kind>.toml`) holds one section for each vocabulary: `icons`, in the wording that the shipped model was
trained on, and `natural`, for models of photographs. Each section states its source and licence. The natural lists
were written for this package. They are about as large as those of arXiv:2310.13730, which are not published.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from overpaint.errors import check_one_text
from overpaint.probes.text import MOST, combinations, fill_articles, fill_slots

__all__ = ["KINDS", "VOCABULARIES", "Probe", "fill_table", "load"]

KINDS = ("style", "object", "color", "action", "viewpoint", "fact", "count", "trademark")
VOCABULARIES = ("icons", "natural")
_TABLES = Path(__file__).parent


@dataclass(frozen=True)
class Probe:
    """A prompt for tracing.

    Attributes:
        id: Unique among probes; it also seeds the noise that corrupts the prompt.
        kind: The attribute: `"style"`, `"object"`, and so on.
        prompt: The whole caption.
        concept: The words of `prompt` that carry the attribute.
        label: Label that a classifier gives to a picture with the attribute; `concept` by default.
        source: Origin of the prompt.
        licence: SPDX name of its licence.
        seed: Seed of the start noise, if the prompt comes with one.
    """

    id: str
    kind: str
    prompt: str
    concept: str
    label: str = ""
    source: str = ""
    licence: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "concept"):
            check_one_text(
                getattr(self, name),
                f"`{name}`",
                "make a probe for each; traces take several probes",
            )
        if self.concept.lower() not in self.prompt.lower() or not self.concept.strip():
            raise ValueError(
                f"concept {self.concept!r} is not in the prompt {self.prompt!r}: "
                "write it there in the same words."
            )
        if not self.label:
            object.__setattr__(self, "label", self.concept)


def load(kind: str, *, vocabulary: str = "icons") -> tuple[Probe, ...]:
    """Return the probes of one kind of attribute, in the order of the table.

    Args:
        kind: One of `KINDS`.
        vocabulary: `"icons"` for the model that ships with the package, `"natural"` for others.

    Raises:
        ValueError: There is no such kind or vocabulary, or no such kind in this vocabulary.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of probe {kind!r}: choose one of {', '.join(KINDS)}.")
    if vocabulary not in VOCABULARIES:
        raise ValueError(
            f"unknown vocabulary {vocabulary!r}: choose one of {', '.join(VOCABULARIES)}."
        )
    tables = tomllib.loads((_TABLES / f"{kind}.toml").read_text(encoding="utf-8"))
    if vocabulary not in tables:
        raise ValueError(
            f"there are no {vocabulary!r} probes of kind {kind!r}: choose vocabulary {', '.join(tables)}."
        )
    return fill_table(tables[vocabulary], kind, vocabulary)


def fill_table(table: dict[str, Any], kind: str, name: str) -> tuple[Probe, ...]:
    """Return the probes of one section of a table: each template with every combination of its slots.

    The last slot changes fastest.

    Args:
        table: `source`, `licence` and `prompts`: templates with their concept, label, and lists of words for the slots.
        kind: The attribute.
        name: Prefix of the probes' ids.
    """
    every = (probe for entry in table["prompts"] for probe in _fill_entry(entry))
    filled = list(islice(every, MOST + 1))
    if len(filled) > MOST:
        raise ValueError(f"the templates of {name!r} give more than {MOST} prompts: remove some")
    return tuple(
        Probe(
            f"{name}-{kind}-{number:03d}",
            kind,
            texts["prompt"],
            texts["concept"],
            texts["label"],
            table["source"],
            table["licence"],
        )
        for number, texts in enumerate(filled)
    )


def _fill_entry(entry: dict[str, Any]) -> Iterator[dict[str, str]]:
    slots: dict[str, list[str]] = {
        name: values for name, values in entry.items() if isinstance(values, list)
    }
    for words in combinations(slots):
        yield {
            "prompt": fill_articles(fill_slots(entry["template"], words)),
            "concept": fill_slots(entry["concept"], words),
            "label": fill_slots(entry.get("label", entry["concept"]), words),
        }
