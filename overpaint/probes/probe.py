"""Probe: a prompt, and the words in it that carry an attribute; the tables they are read from.

A table (`<kind>.toml`) holds one section a vocabulary: `icons`, in the wording that the shipped model
was trained on, and `natural`, for models of photographs. Each states its source and licence. The natural lists
are our own, as large as those of arXiv:2310.13730 seem to be; its lists are not published.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "VOCABULARIES", "Probe", "fill", "load"]

KINDS = ("style", "object", "color", "action", "viewpoint", "fact", "count", "trademark")
VOCABULARIES = ("icons", "natural")
_TABLES = Path(__file__).parent


@dataclass(frozen=True)
class Probe:
    """A question to a model.

    Attributes:
        id: Unique among probes; also seeds the noise that corrupts it.
        kind: The attribute: `"style"`, `"object"`, and so on.
        prompt: The whole caption.
        concept: The words of `prompt` that carry the attribute.
        label: What a judge should see if the attribute is there; the concept if not said.
        source: Where the prompt comes from.
        licence: SPDX name of its licence.
        seed: Start noise of its picture, where the prompt comes with one.
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
        ValueError: No such kind or vocabulary, or the vocabulary cannot say it.
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
    return fill(tables[vocabulary], kind, vocabulary)


def fill(table: dict[str, Any], kind: str, name: str) -> tuple[Probe, ...]:
    """Return the probes of one section of a table, every choice of the slots, the last slot moving fastest.

    Args:
        table: `source`, `licence` and `prompts`: templates with their concept, label, and lists of words for the slots.
        kind: The attribute.
        name: What the probes' ids begin with.
    """
    filled = [probe for entry in table["prompts"] for probe in _fill(entry)]
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


def _fill(entry: dict[str, Any]) -> Iterator[dict[str, str]]:
    slots = {name: values for name, values in entry.items() if isinstance(values, list)}
    for chosen in product(*slots.values()):
        words = dict(zip(slots, chosen, strict=True))
        yield {
            "prompt": _articles(entry["template"].format(**words)),
            "concept": entry["concept"].format(**words),
            "label": entry.get("label", entry["concept"]).format(**words),
        }


def _articles(text: str) -> str:
    """Write `an` for `a(n)` before a vowel and `a` elsewhere."""
    return re.sub(r"\ba\(n\)(?= [aeiou])", "an", text, flags=re.I).replace("a(n)", "a")
