"""Is the preserve weight that `edit.auto` chooses from text alone on the Pareto front measured in pictures?

    python benchmarks/quality_front.py [--quick] [--json] [--threads N]

Two concepts that no other benchmark uses are edited in one text layer, with each preserve weight that `auto` tries. Two
figures of each edit are computed from text: the missed target movement and the drift of other captions, as in
`report["scan"]`. `icons-judge` measures three in pictures: the share still recognised as the concept (`target`), the
share recognised as the replacement (`redirection`), and the share of other labels that are lost (`lost`). A weight is
on the front if no other weight is at least as good in all aims and better in one. There are two fronts. The first has
the aims `target` and `lost`. The second also has `redirection`, because a weight can erase the concept without drawing
the replacement. Spearman's rank correlation shows how well the drift from text predicts the lost labels.
Writes `benchmarks/results/quality_front.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import overpaint as op
from overpaint import evaluate, files, metrics
from overpaint.edit.methods.preserve_search import WEIGHTS
from overpaint.evaluate.results import Scores
from overpaint.model import sampling
from overpaint.probes import questions
from overpaint.scorers import judge as features
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
CONCEPTS = {"noto style": "openmoji style", "dog": "bear"}


def rows(
    model: op.TextToImage,
    judge: features.Judge,
    pair: dict[str, str],
    weights: Sequence[float],
    *,
    size: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Return one row for each weight: figures computed from text, and figures that the judge measured in pictures."""
    known, evaluated = questions.split_concepts(judge.labels)
    options: dict[str, Any] = {"vocabulary": known, "without": evaluated, "tokens": False}
    changes = {f"{w:g}": op.edit.auto(model, pair, preserve_weight=w, **options) for w in weights}
    (chosen,) = (
        row["preserve_weight"]
        for row in op.edit.auto(model, pair, repair=False, **options).report["scan"]
        if row["chosen"]
    )
    scores = evaluate.compare(
        model, changes, scorer=judge, size=size, steps=steps, gallery=1
    ).scores
    results: list[dict[str, Any]] = []
    for weight, (name, change) in zip(weights, changes.items(), strict=True):
        score = scores[name]
        results.append(
            {
                "concept": next(iter(pair)),
                "weight": weight,
                "chosen": weight == chosen,
                "missed": round(change.report["layer_missed"], 4),
                "drift": round(change.report["layer_drift"], 5),
                "target": score.efficacy.after.mean,
                "redirection": score.redirection.after.mean,
                "intervals": {
                    "target": bounds(score.efficacy.after),
                    "redirection": bounds(score.redirection.after),
                },
                "missing": 1 - score.redirection.after.mean,
                "lost": round(lost(score), 4),
            }
        )
    return [
        {
            **row,
            "on_front": on_front(row, results, ("target", "lost")),
            "on_front_of_three": on_front(row, results, ("target", "lost", "missing")),
        }
        for row in results
    ]


def bounds(interval: metrics.Interval) -> list[float]:
    """Return the bounds of an interval, rounded."""
    return [round(interval.low, 3), round(interval.high, 3)]


def lost(score: Scores) -> float:
    """Return the share of the correct labels before the edit that are wrong after it."""
    pairs = [p for p in score.specificity.values() if p.before.n]
    before = sum(p.before.mean * p.before.n for p in pairs)
    return 1 - sum(p.after.mean * p.after.n for p in pairs) / before if before else 0.0


def on_front(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], aims: Sequence[str]
) -> bool:
    """Return True if no row is at most as large as `row` in all aims and smaller in one."""
    values = [row[aim] for aim in aims]
    others = [[other[aim] for aim in aims] for other in rows]
    return not any(
        o != values and all(a <= b for a, b in zip(o, values, strict=True)) for o in others
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one concept, two weights")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    plan = parser.parse_args()
    torch.set_num_threads(plan.threads)
    start = time.perf_counter()
    model, judge = op.load("icons"), features.load()
    model.pipe.scheduler = sampling.make_scheduler(model, "dpm")  # few steps, close to many
    concepts, weights, size, steps = CONCEPTS, WEIGHTS, 4, 8
    if plan.quick:
        concepts, weights, size, steps = {"dog": "bear"}, (5.0, 15.0), 1, 4
    results = [
        row
        for old, new in concepts.items()
        for row in rows(model, judge, {old: new}, weights, size=size, steps=steps)
    ]
    for row in results:
        fronts = "".join(
            f"  {key.removeprefix('on_').replace('_', ' ')}"
            for key in ("on_front", "on_front_of_three")
            if row[key]
        )
        print(
            f"{row['concept']:12} weight {row['weight']:<5g}{' chosen' if row['chosen'] else '':8}"
            f"missed {row['missed']:.3f}  drift {row['drift']:.4f}  | "
            f"target {row['target']:.2f} {row['intervals']['target']}  "
            f"redirection {row['redirection']:.2f} {row['intervals']['redirection']}  lost {row['lost']:.3f}{fronts}"
        )
    drifts = [(row["drift"], row["lost"]) for row in results]
    chosen = [row for row in results if row["chosen"]]
    result = {
        "chosen_on_front": sum(row["on_front"] for row in chosen) / max(len(chosen), 1),
        "chosen_on_front_of_three": sum(row["on_front_of_three"] for row in chosen)
        / max(len(chosen), 1),
        "chosen_lost": sum(row["lost"] for row in chosen) / max(len(chosen), 1),
        "drift_to_lost": round(metrics.spearman(*(list(x) for x in zip(*drifts, strict=True))), 3),
        "seconds": round(time.perf_counter() - start, 1),
    }
    out = Path("runs/benchmarks") if plan.quick else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    protocol = {
        **model.protocol(steps=steps, guidance_scale=model.guidance_scale),
        "concepts": concepts, "weights": weights, "size": size, "quick": plan.quick,
    }  # fmt: skip
    content = {"result": result, "rows": results, "protocol": protocol, "commit": card.commit()}
    files.write_json(out / "quality_front.json", content)
    if plan.json:
        print(files.to_json(result))


if __name__ == "__main__":
    main()
