"""Does an edit erase, redirect and preserve, on thirty concepts of six kinds, and for how many concepts at once?

    python benchmarks/quality_edit.py [--quick] [--json] [--size N] [--steps S] [--threads N]

Five concepts of each kind (styles, objects, trademarks, colors, actions, facts) are edited one at a time by every
method on `icons`. `icons-judge` classifies the pictures of the same prompts and start noise. The figures of each method
are shares of pictures, with 95 % intervals over concepts (see `metrics.share`):

  - target: pictures of the concept that are still recognised as it; `before` is the share in the unedited model;
  - redirection: pictures of the concept recognised as its replacement; `replacement, unedited` is the share for the
    unedited model's pictures of the replacement, an upper bound;
  - others_drop, rest_drop: labels that are no longer recognised, of other concepts of the kind and of other kinds;
  - harmonic: harmonic mean of efficacy (1 - target) and specificity (share of all other labels still recognised).

Then the same for 1, 5, 10, 25 and 50 concepts in one solve. Then the kernel distance (KID) between pictures of
unrelated prompts after an edit and pictures of the unedited model from other seeds, with a permutation test; the KID of
two sets of seeds of the unedited model is shown for comparison.

The objects in the evaluated prompts are not used to fit edits or in preserve lists, and `auto` fills its captions
without their names. Finished concepts are stored in `runs/quality_edit`, so that a stopped run can continue.
Writes `benchmarks/results/quality_edit.json`.
"""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import overpaint as op
from overpaint import evaluate, files, metrics
from overpaint.edit import Change
from overpaint.evaluate.results import Comparison, Scores
from overpaint.metrics import Interval, paired_share, share
from overpaint.model import sampling
from overpaint.probes import questions
from overpaint.scorers import judge as features
from overpaint.trace.provenance import fingerprint

RESULTS = Path(__file__).parent / "results"
STEPS, SIZE = 8, 3
CONCEPTS = {
    "style": {
        "openmoji style": "noto style", "high contrast style": "twemoji style", "fluent style": "blob style",
        "blob style": "fluent style", "twemoji style": "openmoji style",
    },
    "object": {
        "cat": "dog", "banana": "lemon", "rocket": "airplane", "umbrella": "balloon", "castle": "house",
    },
    "trademark": {
        "apple logo": "twitter logo", "python logo": "swift logo", "facebook logo": "dropbox logo",
        "chrome logo": "opera logo", "ubuntu logo": "vue logo",
    },
    "color": {
        "red background": "blue background", "green background": "white background",
        "yellow background": "gray background", "purple background": "orange background",
        "pink background": "green background",
    },
    "action": {
        "person running": "person walking", "person biking": "person golfing", "person surfing": "person swimming",
        "person bowing": "person juggling", "person golfing": "person running",
    },
    "fact": {
        "flag of france": "flag of italy", "flag of japan": "flag of china", "flag of canada": "flag of switzerland",
        "flag of brazil": "flag of india", "flag of greece": "flag of finland",
    },
}  # fmt: skip
MANY = (1, 5, 10, 25, 50)
OURS = "auto"
LAYER = "auto, layer only"  # the same without the token embedding


def methods(
    model: op.TextToImage, known: Sequence[str], evaluated: Sequence[str]
) -> dict[str, Callable[[dict[str, str]], Change]]:
    """Return a function for each method, by name, that returns its change for some pairs.

    `evaluated` are the objects of the evaluated prompts.
    """
    return {
        OURS: lambda pairs: op.edit.auto(
            model, pairs, vocabulary=known, without=evaluated, tokens=True
        ),
        LAYER: lambda pairs: op.edit.auto(
            model, pairs, vocabulary=known, without=evaluated, tokens=False
        ),
        "quickfix": lambda pairs: op.edit.quickfix(model, pairs),
        "uce": lambda pairs: op.edit.uce(model, pairs),
        "time": lambda pairs: op.edit.time(model, pairs),
        "loco": lambda pairs: op.edit.loco(model, pairs),
        "swap embedding": lambda pairs: op.edit.swap_embedding(model, pairs),
    }


