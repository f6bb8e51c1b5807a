"""Does an edit erase, redirect and preserve, next to other methods that were tuned by the same rule?

    python benchmarks/quality_edit.py --tune    # chooses every method's settings on the validation concepts
    python benchmarks/quality_edit.py           # runs the test concepts, once
    options: [--quick] [--json] [--size N] [--steps S] [--no-attack] [--again] [--captions N] [--device D] [--threads N]

Each concept of `edit_concepts.toml` is edited alone by each method of `edit_methods.METHODS` on `icons`, and
`icons-judge` names what the pictures show. `edit_prompts` says what is asked for, `edit_figures` what is counted: the
concept that is left, in trained and in held-out wordings and by synonyms, redirection, what else is kept, everyday
captions that move, attacks, seconds and bytes. Intervals are over concepts. Then 1, 10 and 50 concepts in
one solve, and the kernel distance (KID) of unrelated pictures.

Settings are chosen on validation concepts, for every method by the best harmonic mean of efficacy and specificity, and
stored with all scores in `results/quality_edit_tuning.json`. The contest does not run without this file. A second run
of the same test concepts on the same weights is refused; with `--again` it runs, and the result counts the looks.

Finished results are stored in `runs/quality_edit`, so that a stopped run can continue. Writes
`benchmarks/results/quality_edit.json`; `--quick` has a validation concept, few methods and the first settings of each,
and writes to `runs/benchmarks`.
"""

import argparse
import datetime
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edit_concepts
import edit_run
import torch
from edit_measure import Bench
from edit_methods import METHODS, OURS
from edit_more import kid_rows, many_rows
from edit_prompts import Sizes
from edit_report import as_json, flat, markdown, tables
from edit_run import PLAIN, NotTuned, Run
from edit_store import AlreadyRun, Store, digest, earlier_looks, refuse_second_run

import overpaint as op
from overpaint import files
from overpaint.model import sampling
from overpaint.scorers import judge
from overpaint.trace.provenance import fingerprint
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
QUICK = (OURS, "quickfix", "uce, to pads", "token rows", "prompt filter", PLAIN)
MANY, UNRELATED = (1, 10, 50), 96
TUNING_SIZE = 4


def main() -> None:
    """Run the benchmark."""
    plan = arguments()
    start = time.perf_counter()
    torch.set_num_threads(plan.threads)
    model = op.load("icons", device=plan.device)
    model.pipe.scheduler = sampling.make_scheduler(model, "dpm")  # few steps, close to many
    bench = Bench(model, judge.load(device=plan.device), plan.steps, plan.seed)
    out = Path("runs/benchmarks") if plan.quick else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    try:
        result = (tuned if plan.tune else contested)(plan, bench, out)
    except (AlreadyRun, NotTuned) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    if plan.json:
        print(files.to_json({**result, "seconds": round(time.perf_counter() - start, 1)}))


def tuned(plan: argparse.Namespace, bench: Bench, out: Path) -> dict[str, float]:
    """Choose the settings of the methods on the validation concepts, write them, and return the best scores."""
    concepts: Mapping[str, Mapping[str, str]] = edit_concepts.load()["validation"]
    if plan.quick:
        concepts = first(concepts)
    sizes = small() if plan.quick else Sizes.of(plan.size or TUNING_SIZE, only_trained=True)
    run = started(plan, bench, sizes, captions=0)
    layers = edit_run.layers_by_kind(run, concepts) if "loco" in plan.methods else {}
    run = started(plan, bench, sizes, captions=0, layers=layers)
    found = edit_run.tune(run, concepts, plan.methods)
    path = out / "quality_edit_tuning.json"
    if plan.methods != list(METHODS) and path.is_file():  # some methods again
        old = files.from_json(path.read_bytes())
        if old["weights"] == run.weights:
            found = {**old["methods"], **found}
            layers = layers or old["layers"]
    content = {
        "weights": run.weights, "concepts": concepts, "layers": layers, "methods": found,
        "rule": "best harmonic mean of 1 - target and kept, averaged over validation concepts",
        "protocol": protocol(plan, run), "commit": card.commit(),
    }  # fmt: skip
    files.write_json(path, content)
    for name, entry in found.items():
        print(f"\n{name}: {entry['chosen']}")
        for row in entry["tried"]:
            scores = (f"{key} {row[key]:.3f}" for key in ("harmonic", "target", "kept", "refused"))
            print(f"  {', '.join(scores)}: {row['settings']}")
    best = {n: max(row["harmonic"] for row in entry["tried"]) for n, entry in found.items()}
    return {f"{name.replace(', ', '_').replace(' ', '_')}": round(v, 4) for name, v in best.items()}


