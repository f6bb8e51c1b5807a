"""Runs of `quality_edit`: every result is stored, so that a stopped run continues; settings are chosen by one rule."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edit_figures import Figures, best_settings, of_concept, summary
from edit_measure import Bench, attacked, find_layers, make_edit, measure
from edit_methods import METHODS
from edit_prompts import Asked, Sizes, ask, preserved
from edit_store import Store, code_of, digest

from overpaint import files
from overpaint.evaluate.attack import Budget

__all__ = [
    "NotTuned",
    "Progress",
    "Run",
    "asked_of",
    "contest",
    "layers_by_kind",
    "load_tuning",
    "tune",
]

PLAIN = "no edit"
BUDGET = Budget(prompts=2, pictures=2, tokens=2, gradient_steps=16)
SCORES = (
    "harmonic", "target", "kept", "redirection", "others_drop", "rest_drop", "seconds", "refused",
)  # fmt: skip
Lists = Mapping[str, Mapping[str, str]]


class NotTuned(ValueError):
    """The settings of the methods were not chosen on validation concepts of these weights."""


class Progress:
    """Prints what was done, and the time that is left if the rest takes as long as what was computed so far.

    Args:
        total: Number of results.
        clock: Returns seconds.
        write: Prints a line.
    """

    def __init__(
        self,
        total: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        write: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.total, self.clock, self.write = total, clock, write
        self.done = self.computed = 0
        self.start = clock()

    def step(self, label: str, *, stored: bool) -> None:
        """Count one result; one that was `stored` took no time."""
        self.done += 1
        if stored:
            return
        self.computed += 1
        left = (self.clock() - self.start) / self.computed * (self.total - self.done)
        hours, minutes = divmod(round(left / 60), 60)
        self.write(f"{self.done}/{self.total}, about {hours} h {minutes:02} min left: {label}")


@dataclass(frozen=True)
class Run:
    """What the results of a run have in common.

    Attributes:
        bench: Model, scorer and settings.
        store: Finished results.
        weights: Digest of the model's weights.
        sizes: Numbers of prompts.
        captions: Everyday captions that are read for each edit; 0 for none.
        attack: Whether attacks are run.
        layers: Layers for LocoEdit, by kind.
    """

    bench: Bench
    store: Store
    weights: str
    sizes: Sizes
    captions: int = 0
    attack: bool = False
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def key(self, what: str, **more: Any) -> dict[str, Any]:
        """Return the key of a stored result; results of other weights or settings have other keys."""
        settings = {"weights": self.weights, "steps": self.bench.steps, "seed": self.bench.seed}
        return {"what": what, **settings, **more}

    def edit_key(
        self, what: str, name: str, settings: Mapping[str, Any], pairs: Mapping[str, str], kinds: Mapping[str, str]
    ) -> dict[str, Any]:  # fmt: skip
        """Return the key of a result of an edit; rows that make the same edit share it."""
        method = METHODS[name]
        made = {"make": method.make.__name__, "rewrites": method.rewrites, "plain": name == PLAIN}
        layers = self.layers.get(next(iter(kinds.values()))) if name == "loco" else None
        kept = preserved(pairs, kinds, self.bench.judge.labels)
        return self.key(
            what, **made, settings=dict(settings), pairs=dict(pairs), preserve=digest(kept),
            code=code_of(method.make), layers=list(layers) if layers else None,
        )  # fmt: skip

    def result(self, asked: Asked, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the measurements of one concept and method, with those of an attack if it is attacked."""
        method, kinds = METHODS[name], {asked.old: asked.kind}
        pairs = {asked.old: asked.new}
        prompts = digest([[p.text, p.seed, p.role] for p in asked.prompts])

        def edited() -> Any:
            edit = make_edit(
                self.bench, method, settings, pairs, kinds, self.layers.get(asked.kind)
            )
            if edit.refused:
                print(f"{name} refuses {asked.old} → {asked.new}: {edit.refused}", flush=True)
            return edit

        more = {"prompts": prompts, "captions": self.captions}
        key = self.edit_key("edit", name, settings, pairs, kinds) | more
        found = self.store.get(
            key,
            lambda: measure(
                self.bench, asked, edited(), captions=self.captions, replacement=name == PLAIN
            ),
        )
        if not (self.attack and method.attacked):
            return found
        key = self.edit_key("attack", name, settings, pairs, kinds) | {"prompts": prompts}
        return found | {
            "attack": self.store.get(key, lambda: attacked(self.bench, asked, edited(), BUDGET))
        }

    def has(self, asked: Asked, name: str, settings: Mapping[str, Any]) -> bool:
        """Return whether the pictures of one concept and method are stored."""
        prompts = digest([[p.text, p.seed, p.role] for p in asked.prompts])
        key = self.edit_key("edit", name, settings, {asked.old: asked.new}, {asked.old: asked.kind})
        return self.store.has(key | {"prompts": prompts, "captions": self.captions})


