"""Two further parts of `quality_edit`: many concepts in one solve, and the distance of unrelated pictures (KID)."""

from collections.abc import Mapping, Sequence
from typing import Any

from edit_measure import Edit, labelled, make_edit
from edit_methods import METHODS, OURS
from edit_prompts import Prompt
from edit_run import PLAIN, Run
from torch import Tensor

from overpaint import metrics
from overpaint.errors import later_seed
from overpaint.metrics import share
from overpaint.probes import questions

__all__ = ["kid_rows", "many_rows"]

_NOTHING = Edit(None, {}, 0.0)


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
    untouched = [name for name in labels["object"] if name not in pairs][:limit]
    styles = labels["style"]
    others = [
        _prompt(name, i, "" if questions.is_sign(name) else styles[i % len(styles)], run.bench.seed)
        for i, name in enumerate(untouched)
    ]
    before = run.store.get(
        run.key("many, unedited", names=untouched),
        lambda: {"labels": labelled(run.bench, others, _NOTHING)},
    )["labels"]
    right = [i for i, name in enumerate(untouched) if before[i]["object"] == name]
    rows: list[dict[str, Any]] = []
    for count in counts:
        part = dict(list(pairs.items())[:count])
        for name in (n for n in chosen if METHODS[n].many):
            found = _many(run, name, chosen[name], part, others)
            olds = [old for old in part for _ in range(2)]
            seen = [row["object"] for row in found["targets"]]
            kept = [found["others"][i]["object"] == untouched[i] for i in right]
            rows.append({
                "concepts": count, "method": name, "refused": found["refused"],
                "left": share([s == old for s, old in zip(seen, olds, strict=True)], groups=olds),
                "redirection": share([s == part[o] for s, o in zip(seen, olds, strict=True)], groups=olds),
                "kept": share(kept), "seconds": round(found["seconds"], 2),
            })  # fmt: skip
            print(f"{count} at once, {name}: left {rows[-1]['left']}, kept {rows[-1]['kept']}", flush=True)  # fmt: skip
    return rows


def _many(
    run: Run,
    name: str,
    settings: Mapping[str, Any],
    pairs: Mapping[str, str],
    others: Sequence[Prompt],
) -> dict[str, Any]:
    kinds = dict.fromkeys(pairs, "object")
    twice = [old for old in pairs for _ in range(2)]
    targets = [_prompt(old, i, "", run.bench.seed) for i, old in enumerate(twice)]

    def compute() -> dict[str, Any]:
        edit = make_edit(run.bench, METHODS[name], settings, pairs, kinds)
        return {
            "targets": labelled(run.bench, targets, edit), "others": labelled(run.bench, others, edit),
            "seconds": edit.seconds, "refused": edit.refused,
        }  # fmt: skip

    key = run.edit_key("many", name, settings, pairs, kinds)
    return run.store.get(key | {"others": len(others)}, compute)


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

    def read(seeds: Sequence[int]) -> Tensor:
        unit = run.bench.judge.image_features(run.bench.draw(words, seeds))
        return unit.double() * unit.shape[1] ** 0.5

    def row(name: str, first: Tensor, second: Tensor) -> dict[str, Any]:
        test = metrics.kid_test(first, second, groups=(words, words))
        return {"set": name, "kid": round(1000 * test.value, 3), "p": round(test.p, 3)}

    def compute() -> dict[str, Any]:
        first, second, third = (read(seeds) for seeds in sets)
        rows = [
            row("two sets of seeds", first, second),
            row("two other sets of seeds", third, second),
        ]
        for kind, pairs in concepts.items():
            pair = dict(list(pairs.items())[:1])
            edit = make_edit(run.bench, METHODS[OURS], settings, pair, dict.fromkeys(pair, kind))
            with edit.applied(run.bench.model):
                rows.append(
                    row(f"{kind}: {next(iter(pair))}, against other seeds", read(sets[0]), second)
                )
        return {"rows": rows}

    code = run.edit_key("kid", OURS, settings, {}, {PLAIN: PLAIN})["code"]
    key = run.key("kid", concepts={k: dict(v) for k, v in concepts.items()}, number=number)
    return run.store.get(key | {"settings": dict(settings), "code": code}, compute)["rows"]
