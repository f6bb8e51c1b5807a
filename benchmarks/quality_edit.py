"""Does an edit erase, redirect and preserve, next to other methods that were tuned by the same rule?

    python benchmarks/quality_edit.py --tune    # chooses every method's settings on the validation concepts
    python benchmarks/quality_edit.py           # runs the test concepts, once
    python benchmarks/quality_edit.py [--tune] --dry-run    # prints numbers of pictures and minutes, draws nothing
    options: [--quick] [--json] [--size N] [--steps S] [--again] [--captions N] [--device D] [--threads N]

Each concept of `edit_concepts.toml` is edited alone by each method of `edit_methods.METHODS` on `icons`, and
`icons-judge` names what the pictures show. `edit_prompts` says what is asked for, `edit_figures` what is counted: the
concept that is left, in trained and in held-out wordings and by synonyms, redirection, what else is kept, everyday
captions that move, seconds and bytes; on a third of the concepts (`edit_attack`) attacks too. Intervals are over
concepts. Then 1, 10 and 50 concepts in one solve, and the kernel distance (KID) of unrelated pictures.

Settings are chosen on validation concepts, for every method by the same successive halving (`edit_tune`), and stored
with all scores, and remarks on numbers at the edge of their grids, in `results/quality_edit_tuning.json`. The contest
does not run without this file, nor if code, grid, concepts, scorer or steps differ from those of the choice.

A test run is written into `results/quality_edit.json` as a look before its first picture (`edit_looks`). A second look
at the same list is refused; with `--again` it runs, and all looks stay in the file. Finished results are stored in
`runs/quality_edit`, so that a run can be stopped at any moment and the same command continues it. `--quick` has a
validation concept, few methods and the first settings of each, and writes to `runs/benchmarks`.

Expected on two cores, at 6.5 pictures a second (`--dry-run` counts anew): `--tune` 19,700 pictures and 1,670 edits in
about 95 minutes, 24 of them for fine-tuning; the test 30,800 pictures, 765 edits and 60 attacks in about 140 minutes,
25 of them for the attacks.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import edit_concepts
import edit_looks
import edit_plan
import edit_run
import edit_tune
import torch
from edit_attack import budget, third
from edit_figures import known
from edit_looks import AlreadyRun
from edit_measure import Bench
from edit_methods import METHODS, OURS, PLAIN, TOKEN_ROWS
from edit_more import kid_rows, many_rows
from edit_prompts import Sizes
from edit_report import as_json, flat, markdown, outcome, tables
from edit_run import Run
from edit_store import ATTACKING, MEASURING, Store, code_of, digest, text_of
from edit_tune import NotTuned

import overpaint as op
from overpaint import files
from overpaint.model import sampling
from overpaint.scorers import judge
from overpaint.trace.provenance import fingerprint, scorer_digest
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
QUICK = (OURS, "quickfix", "uce, to pads", TOKEN_ROWS, "prompt filter", PLAIN)
MANY, UNRELATED = (1, 10, 50), 96
TUNING_SIZE, TEST_SIZE = 4, 12  # pictures of the concept
Lists = Mapping[str, Mapping[str, str]]


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
    is_kept = not (plan.quick or plan.dry_run)
    try:
        with (
            nullcontext("runs/quality_edit") if is_kept else tempfile.TemporaryDirectory() as place
        ):
            if plan.dry_run:
                print(planned(plan, bench, Path(place)))
                return
            result = (tuned if plan.tune else contested)(plan, bench, out, Path(place))
    except (AlreadyRun, NotTuned) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    if plan.json:
        print(files.to_json({**result, "seconds": round(time.perf_counter() - start, 1)}))


def tuned(plan: argparse.Namespace, bench: Bench, out: Path, folder: Path) -> dict[str, float]:
    """Choose the settings of the methods on the validation concepts, write them, and return the best scores."""
    concepts = tuning_concepts(plan)
    sizes = tuning_sizes(plan)
    run = started(plan, bench, folder, sizes)
    layers = edit_tune.layers_by_kind(run, concepts) if "loco" in plan.methods else {}
    run = started(plan, bench, folder, sizes, layers=layers)
    found = edit_tune.tune(run, concepts, plan.methods)
    path = out / "quality_edit_tuning.json"
    if plan.methods != list(METHODS) and path.is_file():  # some methods again
        old = files.from_json(path.read_bytes())
        if old["weights"] == run.weights:
            found = {**old["methods"], **found}
            layers = layers or old["layers"]
    content = {
        "weights": run.weights, "concepts": concepts, "layers": layers, "methods": found,
        "rule": "successive halving by the mean of the harmonic mean of 1 - target and kept over validation concepts",
        "protocol": protocol(plan, run), "commit": card.commit(),
    }  # fmt: skip
    files.write_json(path, content)
    for name, entry in found.items():
        print(f"\n{name}: {entry['chosen']}")
        for row in entry["tried"]:
            scores = (
                f"{key} {known(row[key]):.3f}" for key in ("harmonic", "target", "kept", "refused")
            )
            print(f"  {row['concepts']} concepts, {', '.join(scores)}: {row['settings']}")
    for name, entry in found.items():
        for remark in entry["edges"]:
            print(f"Warning: {name}: {remark}", file=sys.stderr)
    best = {n: best_score(entry) for n, entry in found.items()}
    return {f"{name.replace(', ', '_').replace(' ', '_')}": round(v, 4) for name, v in best.items()}


def best_score(entry: Mapping[str, Any]) -> float:
    """Return the harmonic mean of the chosen settings of a method."""
    return next(known(r["harmonic"]) for r in entry["tried"] if r["settings"] == entry["chosen"])


def contested(plan: argparse.Namespace, bench: Bench, out: Path, folder: Path) -> dict[str, float]:
    """Run the test concepts, write tables and figures, and return the flat figures."""
    path, concepts, together = out / "quality_edit.json", test_concepts(plan), many_concepts(plan)
    many, limit, unrelated = extent(plan)
    attack = third(concepts) if plan.attack else []
    more: dict[str, Any] = {"captions": plan.captions, "attack": attack}
    run = started(plan, bench, folder, test_sizes(plan), **more)
    looks: list[dict[str, Any]] = []
    remarks: dict[str, list[str]] = {}
    if plan.quick:
        chosen = {name: dict(METHODS[name].grid[0]) for name in plan.methods}
    else:
        tuning = edit_tune.load_tuning(
            out / "quality_edit_tuning.json", run, edit_concepts.load()["validation"], plan.methods
        )
        chosen = {name: tuning["methods"][name]["chosen"] for name in plan.methods}
        remarks = {name: tuning["methods"][name]["edges"] for name in plan.methods}
        run = started(plan, bench, folder, test_sizes(plan), **more, layers=tuning["layers"])
        looks = edit_looks.begin(
            path, concepts=concepts, list_digest=digest(concepts), weights=run.weights,
            settings=settings_digest(run, chosen, together), commit=card.commit(), again=plan.again,
        )  # fmt: skip
    asked, rows = edit_run.contest(run, concepts, chosen)
    found = tables(
        rows,
        [one.kind for one in asked],
        chosen,
        many_rows(run, together, many, chosen, limit),
        kid_rows(run, concepts, chosen[OURS], unrelated),
    )
    result = flat(found)
    content = {
        "result": result, "outcome": outcome(found["auto minus the row"]), "tables": found, "settings": chosen,
        "edges": remarks,
        "protocol": protocol(plan, run), "test": {"concepts": concepts, "attacked": attack},
        "commit": looks[-1]["commit"] if looks else card.commit(),
    }  # fmt: skip
    if plan.quick:
        files.write_json(path, as_json(content))
    else:
        edit_looks.finish(path, looks, as_json(content))
    for title, part in found.items():
        print(markdown(title, part))
    print("\nauto, by the paired interval of the harmonic mean:")
    for words, names in content["outcome"].items():
        print(f"  {words}: {', '.join(names) or 'no rival'}")
    return result


def planned(plan: argparse.Namespace, bench: Bench, folder: Path) -> str:
    """Return the numbers of pictures and minutes of a run, as a table; nothing is drawn."""
    if plan.tune:
        run = started(plan, bench, folder, tuning_sizes(plan))
        asked = edit_run.asked_of(run, tuning_concepts(plan))
        return edit_plan.text(edit_plan.tuning_parts(asked, plan.methods))
    concepts, together = test_concepts(plan), many_concepts(plan)
    attack = third(concepts) if plan.attack else []
    run = started(plan, bench, folder, test_sizes(plan), captions=plan.captions, attack=attack)
    asked = edit_run.asked_of(run, concepts)
    many, limit, unrelated = extent(plan)
    parts = edit_plan.test_parts(run, asked, plan.methods, together, many, limit, unrelated)
    return edit_plan.text(parts)


def extent(plan: argparse.Namespace) -> tuple[Sequence[int], int | None, int]:
    """Return how many concepts are edited at once, how many others are then drawn, and the pictures of a KID set."""
    return (MANY[:1], 4, 8) if plan.quick else (MANY, None, UNRELATED)


def many_concepts(plan: argparse.Namespace) -> Mapping[str, str]:
    """Return the pairs that are edited at once."""
    lists = edit_concepts.load()
    return lists["validation"]["object"] if plan.quick else lists["many"]["all"]


def tuning_sizes(plan: argparse.Namespace) -> Sizes:
    """Return the numbers of prompts of the tuning."""
    return small() if plan.quick else Sizes.of(plan.size or TUNING_SIZE, only_trained=True)


def tuning_concepts(plan: argparse.Namespace) -> Lists:
    """Return the validation concepts; one of them for a quick run."""
    concepts = edit_concepts.load()["validation"]
    return first(concepts) if plan.quick else concepts


def test_concepts(plan: argparse.Namespace) -> Lists:
    """Return the test concepts; one validation concept for a quick run."""
    lists = edit_concepts.load()
    return first(lists["validation"]) if plan.quick else lists["test"]


def test_sizes(plan: argparse.Namespace) -> Sizes:
    """Return the numbers of prompts of a test run."""
    return small() if plan.quick else Sizes.of(plan.size or TEST_SIZE)


def started(plan: argparse.Namespace, bench: Bench, folder: Path, sizes: Sizes, **more: Any) -> Run:
    """Return a run whose results are stored below `folder`."""
    part = "validation" if plan.tune or plan.quick else "held out"
    weights, scorer = fingerprint(bench.model), scorer_digest(bench.judge) or ""
    return Run(bench, Store(folder / weights), weights, scorer, sizes, part, **more)


def settings_digest(
    run: Run, chosen: Mapping[str, Mapping[str, Any]], together: Mapping[str, str]
) -> str:
    """Return a digest of everything that the figures of a test depend on beside the list and the weights."""
    code = [text_of(MEASURING), text_of(ATTACKING), {n: code_of(METHODS[n].make) for n in chosen}]
    settings = {
        **run.bench.settings, "scorer": run.scorer, "sizes": vars(run.sizes), "part": run.part, "code": code,
        "captions": run.captions, "attack": list(run.attack), "budget": budget(), "chosen": chosen,
        "layers": run.layers, "many": together,
    }  # fmt: skip
    return digest(settings)


def protocol(plan: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Return the settings of the pictures, ready for JSON."""
    model = run.bench.model
    return {
        **model.protocol(steps=plan.steps, guidance_scale=model.guidance_scale), "weights": run.weights,
        "pictures": vars(run.sizes), "wordings": run.part, "captions": run.captions, "attack": list(run.attack),
        "attack_budget": budget() if run.attack else None, "seed": plan.seed, "quick": plan.quick,
        "judge": "icons-judge", "judge_weights": run.scorer,
        "interval": "95 % bootstrap over concepts; Clopper-Pearson where all agree",
    }  # fmt: skip


