"""Tuning of `quality_edit`: the settings of every method are chosen on validation concepts, by one rule.

Successive halving. All settings of a method are measured on the first concept of each kind, with whole and with bare
words where it takes both. The better half, rounded up, is measured on the second concept of each kind too, and the
better half of these on the third. The best harmonic mean of efficacy and specificity over all concepts is chosen; of
equal ones the first in the table.
"""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_attack import find_layers
from edit_cost import edit_cost
from edit_figures import Figures, of_concept, ranked, summary
from edit_methods import METHODS, PLAIN
from edit_prompts import Asked
from edit_run import Lists, Progress, Run, asked_of
from edit_store import MEASURING, code_of, digest, text_of

from overpaint import files

__all__ = [
    "NotTuned",
    "circumstances",
    "edges",
    "edits",
    "layers_by_kind",
    "load_tuning",
    "rounds",
    "tune",
]

SCORES = (
    "harmonic", "target", "kept", "redirection", "others_drop", "rest_drop", "seconds", "refused",
)  # fmt: skip
_COMMAND = "python benchmarks/quality_edit.py --tune"
_WORDS = {
    "method": "code of the method", "measuring": "code of the measurement", "grid": "grid of settings",
    "concepts": "validation concepts", "scorer": "scorer", "steps": "denoising steps",
    "guidance_scale": "guidance scale", "scheduler": "scheduler",
}  # fmt: skip


class NotTuned(ValueError):
    """The settings of the methods were not chosen on validation concepts under the present circumstances."""


def rounds(items: Sequence[Asked]) -> list[list[Asked]]:
    """Return the concepts of each round: the first of each kind, then the second of each, and so on."""
    turns: dict[str, int] = {}
    parts: list[list[Asked]] = []
    for one in items:
        turn = turns[one.kind] = turns.get(one.kind, -1) + 1
        parts += [[]] if turn == len(parts) else []
        parts[turn].append(one)
    return parts


def edits(name: str, concepts: Sequence[int]) -> int:
    """Return how many edits the tuning of one method makes.

    Args:
        name: The method.
        concepts: Number of concepts of each round; the settings halve after it.
    """
    settings = len(METHODS[name].grid) + (METHODS[name].subject == "either")
    number = 0
    for count in concepts:
        number += settings * count
        settings = math.ceil(settings / 2)
    return number


