"""Two further parts of `quality_edit`: many concepts in one solve, and the distance of unrelated pictures (KID)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_cost import QUICK, RATE, SECONDS
from edit_measure import NOTHING, known_labels, labelled, make_edit
from edit_methods import METHODS, OURS, PLAIN
from edit_prompts import Prompt
from edit_run import Progress, Run
from edit_store import digest, text_of
from torch import Tensor

from overpaint import metrics
from overpaint.errors import later_seed
from overpaint.metrics import share
from overpaint.probes import questions

__all__ = ["kid_rows", "many_pictures", "many_rows", "untouched"]

_CODE = (Path(__file__),)


def untouched(
    labels: Mapping[str, Sequence[str]], pairs: Mapping[str, str], limit: int | None = None
) -> list[str]:
    """Return the objects, logos, persons and flags that no pair edits; with `limit`, so many of them."""
    return [name for name in labels["object"] if name not in pairs][:limit]


def many_pictures(name: str, count: int, others: int) -> int:
    """Return how many pictures the row of one method and number of concepts needs."""
    return 2 * count + (0 if METHODS[name].local else others)


def many_rows(
    run: Run,
    pairs: Mapping[str, str],
    counts: Sequence[int],
    chosen: Mapping[str, Mapping[str, Any]],
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return the figures of the first `counts` of `pairs` in one solve: target left, redirection, others kept.

    Each concept is drawn twice. *Kept* is the share of all labels outside `pairs` that are still recognised, of those
    that the unedited model draws; with `limit`, of so many of them.
    """
    labels = run.bench.judge.labels
    names, styles = untouched(labels, pairs, limit), labels["style"]
    others = [
        _prompt(name, i, "" if questions.is_sign(name) else styles[i % len(styles)], run.bench.seed)
        for i, name in enumerate(names)
    ]
    before = run.store.get(
        run.key("many, unedited", code=text_of(_CODE), prompts=_digest(others)),
        lambda: {"labels": labelled(run.bench, others, NOTHING)},
    )["labels"]
    right = [i for i, name in enumerate(names) if before[i]["object"] == name]
    methods = [name for name in chosen if METHODS[name].many]
    costs = {
        (count, name): many_pictures(name, count, len(others)) / RATE + SECONDS.get(name, QUICK)
        for count in counts for name in methods
    }  # fmt: skip
    progress = Progress(sum(costs.values()))
    rows: list[dict[str, Any]] = []
    for count in counts:
        part = dict(list(pairs.items())[:count])
        for name in methods:
            found, stored = _many(run, name, chosen[name], part, others, before)
            olds = [old for old in part for _ in range(2)]
            seen = [row["object"] for row in found["targets"]]
            kept = [found["others"][i]["object"] == names[i] for i in right]
            rows.append({
                "concepts": count, "method": name, "refused": found["refused"],
                "left": share([s == old for s, old in zip(seen, olds, strict=True)], groups=olds),
                "redirection": share([s == part[o] for s, o in zip(seen, olds, strict=True)], groups=olds),
                "kept": share(kept), "seconds": round(found["seconds"], 2),
            })  # fmt: skip
            line = f"{count} at once, {name}: left {rows[-1]['left']}, kept {rows[-1]['kept']}"
            progress.step(line, costs[count, name], stored=stored)
    return rows


def _many(
    run: Run,
    name: str,
    settings: Mapping[str, Any],
    pairs: Mapping[str, str],
    others: Sequence[Prompt],
    before: Sequence[Mapping[str, str]],
) -> tuple[dict[str, Any], bool]:
    """Return the labels of one method's edit of all `pairs`, and whether they were stored."""
    kinds = dict.fromkeys(pairs, "object")
    twice = [old for old in pairs for _ in range(2)]
    targets = [_prompt(old, i, "", run.bench.seed) for i, old in enumerate(twice)]

    def compute() -> dict[str, Any]:
        edit = make_edit(run.bench, METHODS[name], settings, pairs, kinds)
        known = known_labels(others, before)
        return {
            "targets": labelled(run.bench, targets, edit),
            "others": labelled(run.bench, others, edit, known),
            "seconds": edit.seconds, "refused": edit.refused,
        }  # fmt: skip

    key = run.edit_key("many", name, settings, pairs, kinds)
    key |= {"code": [key["code"], text_of(_CODE)], "prompts": _digest([*targets, *others])}
    stored = run.store.has(key)
    return run.store.get(key, compute), stored


def _digest(prompts: Sequence[Prompt]) -> str:
    return digest([[p.text, p.seed] for p in prompts])


def _prompt(name: str, index: int, style: str, seed: int) -> Prompt:
    """Return a short prompt for an object; two in a row have different frames and seeds."""
    text = questions.caption(name, style, "", frame=index)
    return Prompt(text, later_seed(seed, index), "many", {"object": name})


def kid_rows(
    run: Run,
    concepts: Mapping[str, Mapping[str, str]],
    settings: Mapping[str, Any],
    number: int,
) -> list[dict[str, Any]]:
    """Return the KID (x 1,000) of `number` pictures of objects after an edit by `auto` to those of other seeds.

    There is one edit of each kind, and two rows of the unedited model with different seeds. `p` is the share of random
    splits with a KID that is at least as large.
    """
    objects = [o for o in run.bench.judge.labels["object"] if not questions.is_sign(o)]
    words = [
        questions.caption(objects[(7 * i) % len(objects)], "", "", frame=i) for i in range(number)
    ]
    sets = [
        [later_seed(run.bench.seed, 100_000 * k + i) for i in range(number)] for k in range(1, 4)
    ]

    @functools.cache
    def plain(index: int) -> Tensor:
        return read(sets[index])

    def read(seeds: Sequence[int]) -> Tensor:
        unit = run.bench.judge.image_features(run.bench.draw(words, seeds))
        return unit.double() * unit.shape[1] ** 0.5

    def edited(kind: str, pair: Mapping[str, str]) -> Tensor:
        layers = run.layers.get(kind)
        edit = make_edit(run.bench, METHODS[OURS], settings, pair, dict.fromkeys(pair, kind), layers)  # fmt: skip
        with edit.applied(run.bench.model):
            return read(sets[0])

    def row(
        name: str, first: Callable[[], Tensor], pair: Mapping[str, str], kind: str = ""
    ) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            test = metrics.kid_test(first(), plain(1), groups=(words, words))
            return {"set": name, "kid": round(1000 * test.value, 3), "p": round(test.p, 3)}

        method, chosen = (OURS, settings) if pair else (PLAIN, {})
        key = run.edit_key("kid", method, chosen, pair, dict.fromkeys(pair, kind))
        key |= {"set": name, "prompts": digest([words, sets]), "more": text_of(_CODE)}
        return run.store.get(key, compute)

    rows = [
        row("two sets of seeds", lambda: plain(0), {}),
        row("two other sets of seeds", lambda: plain(2), {}),
    ]
    for kind, pairs in concepts.items():
        pair = dict(list(pairs.items())[:1])
        name = f"{kind}: {next(iter(pair))}, against other seeds"
        rows.append(row(name, functools.partial(edited, kind, pair), pair, kind))
    return rows