def concept_scores(
    model: op.TextToImage, judge: features.Judge, kind: str, old: str, new: str, plan: Any
) -> tuple[dict[str, Scores], bool]:
    """Return the scores of every method for one concept, and whether `auto` moves the token embedding alone.

    Stored scores are read from disk. The scores of `auto` are stored under the digest of its change, because other
    settings give another change; the scores of the other methods are stored separately.
    """
    edits = methods(model, *questions.split_concepts(judge.labels))
    options: dict[str, Any] = {
        "scorer": judge, "size": plan.size, "steps": plan.steps, "seed": plan.seed, "gallery": 1,
    }  # fmt: skip
    name = hashlib.sha256(f"{kind} {old} {new}".encode()).hexdigest()[:12]
    ours = {n: edits.pop(n)({old: new}) for n in (OURS, LAYER)}
    digests = "-".join(change.digest[:12] for change in ours.values())
    automatic = stored_scores(plan.folder / f"{name}-{digests}", model, lambda: ours, options)
    rivals = stored_scores(
        plan.folder / name,
        model,
        lambda: {n: edit({old: new}) for n, edit in edits.items()},
        options,
    )
    return {**rivals, **automatic}, ours[OURS].sites == ("text.token_embedding",)


def stored_scores(
    folder: Path,
    model: op.TextToImage,
    changes: Callable[[], Mapping[str, Change]],
    options: dict[str, Any],
) -> Mapping[str, Scores]:
    """Return the scores stored in `folder`; if there are none, compute the changes, score them and store the scores."""
    if not (folder / "comparison.json").exists():
        evaluate.compare(model, changes(), **options).save(folder)
    return Comparison.load(folder).scores


def replacement_share(model: op.TextToImage, judge: features.Judge, new: str, plan: Any) -> float:
    """Return the share of the unedited model's pictures of the replacement that are recognised as it."""
    kind, label = questions.parse_concept(new, judge.labels)
    prompts = questions.build(
        kind, label, labels=judge.labels, held_out=model.held_out, size=plan.size, seed=plan.seed
    )
    prompts = tuple(q for q in prompts if q.role == "target")
    labels = judge.predict(
        draw(model, [q.prompt for q in prompts], [q.seed for q in prompts], plan), kind
    )
    return sum(v == label for v in labels) / len(prompts)


def draw(model: op.TextToImage, prompts: Sequence[str], seeds: Sequence[int], plan: Any) -> Tensor:
    return (
        model.generate(list(prompts), seed=list(seeds), steps=plan.steps, batch_size=64)
        .images.float()
        .cpu()
    )


def specificity(score: Scores) -> float:
    """Return the share of the correct labels before the edit that are correct after it, without the erased concept."""
    pairs = list(score.specificity.values())
    before = sum(p.before.mean * p.before.n for p in pairs if p.before.n)
    after = sum(p.after.mean * p.after.n for p in pairs if p.after.n)
    return min(1.0, after / before) if before else math.nan


def harmonic(score: Scores) -> float:
    """Return the harmonic mean of efficacy and specificity."""
    a, b = 1 - score.efficacy.after.mean, specificity(score)
    return 2 * a * b / max(a + b, 1e-9)


def summary(scores: Sequence[Scores], ceilings: Sequence[float]) -> dict[str, Interval]:
    """Return the figures of one method, as means over concepts.

    `ceilings` are the results of `replacement_share`.
    """
    others = [s.specificity[s.kind].drop for s in scores]
    rest = [
        (s.erase, p.drop)
        for s in scores
        for k, p in s.specificity.items()
        if k != s.kind and p.before.n
    ]
    return {
        "before": share([s.efficacy.before.mean for s in scores]),
        "target": share([s.efficacy.after.mean for s in scores]),
        "unseen wordings": share([s.generality["unseen wordings"].after.mean for s in scores]),
        "redirection": share([s.redirection.after.mean for s in scores]),
        "replacement, unedited": share(ceilings),
        "others_drop": paired_share([0.0] * len(others), others),
        "rest_drop": paired_share(
            [0.0] * len(rest), [drop for _, drop in rest], groups=[erase for erase, _ in rest]
        ),
        "kept": share([specificity(s) for s in scores]),
        "harmonic": share([harmonic(s) for s in scores]),
    }


def many_pairs(labels: Mapping[str, Sequence[str]], count: int) -> dict[str, str]:
    """Return `count` pairs of objects, logos, flags and persons, each replaced by one that is not edited."""
    names = sorted(labels["object"], key=lambda n: hashlib.sha256(f"many {n}".encode()).hexdigest())
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(questions.family(name), []).append(name)
    result: dict[str, str] = {}
    for family in families.values():
        half = len(family) // 2
        result |= dict(zip(family[:half], family[half:], strict=False))
    order = sorted(result, key=lambda n: hashlib.sha256(f"order {n}".encode()).hexdigest())
    return {name: result[name] for name in order[:count]}