def asked_of(bench: Bench, concepts: Lists, sizes: Sizes) -> list[Asked]:
    """Return the prompts of all concepts, which are given by kind."""
    return [
        ask(
            kind, old, new, labels=bench.judge.labels, held_out=sorted(bench.model.held_out), sizes=sizes,
            seed=bench.seed + 10_000 * index,
        )
        for index, (kind, old, new) in enumerate(_each(concepts))
    ]  # fmt: skip


def contest(
    run: Run, concepts: Lists, chosen: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Asked], dict[str, list[Figures]]]:
    """Return the concepts, and the figures of each concept by method.

    Args:
        run: Where results are computed and stored.
        concepts: Pairs by kind.
        chosen: Settings of each method that takes part.
    """
    asked = asked_of(run.bench, concepts, run.sizes)
    progress = Progress(len(asked) * len(chosen))
    rows: dict[str, list[Figures]] = {name: [] for name in chosen}
    for one in asked:
        plain = run.result(one, PLAIN, {})
        for name, settings in chosen.items():
            stored = run.has(one, name, settings)
            rows[name].append(of_concept(one, run.result(one, name, settings), plain))
            progress.step(f"{one.old} → {one.new}, {name}", stored=stored)
    return asked, rows


def tune(run: Run, concepts: Lists, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for each method the chosen settings, and all settings that were tried with their scores.

    The best harmonic mean of efficacy and specificity is chosen, over validation concepts. Where a method takes whole
    and bare words, the settings are compared with whole words, and the best of them is tried with bare words too.
    """
    asked = asked_of(run.bench, concepts, run.sizes)
    grids = {name: len(METHODS[name].grid) + (METHODS[name].subject == "either") for name in names}
    progress = Progress(len(asked) * sum(grids.values()))

    def tried(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        rows: list[Figures] = []
        for one in asked:
            stored = run.has(one, name, settings)
            plain = run.result(one, PLAIN, {})
            rows.append(of_concept(one, run.result(one, name, settings), plain))
            progress.step(f"{name} {dict(settings)}, {one.old}", stored=stored)
        means = {k: v.mean for k, v in summary(rows).items()}
        return {"settings": dict(settings), **{k: means.get(k, math.nan) for k in SCORES}}

    result: dict[str, dict[str, Any]] = {}
    for name in names:
        rows = [tried(name, settings) for settings in METHODS[name].grid]
        best = best_settings(rows)
        if METHODS[name].subject == "either":
            rows.append(tried(name, {**best["settings"], "subject": "bare"}))
            best = best_settings(rows)
        code = code_of(METHODS[name].make)
        result[name] = {"chosen": best["settings"], "tried": rows, "code": code}
    return result


def layers_by_kind(run: Run, concepts: Lists) -> dict[str, list[int]]:
    """Return the layers for LocoEdit, found on the first concept of each kind."""
    found: dict[str, list[int]] = {}
    for kind, pairs in concepts.items():
        (one,) = asked_of(run.bench, {kind: dict(list(pairs.items())[:1])}, run.sizes)
        key = run.key("layers", kind=kind, pair=[one.old, one.new])
        found[kind] = run.store.get(key, lambda one=one: {"at": find_layers(run.bench, one)})["at"]
        print(f"layers for LocoEdit, {kind}: {found[kind]}", flush=True)
    return found


def load_tuning(path: Path, weights: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the contents of the file that `--tune` wrote.

    Raises:
        NotTuned: There is no such file, it is of other weights, or a method is missing.
    """
    advice = "run `python benchmarks/quality_edit.py --tune` first"
    if not path.is_file():
        raise NotTuned(f"there is no {path.name}, which holds the settings of every method: {advice}.")  # fmt: skip
    tuning = files.from_json(path.read_bytes())
    if tuning["weights"] != weights:
        raise NotTuned(
            f"{path.name} is of the weights {tuning['weights']}, and the model has {weights}: {advice}."
        )
    missing = [name for name in names if name not in tuning["methods"]]
    if missing:
        raise NotTuned(f"{path.name} has no settings of {', '.join(missing)}: {advice}.")
    return tuning


def _each(concepts: Lists) -> Iterator[tuple[str, str, str]]:
    for kind, pairs in concepts.items():
        for old, new in pairs.items():
            yield kind, old, new