def first(concepts: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return the first pair of the first kind."""
    kind, pairs = next(iter(concepts.items()))
    return {kind: dict(list(pairs.items())[:1])}


def small() -> Sizes:
    """Return the numbers of prompts of a quick run."""
    return Sizes(targets=2, wordings=1, others=1, plain=1)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a validation concept, few methods and pictures")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--tune", action="store_true", help="choose the settings on the validation concepts")
    add(
        "--dry-run",
        action="store_true",
        help="print the numbers of pictures and minutes, draw nothing",
    )
    add("--again", action="store_true", help="run test concepts that were run before")
    add("--size", type=int, help="pictures of the concept: 12, and 4 with --tune")
    add("--steps", type=int, help="denoising steps of a picture: 8")
    add("--captions", type=int, default=100, help="everyday captions read for each edit")
    add("--seed", type=int, default=0, help="of prompts and start noise")
    add("--device", default="cpu", help="of model and scorer")
    add("--threads", type=int, default=2, help="of torch")
    add("--methods", nargs="+", choices=list(METHODS), help="with --tune or --quick: these rows")
    plan = parser.parse_args()
    if plan.size is not None and plan.size < TEST_SIZE and not (plan.tune or plan.quick):
        parser.error(
            f"a test has at least {TEST_SIZE} pictures of each concept, got --size {plan.size}."
        )
    if plan.methods and not (plan.tune or plan.quick):
        parser.error("a test has all rows: give --methods with --tune or --quick only.")
    plan.attack = not (plan.tune or plan.quick)
    plan.steps = plan.steps or (4 if plan.quick else 8)
    plan.captions = min(plan.captions, 4) if plan.quick else plan.captions
    plan.methods = plan.methods or list(QUICK if plan.quick else METHODS)
    if plan.quick and not plan.tune:
        plan.methods = list(dict.fromkeys([*plan.methods, OURS, PLAIN]))
    return plan


if __name__ == "__main__":
    main()