def many_rows(model: op.TextToImage, judge: features.Judge, plan: Any) -> list[dict[str, Any]]:
    """Return the figures of 1 to 50 concepts in one solve: target, redirection, unedited objects still recognised."""
    all_pairs = many_pairs(judge.labels, MANY[-1])
    untouched = [n for n in judge.labels["object"] if n not in all_pairs]
    styles = judge.labels["style"]
    words = [
        questions.caption(n, "" if questions.is_sign(n) else styles[i % len(styles)], "")
        for i, n in enumerate(untouched)
    ]
    captions = {n: [questions.caption(n, "", "", frame=f) for f in range(2)] for n in all_pairs}
    rows: list[dict[str, Any]] = []
    edits = methods(model, *questions.split_concepts(judge.labels))
    seeds = [plan.seed + i for i in range(len(words))]
    before = judge.predict(draw(model, words, seeds, plan), "object")
    right = [v == n for v, n in zip(before, untouched, strict=True)]
    for count in plan.many:
        pairs = dict(list(all_pairs.items())[:count])
        prompts = [p for n in pairs for p in captions[n]]
        prompt_seeds = [plan.seed + i for i in range(len(prompts))]
        for name in (OURS, LAYER, "quickfix", "uce"):
            start = time.perf_counter()
            change = edits[name](pairs)
            seconds = time.perf_counter() - start
            with change.applied(model):
                labels = judge.predict(draw(model, prompts, prompt_seeds, plan), "object")
                after = judge.predict(draw(model, words, seeds, plan), "object")
            concepts = [
                n for n in pairs for _ in captions[n]
            ]  # two captions of a concept are one unit
            still = [v == n for v, n in zip(labels, concepts, strict=True)]
            moved = [v == pairs[n] for v, n in zip(labels, concepts, strict=True)]
            same = [v == n for v, n, r in zip(after, untouched, right, strict=True) if r]
            rows.append({"concepts": count, "method": name, "target": share(still, groups=concepts),
                         "redirection": share(moved, groups=concepts), "kept": share(same),
                         "seconds": round(seconds, 2)})  # fmt: skip
    return rows


def kid_rows(model: op.TextToImage, judge: features.Judge, plan: Any) -> list[dict[str, Any]]:
    """Return the KID (x 1,000) between pictures of unrelated prompts after an edit and unedited ones from other seeds.

    There is one edit of each kind. Two more rows have the KID of two sets of seeds of the unedited model. `p` is the
    share of random splits with a KID that is at least as large.
    """
    objects = [o for o in judge.labels["object"] if not questions.is_sign(o)]
    sets = [[plan.seed + 100_000 * k + i for i in range(plan.unrelated)] for k in range(3)]
    words = [
        questions.caption(objects[(7 * i) % len(objects)], "", "", frame=i)
        for i in range(plan.unrelated)
    ]

    def read(seeds: Sequence[int]) -> Tensor:
        unit = judge.image_features(draw(model, words, seeds, plan))
        return unit.double() * unit.shape[1] ** 0.5

    def row(name: str, first: Tensor, second: Tensor) -> dict[str, Any]:
        test = metrics.kid_test(first, second, groups=(words, words))
        return {"set": name, "kid": round(1000 * test.value, 3), "p": round(test.p, 3)}

    first, second, third = (read(seeds) for seeds in sets)
    rows = [
        row("two sets of seeds", first, second),
        row("two other sets of seeds", third, second),
    ]
    edits = methods(model, *questions.split_concepts(judge.labels))
    for kind, pairs in plan.concepts.items():
        old, new = next(iter(pairs.items()))
        for name in (OURS, LAYER):
            with edits[name]({old: new}).applied(model):
                rows.append(
                    row(f"{kind}: {old}, {name}, against other seeds", read(sets[0]), second)
                )
    return rows


