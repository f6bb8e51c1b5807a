"""Runs of `quality_edit`: every result is stored as soon as it is known, so that a stopped run continues."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edit_attack import attacked, budget
from edit_cost import ATTACK, edit_cost
from edit_figures import Figures, of_concept
from edit_measure import Bench, known_labels, make_edit, measure
from edit_methods import METHODS, PLAIN
from edit_prompts import Asked, Sizes, ask, preserved
from edit_store import ATTACKING, MEASURING, Store, code_of, digest, text_of

from overpaint.train import captions

__all__ = ["Lists", "Progress", "Run", "asked_of", "contest"]

Lists = Mapping[str, Mapping[str, str]]


class Progress:
    """Prints what was done, and the time that is left if the rest costs as much as what was computed so far.

    Args:
        total: Expected cost of all results, attacks among them, in any unit.
        clock: Returns seconds.
        write: Prints a line.
    """

    def __init__(
        self,
        total: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        write: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.total, self.clock, self.write = total, clock, write
        self.done = self.computed = 0.0
        self.start = clock()

    def step(self, label: str, cost: float = 1, *, stored: bool) -> None:
        """Count one result of the expected `cost`; one that was `stored` took no time."""
        self.done += cost
        if stored:
            return
        self.computed += cost
        left = (self.clock() - self.start) / self.computed * max(0.0, self.total - self.done)
        hours, minutes = divmod(round(left / 60), 60)
        share = 100 * self.done / self.total
        self.write(f"{share:.0f} %, about {hours} h {minutes:02} min left: {label}")


@dataclass(frozen=True)
class Run:
    """What the results of a run have in common.

    Attributes:
        bench: Model, scorer and settings.
        store: Finished results.
        weights: Digest of the model's weights.
        scorer: Digest of the scorer's weights.
        sizes: Numbers of prompts.
        part: Which unseen frames and synonyms prompts take: `"validation"`, or `"held out"` for test concepts.
        captions: Everyday captions that are read for each edit; 0 for none.
        attack: The concepts that are attacked.
        layers: Layers for LocoEdit, by kind.
    """

    bench: Bench
    store: Store
    weights: str
    scorer: str
    sizes: Sizes
    part: captions.Part = "validation"
    captions: int = 0
    attack: Sequence[str] = ()
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def key(self, what: str, **more: Any) -> dict[str, Any]:
        """Return the key of a stored result; results of other weights, settings or measurements have other keys."""
        circumstances = {"weights": self.weights, "scorer": self.scorer, **self.bench.settings}
        return {"what": what, **circumstances, "measuring": text_of(MEASURING), **more}

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
        known = {}
        if name != PLAIN:
            known = known_labels(asked.prompts, self.result(asked, PLAIN, {})["labels"])
        found = self.store.get(
            self.picture_key(asked, name, settings),
            lambda: measure(
                self.bench, asked, self._edited(asked, name, settings), captions=self.captions,
                replacement=name == PLAIN, known=known,
            ),
        )  # fmt: skip
        if not self.attacks(asked, name):
            return found
        return found | {
            "attack": self.store.get(
                self.attack_key(asked, name, settings),
                lambda: attacked(self.bench, asked, self._edited(asked, name, settings)),
            )
        }

    def attacks(self, asked: Asked, name: str) -> bool:
        """Return whether the method's edit of the concept is attacked."""
        return METHODS[name].attacked and asked.old in self.attack

    def picture_key(self, asked: Asked, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the key of the pictures of one concept and method."""
        key = self.edit_key("edit", name, settings, {asked.old: asked.new}, {asked.old: asked.kind})
        return key | {"prompts": _prompts_digest(asked), "captions": self.captions}

    def attack_key(self, asked: Asked, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the key of the attack on one concept and method."""
        key = self.edit_key(
            "attack", name, settings, {asked.old: asked.new}, {asked.old: asked.kind}
        )
        attack = {"budget": budget(), "attacking": text_of(ATTACKING)}
        return key | {"prompts": _prompts_digest(asked), **attack}

    def has(self, asked: Asked, name: str, settings: Mapping[str, Any]) -> bool:
        """Return whether everything about one concept and method is stored, the attack too if it is attacked."""
        if not self.store.has(self.picture_key(asked, name, settings)):
            return False
        if not self.attacks(asked, name):
            return True
        return self.store.has(self.attack_key(asked, name, settings))

    def cost(self, asked: Asked, name: str) -> float:
        """Return the expected seconds of one concept and method, with the attack if it is attacked."""
        attack = ATTACK if self.attacks(asked, name) else 0.0
        return edit_cost(asked, name, self.captions) + attack

    def _edited(self, asked: Asked, name: str, settings: Mapping[str, Any]) -> Any:
        edit = make_edit(
            self.bench, METHODS[name], settings, {asked.old: asked.new}, {asked.old: asked.kind},
            self.layers.get(asked.kind),
        )  # fmt: skip
        if edit.refused:
            print(f"{name} refuses {asked.old} → {asked.new}: {edit.refused}", flush=True)
        return edit


def asked_of(run: Run, concepts: Lists) -> list[Asked]:
    """Return the prompts of all concepts, which are given by kind."""
    return [
        ask(
            kind, old, new, labels=run.bench.judge.labels, held_out=sorted(run.bench.model.held_out),
            sizes=run.sizes, seed=run.bench.seed + 10_000 * index, part=run.part,
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
    asked = asked_of(run, concepts)
    progress = Progress(sum(run.cost(one, name) for one in asked for name in chosen))
    rows: dict[str, list[Figures]] = {name: [] for name in chosen}
    for one in asked:
        plain = run.result(one, PLAIN, {})
        for name, settings in chosen.items():
            stored = run.has(one, name, settings)
            rows[name].append(of_concept(one, run.result(one, name, settings), plain))
            progress.step(f"{one.old} → {one.new}, {name}", run.cost(one, name), stored=stored)
    return asked, rows


def _prompts_digest(asked: Asked) -> str:
    return digest([[p.text, p.seed, p.role] for p in asked.prompts])


def _each(concepts: Lists) -> Iterator[tuple[str, str, str]]:
    for kind, pairs in concepts.items():
        for old, new in pairs.items():
            yield kind, old, new
