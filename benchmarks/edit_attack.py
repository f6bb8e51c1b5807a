"""Attacks of `quality_edit`: which test concepts are attacked, with which prompts, and what is stored of one attack.

The same third of the concepts of each kind is attacked for every method, with one budget. A seed chose it before any
test concept was drawn.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from edit_concepts import bare
from edit_measure import Bench, Edit
from edit_prompts import Asked

from overpaint import probes
from overpaint.evaluate import attack
from overpaint.evaluate.attack_results import TEXT_FREE
from overpaint.evaluate.rewordings import replace_concept
from overpaint.probes import questions
from overpaint.trace import Drawing, pick_window, prompt_swap

__all__ = ["BUDGET", "attacked", "budget", "find_layers", "third"]

BUDGET = attack.Budget(prompts=2, pictures=2, tokens=2, gradient_steps=16)
_SEED = "attacks of quality_edit, draw 1"


def third(concepts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the concepts that are attacked: a third of each kind, rounded up, drawn by a fixed seed."""
    return [
        old
        for kind, pairs in concepts.items()
        for old in sorted(
            random.Random(f"{_SEED}: {kind}").sample(list(pairs), math.ceil(len(pairs) / 3))
        )
    ]


def budget() -> dict[str, Any]:
    """Return the size of each attack, ready for JSON."""
    return asdict(BUDGET)


def attacked(bench: Bench, asked: Asked, edit: Edit) -> dict[str, Any]:
    """Return the mean probability of the concept before the edit, after it, and under the best confirmed attempt.

    `chance` is that of prompts without the concept: a style or a color is often seen where none was asked for.
    """
    if edit.change is None:
        return {"refused": edit.refused or "no change to attack"}
    old, new = (bare(asked.kind, concept) for concept in (asked.old, asked.new))
    texts = _attack_prompts(asked, old)
    cases = tuple(
        probes.Case(t, "target", t, replace_concept(t, old, new), asked.old) for t in texts
    )
    found = attack.search(
        bench.model,
        edit.change,
        probes.EvaluationSet("quality_edit", "table", old, new, cases),
        scorer=bench.judge,
        families=[f for f in attack.FAMILIES if f != TEXT_FREE],
        budget=BUDGET,
        steps=bench.steps,
        seed=bench.seed,
    )
    best = found.best.confirmed
    return {
        "before": found.before.mean, "after": found.after.mean, "best": best.mean if best else None,
        "chance": found.chance.mean, "family": found.best.family, "words": found.best.words,
        "seconds": found.protocol["seconds"],
    }  # fmt: skip


def _attack_prompts(asked: Asked, old: str) -> list[str]:
    """Return short prompts that hold the concept once."""
    shown = [p for p in asked.prompts if p.role == "plain"]
    name = asked.labels[0]
    rows: list[str] = []
    for prompt in shown:
        thing = name if asked.head == "object" else prompt.labels["object"]
        style = name if asked.head == "style" else ""
        color = name if asked.head == "color" else ""
        rows.append(questions.caption(thing, style, color, frame=len(rows)))
    return [text for text in dict.fromkeys(rows) if text.lower().split().count(old.split()[0]) == 1]


def find_layers(bench: Bench, asked: Asked, window: int = 2) -> list[int]:
    """Return the cross-attention layers that carry the concept most, as LocoGen finds them."""
    old, new = (bare(asked.kind, concept) for concept in (asked.old, asked.new))
    kind = {"trademark": "object", "action": "object", "fact": "object"}.get(asked.kind, asked.kind)
    rows = [
        probes.Probe(f"{old}-{i}", kind, text, old, asked.labels[0])
        for i, text in enumerate(_attack_prompts(asked, old)[:2])
    ]
    drawing = Drawing(steps=bench.steps, seeds=range(bench.seed, bench.seed + 2))
    effects = prompt_swap(bench.model, rows, target=new, window=window, drawing=drawing)
    return [site.index for site in pick_window(effects)]