def table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return a Markdown table."""
    names = list(rows[0])
    lines = [f"\n### {title}\n", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(r[n]) for n in names) + " |" for r in rows)])


def plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
    return value


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two concepts, few pictures, same code"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--size", type=int, default=SIZE, help="questions for each concept of the kind"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps of a picture")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--concepts", type=int, default=5, help="of each kind")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    plan = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(plan.threads)
    model, judge = op.load("icons"), features.load()
    model.pipe.scheduler = sampling.make_scheduler(model, "dpm")  # few steps, close to many
    plan.concepts = {k: dict(list(v.items())[: plan.concepts]) for k, v in CONCEPTS.items()}
    plan.many, plan.unrelated = MANY, 96
    if plan.quick:
        plan.size, plan.steps, plan.many, plan.unrelated = 1, 4, (2,), 16
        plan.concepts = {"style": {"openmoji style": "noto style"}}
    name = f"{fingerprint(model)}-{plan.size}-{plan.steps}-{plan.seed}"
    plan.folder = Path("runs/quality_edit") / (f"quick-{os.getpid()}" if plan.quick else name)
    by_method: dict[str, list[Scores]] = {}
    ceilings: list[float] = []
    kinds: list[str] = []
    plan.rows_alone = 0
    for kind, pairs in plan.concepts.items():
        for old, new in pairs.items():
            scores, rows_alone = concept_scores(model, judge, kind, old, new, plan)
            plan.rows_alone += rows_alone
            ceilings.append(replacement_share(model, judge, new, plan))
            kinds.append(kind)
            for method, score in scores.items():
                by_method.setdefault(method, []).append(score)
            ours = scores[OURS]
            print(f"{kind}: {old} → {new}: target {ours.efficacy.after}, redirection {ours.redirection.after}, "
                  f"kept {specificity(ours):.2f}, {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    report(
        plan,
        model,
        by_method,
        ceilings,
        kinds,
        many_rows(model, judge, plan),
        kid_rows(model, judge, plan),
        start,
    )


def report(
    plan: Any,
    model: op.TextToImage,
    by_method: Mapping[str, Sequence[Scores]],
    ceilings: Sequence[float],
    kinds: Sequence[str],
    many: Sequence[dict[str, Any]],
    kids: Sequence[dict[str, Any]],
    start: float,
) -> None:
    """Print and write all tables and the flat figures."""
    whole = {name: summary(scores, ceilings) for name, scores in by_method.items()}
    overall = [{"method": name, **figures} for name, figures in whole.items()]
    by_kind = [
        {"kind": kind, "method": name,
         **summary([s for s, k in zip(scores, kinds, strict=True) if k == kind],
                   [c for c, k in zip(ceilings, kinds, strict=True) if k == kind])}
        for kind in dict.fromkeys(kinds) for name, scores in by_method.items()
    ]  # fmt: skip
    tables = {"overall": overall, "by kind": by_kind, "many": list(many), "kid": list(kids)}
    for title, rows in tables.items():
        print(table(rows, title))
    ours = whole[OURS]
    rivals = [f["harmonic"].mean for name, f in whole.items() if name not in (OURS, LAYER)]
    layer = whole[LAYER]
    last = [row for row in many if row["method"] == OURS][-1]
    result = {
        "target_before": ours["before"].mean, "target_after": ours["target"].mean,
        "redirection": ours["redirection"].mean, "redirection_unedited": ours["replacement, unedited"].mean,
        "others_drop": ours["others_drop"].mean, "rest_drop": ours["rest_drop"].mean, "kept": ours["kept"].mean,
        "harmonic": ours["harmonic"].mean, "best_rival": max(rivals),
        "layer_target_after": layer["target"].mean, "layer_redirection": layer["redirection"].mean,
        "layer_others_drop": layer["others_drop"].mean, "layer_rest_drop": layer["rest_drop"].mean,
        "layer_harmonic": layer["harmonic"].mean,
        "concepts": len(kinds), "in_embedding_alone": plan.rows_alone,
        "beats_all": float(ours["harmonic"].mean > max(rivals)),
        f"kept_at_{last['concepts']}": last["kept"].mean, f"target_at_{last['concepts']}": last["target"].mean,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    result = {key: round(value, 4) for key, value in result.items()}
    protocol = {**model.protocol(steps=plan.steps, guidance_scale=model.guidance_scale), "weights": fingerprint(model),
                "concepts": plan.concepts, "size": plan.size, "seed": plan.seed, "quick": plan.quick,
                "judge": "icons-judge",
                "interval": "95 % bootstrap over concepts; Clopper-Pearson where all agree"}  # fmt: skip
    content = {
        name: [{k: plain(v) for k, v in row.items()} for row in rows]
        for name, rows in tables.items()
    }
    out = Path("runs/benchmarks") if plan.quick else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(
        out / "quality_edit.json", {"result": result, "tables": content, "protocol": protocol}
    )
    if plan.json:
        print(files.to_json(result))


if __name__ == "__main__":
    main()