def contested(plan: argparse.Namespace, bench: Bench, out: Path) -> dict[str, float]:
    """Run the test concepts, write tables and figures, and return the flat figures."""
    lists = edit_concepts.load()
    concepts: Mapping[str, Mapping[str, str]] = lists["test"]
    weights, path = fingerprint(bench.model), out / "quality_edit.json"
    looks: list[dict[str, Any]] = []
    if plan.quick:
        concepts = first(lists["validation"])
        chosen = {name: dict(METHODS[name].grid[0]) for name in plan.methods}
        layers: Mapping[str, Sequence[int]] = {}
        sizes, many, unrelated = small(), MANY[:1], 8
    else:
        looks = earlier_looks(path, digest(concepts))
        refuse_second_run(looks, weights, path, plan.again)
        tuning = edit_run.load_tuning(out / "quality_edit_tuning.json", weights, plan.methods)
        chosen = {name: tuning["methods"][name]["chosen"] for name in plan.methods}
        layers = tuning["layers"]
        sizes, many, unrelated = Sizes.of(plan.size or Sizes().targets), MANY, UNRELATED
    run = started(plan, bench, sizes, captions=plan.captions, layers=layers)
    together = lists["validation"]["object"] if plan.quick else lists["many"]["all"]
    asked, rows = edit_run.contest(run, concepts, chosen)
    found = tables(
        rows,
        [one.kind for one in asked],
        chosen,
        many_rows(run, together, many, chosen, 4 if plan.quick else None),
        kid_rows(run, concepts, chosen[OURS], unrelated),
    )
    for title, part in found.items():
        print(markdown(title, part))
    result = flat(found)
    look = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "list": digest(concepts), "weights": weights,
        "commit": card.commit(), "again": plan.again,
    }  # fmt: skip
    content = {
        "result": result, "tables": found, "settings": chosen, "protocol": protocol(plan, run),
        "test": {"concepts": concepts, "looks": [*looks, look]}, "commit": card.commit(),
    }  # fmt: skip
    files.write_json(path, as_json(content))
    return result


def started(plan: argparse.Namespace, bench: Bench, sizes: Sizes, **more: Any) -> Run:
    """Return a run whose results are stored; those of a quick run in a folder of its own."""
    weights = fingerprint(bench.model)
    folder = Path("runs/quality_edit") / (f"quick-{os.getpid()}" if plan.quick else weights)
    return Run(bench, Store(folder), weights, sizes, attack=plan.attack and not plan.tune, **more)


def protocol(plan: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Return the settings of the pictures, ready for JSON."""
    model = run.bench.model
    return {
        **model.protocol(steps=plan.steps, guidance_scale=model.guidance_scale), "weights": run.weights,
        "pictures": {"target": run.sizes.targets, "wording": run.sizes.wordings, "others": run.sizes.others,
                     "each": run.sizes.each, "plain": run.sizes.plain},
        "captions": run.captions, "attack": run.attack, "seed": plan.seed, "quick": plan.quick, "judge": "icons-judge",
        "interval": "95 % bootstrap over concepts; Clopper-Pearson where all agree",
    }  # fmt: skip


def first(concepts: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return the first pair of the first kind."""
    kind, pairs = next(iter(concepts.items()))
    return {kind: dict(list(pairs.items())[:1])}


def small() -> Sizes:
    """Return the numbers of prompts of a quick run."""
    return Sizes(targets=2, wordings=1, others=1, each=1, plain=1)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a validation concept, few methods and pictures")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--tune", action="store_true", help="choose the settings on the validation concepts")
    add("--again", action="store_true", help="run test concepts that were run before")
    add("--no-attack", action="store_true", help="leave the attacks out, which take long")
    add("--size", type=int, help="pictures of the concept: 12, and 4 with --tune")
    add("--steps", type=int, help="denoising steps of a picture: 8")
    add("--captions", type=int, default=100, help="everyday captions read for each edit")
    add("--seed", type=int, default=0, help="of prompts and start noise")
    add("--device", default="cpu", help="of model and scorer")
    add("--threads", type=int, default=2, help="of torch")
    add("--methods", nargs="+", choices=list(METHODS), help="with --tune or --quick: these rows")
    plan = parser.parse_args()
    if plan.methods and not (plan.tune or plan.quick):
        parser.error("a test has all rows: give --methods with --tune or --quick only.")
    plan.attack = not (plan.no_attack or plan.quick)
    plan.steps = plan.steps or (4 if plan.quick else 8)
    plan.captions = min(plan.captions, 4) if plan.quick else plan.captions
    plan.methods = plan.methods or list(QUICK if plan.quick else METHODS)
    if plan.quick and not plan.tune:
        plan.methods = list(dict.fromkeys([*plan.methods, OURS, PLAIN]))
    return plan


if __name__ == "__main__":
    main()