def tune(run: Run, concepts: Lists, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for each method the chosen settings, all that were tried, and the circumstances of the choice.

    Each entry of `tried` says on how many concepts it was measured; scores of entries with other numbers cannot be
    compared. `edges` are remarks on chosen numbers at the edge of their grid.
    """
    asked = asked_of(run, concepts)
    parts = rounds(asked)
    sizes = [len(part) for part in parts]
    costs = (edits(n, sizes) * edit_cost(asked[0], n, run.captions) for n in names)
    progress = Progress(sum(costs))
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = _tuned(run, parts, name, progress)
        found[name]["circumstances"] = circumstances(run, concepts, name)
    return found


def _tuned(
    run: Run, parts: Sequence[Sequence[Asked]], name: str, progress: Progress
) -> dict[str, Any]:
    method = METHODS[name]
    pool = [dict(settings) for settings in method.grid]
    figures: dict[str, list[Figures]] = {}

    def measured(settings: Mapping[str, Any], part: Iterable[Asked]) -> None:
        for one in part:
            stored = run.has(one, name, settings)
            row = of_concept(one, run.result(one, name, settings), run.result(one, PLAIN, {}))
            figures.setdefault(digest(settings), []).append(row)
            cost = edit_cost(one, name, run.captions)
            progress.step(f"{name} {dict(settings)}, {one.old}", cost, stored=stored)

    def scores(settings: Mapping[str, Any]) -> dict[str, Any]:
        rows = figures[digest(settings)]
        means = {k: v.mean for k, v in summary(rows).items()}
        found = {k: means.get(k, math.nan) for k in SCORES}
        return {"settings": dict(settings), "concepts": len(rows), **found}

    every = list(pool)
    for number, part in enumerate(parts):
        for settings in pool:
            measured(settings, part)
        if number == 0 and method.subject == "either":
            bare = {**ranked([scores(s) for s in pool])[0]["settings"], "subject": "bare"}
            measured(bare, part)
            pool, every = [*pool, bare], [*every, bare]
        better = ranked([scores(settings) for settings in pool])
        pool = [row["settings"] for row in better[: math.ceil(len(pool) / 2)]]
    chosen = pool[0]
    return {
        "chosen": chosen, "tried": [scores(s) for s in every], "edges": edges(method.grid, chosen)
    }  # fmt: skip


def edges(grid: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> list[str]:
    """Return a remark for each chosen number that is the smallest or the largest of those tried.

    It is compared with the settings of the grid that agree in everything but numbers.
    """

    def form(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in settings.items() if not _is_number(v) and k != "subject"}

    alike = [settings for settings in grid if form(settings) == form(chosen)]
    remarks: list[str] = []
    for name, value in chosen.items():
        values = sorted({s[name] for s in alike if name in s and _is_number(s[name])})
        if _is_number(value) and len(values) > 1 and value in (values[0], values[-1]):
            which, more = ("smallest", "smaller") if value == values[0] else ("largest", "larger")
            tried = f"{len(values)} values tried"
            remarks.append(
                f"`{name}` {value:g} is the {which} of {tried}: add {more} ones to its grid"
            )
    return remarks


def circumstances(run: Run, concepts: Lists, name: str) -> dict[str, Any]:
    """Return what the choice of a method's settings depends on: digests of code, grid, concepts and scorer, and steps.

    Args:
        run: The run; its sizes, seed and device do not count.
        concepts: The validation concepts.
        name: The method.
    """
    known = run.bench.settings
    return {
        "method": code_of(METHODS[name].make), "measuring": text_of(MEASURING),
        "grid": digest([list(METHODS[name].grid), METHODS[name].subject]), "concepts": digest(concepts),
        "scorer": run.scorer, **{key: known[key] for key in ("steps", "guidance_scale", "scheduler")},
    }  # fmt: skip


def load_tuning(path: Path, run: Run, concepts: Lists, names: Sequence[str]) -> dict[str, Any]:
    """Return the contents of the file that `--tune` wrote.

    Args:
        path: The file.
        run: The run that wants the settings.
        concepts: The validation concepts as they are now.
        names: The methods that take part.

    Raises:
        NotTuned: There is no such file, it is of other weights, a method is missing, or the settings of a method were
            chosen under other circumstances.
    """
    advice = f"run `{_COMMAND}` first"
    if not path.is_file():
        raise NotTuned(
            f"there is no {path.name}, which holds the settings of every method: {advice}."
        )
    tuning = files.from_json(path.read_bytes())
    if tuning["weights"] != run.weights:
        raise NotTuned(
            f"{path.name} is of the weights {tuning['weights']}, and the model has {run.weights}: {advice}."
        )
    missing = [name for name in names if name not in tuning["methods"]]
    if missing:
        raise NotTuned(
            f"{path.name} has no settings of {', '.join(missing)}: {_again(missing, names)}."
        )
    changed: dict[str, list[str]] = {}
    for name in names:
        stored = tuning["methods"][name].get("circumstances", {})
        now = files.from_json(files.to_json(circumstances(run, concepts, name)).encode())
        if differing := [_WORDS[key] for key in now if stored.get(key) != now[key]]:
            changed[name] = differing
    if changed:
        reasons = "; ".join(f"{name} ({', '.join(words)})" for name, words in changed.items())
        raise NotTuned(
            f"{path.name} was made under other circumstances for {reasons}: {_again([*changed], names)}."
        )
    return tuning


def layers_by_kind(run: Run, concepts: Lists) -> dict[str, list[int]]:
    """Return the layers for LocoEdit, found on the first concept of each kind."""
    found: dict[str, list[int]] = {}
    for kind, pairs in concepts.items():
        (one,) = asked_of(run, {kind: dict(list(pairs.items())[:1])})
        key = run.key("layers", kind=kind, pair=[one.old, one.new])
        found[kind] = run.store.get(key, lambda one=one: {"at": find_layers(run.bench, one)})["at"]
        print(f"layers for LocoEdit, {kind}: {found[kind]}", flush=True)
    return found


def _again(names: Sequence[str], every: Sequence[str]) -> str:
    if len(names) == len(every):
        return f"run `{_COMMAND}`"
    return f"run `{_COMMAND} --methods {' '.join(map(shlex.quote, names))}`"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
