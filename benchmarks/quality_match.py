"""Where is the matcher better than methods without a model, where not, and does its diffusion reduce the error?

    python benchmarks/quality_match.py [--quick] [--json] [--pairs N] [--matcher FOLDER]
                                       [--control FOLDER ...] [--seed-folder FOLDER ...]

Test pairs, of seven photographs held out of training: four synthetic sets of 256x256 pixels (plain, textureless,
repetitive, large), warped by other families than in training; layered pairs, and pairs of the training's families; the
first four under noise, blur and JPEG (severity 3 of ImageNet-C, on both pictures); graf1 and graf3 both ways;
motorcycle and aloe (depth edges); the corners of 13 pairs of chessboards (cv2.findChessboardCorners).

Measured for each method: the mean end-point error (AEPE, pixels) and the part of the pixels within 1 and 5 pixels
(PCK), where the ground truth lies in the source; the difference to the matcher on the same pairs. Intervals are 95 %
bootstrap over photographs, each with all of its pairs, since pairs of one photograph are not independent; over so few
photographs they are wide. Then: the error by family of warps; no refinement by optical flow, and without it fewer steps
and hypotheses; no fine stage and controls (the same network trained to predict once), both ways; other training seeds;
whether the spread predicts the error (Spearman, AUSE), compared with the distance between the flow of the coarse stage
alone and that of both, which exists for a single prediction too, and with the cycle error of the initial flow; seconds
and peak resident memory of a match at 512x512 in a process of its own.

Baselines are those of `match_baselines.py`: the initial flow from pictures of 256x256, the matcher's input size, and of
512x512, which suits the larger scenes; four of them refined by optical flow like the matcher. Of three median filters
the one with the lowest error on a set is used, in favour of the baseline.

Takes about an hour with the default pairs on two cores (two processes of one thread each): some 20 core-seconds a pair
with all ablations, 8 without, and 4 more of the former for each `--seed-folder`. Errors are stored pair by pair in
`runs/quality_match`, under the hashes of the code and weights: an interrupted run continues. Writes
`benchmarks/results/quality_match.json`.
"""

import argparse
import functools
import math
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from match_baselines import OFFSET, RATIO, Initial, dis, farneback, sift, zero
from match_cost import cost_of
from match_pairs import CORRUPTIONS, FAMILIES, SCENES, SIZE, Case, case
from match_report import as_json, markdown
from match_store import Origin, Store, card_of, code, fingerprint
from torch import Tensor
from torch.nn import functional as F

from overpaint import files, zoo
from overpaint.match import Match, Matcher, dense
from overpaint.match.optical_flow import refine
from overpaint.metrics import Interval, bootstrap, matching, paired, share
from overpaint.train import card, photographs

HERE, PACKAGE = Path(__file__).parent, Path(photographs.__file__).parents[1]
RESULTS = HERE / "results"
# Modules of `overpaint/match` that compute the initial flow, and those that a match uses besides.
FEATURES = (
    "backbone", "conditioning", "config", "correlation", "flow", "matcher", "optical_flow"
)  # fmt: skip
MATCHING = ("denoiser", "matching", "resampling")
VERSION = 4  # of the constants and of `errors`, `measure_pair`, `run_matcher`, `baseline`; other errors are ignored
GATED = ("plain", "textureless", "repetitive", "large")
BESIDE = ("layered", "training")
OURS = "ours"
UNCERTAINTIES = ("std", "stages", "cycle")
SIDES = {"initial": 256, "initial at 512": 512}
MEDIANS = {"initial": (3, 5, 7), "initial at 512": (5, 7, 11)}  # kernels
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": zero, "DIS medium": dis, "Farneback": farneback, "SIFT, interpolated": sift,
}  # fmt: skip
REFINED = tuple(  # by optical flow, like the matcher
    f"{n}, refined"
    for n in ("zero", "SIFT, interpolated", "initial, mutual", "initial at 512, mutual")
)
BASELINES = (*PLAIN, *(
    f"{n}{f}" for n in SIDES for f in ("", ", mutual", *(f", median {k}" for k in MEDIANS[n]))
), *REFINED)  # fmt: skip
RIVALS = (*PLAIN, *(f"{n}{f}" for n in SIDES for f in ("", ", median", ", mutual")), *REFINED)
RAW = "no refinement"
NO_FINE = "no fine stage"
COARSE = ", coarse"  # suffix of a control without its fine stage
# Settings of `dense`, and whether to run the fine stage.
ABLATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    RAW: ({"samples": 8, "steps": 5, "refine": False}, True),
    f"5 steps, 1 hypothesis, {RAW}": ({"samples": 1, "steps": 5, "refine": False}, True),
    f"1 step, 1 hypothesis, {RAW}": ({"samples": 1, "steps": 1, "refine": False}, True),
    f"{NO_FINE}, {RAW}": ({"samples": 8, "steps": 5, "refine": False}, False),
    NO_FINE: ({"samples": 8, "steps": 5}, False),
}


def errors(case: Case, flow: Tensor, **uncertainties: Tensor) -> dict[str, float]:
    """Return the figures of one pair; `uncertainties` are maps (H, W) by name."""
    if case.points is not None:
        values = torch.cat([flow, *(u[None] for u in uncertainties.values())])
        size = torch.tensor([flow.shape[2], flow.shape[1]])
        at = ((2 * case.points + 1) / size - 1)[None, None]
        values = F.grid_sample(values[None], at, align_corners=False, padding_mode="border")[0]
        flow, uncertainties = values[:2], dict(zip(uncertainties, values[2:], strict=True))
    truth, valid = case.truth[None].float(), case.valid[None, None]
    result = {"aepe": matching.epe(flow[None], truth, valid).item()}
    for pixels in (1, 5):
        result[f"pck{pixels}"] = matching.pck(flow[None], truth, pixels, valid).item()
    distance = (flow - truth[0]).norm(dim=0)[None, None]
    for name, uncertainty in uncertainties.items():
        result[f"spearman {name}"] = matching.spearman(
            uncertainty[None, None], distance, valid
        ).item()
        result[f"ause {name}"] = matching.ause(uncertainty[None, None], distance, valid).item()
    return result


@dataclass(frozen=True)
class Job:
    """One pair and the methods to measure on it."""

    set: str
    index: int
    methods: tuple[str, ...]


LOADED: dict[str, Matcher] = {}  # by name; filled before the processes fork
PHOTOS = Path("runs/photographs")


def measure_pair(job: Job) -> tuple[Job, Origin, dict[str, dict[str, float]]]:
    """Return the origin of a pair and the errors of each method; called in a process of its own."""
    torch.set_num_threads(1)
    pair = case(job.set, job.index, PHOTOS)
    ours = LOADED[OURS]
    initial = functools.cache(lambda side: Initial(ours, pair.source, pair.target, side))
    matched = functools.cache(lambda name: run_matcher(name, pair))
    rows: dict[str, dict[str, float]] = {}
    for name in job.methods:
        if name in BASELINES:
            rows[name] = errors(pair, baseline(name, initial, pair))
            continue
        flow, uncertainties = matched(name).flow, {}
        if name == OURS:
            cycle_error = initial(ours.config.image).uncertainty()
            uncertainties = {"std": matched(OURS).std, "cycle": cycle_error}
        if is_ablated(job.set) and is_whole(name):
            coarse = NO_FINE if name == OURS else f"{name}{COARSE}"
            uncertainties["stages"] = (flow - matched(coarse).flow).norm(dim=0)
        rows[name] = errors(pair, flow, **uncertainties)
    return job, Origin(pair.photo, pair.family), rows


def is_ablated(name: str) -> bool:
    """Return whether the ablations are measured on a set."""
    return name in GATED or name.startswith("graf")


def is_whole(name: str) -> bool:
    """Return whether a method is the matcher or a control, with both stages and the refinement."""
    return name == OURS or (name.startswith("control") and not name.endswith(RAW))


def run_matcher(name: str, pair: Case) -> Match:
    """Return the match of a method: the matcher, an ablation of it, another matcher, or one without its fine stage."""
    matcher = LOADED.get(name.removesuffix(COARSE), LOADED[OURS])
    if name.endswith(COARSE):
        name, matcher = name.removesuffix(COARSE), replace(matcher, fine=None)
    settings: dict[str, Any] = {"samples": 8, "steps": matcher.config.steps}
    if name in ABLATIONS:
        settings, fine = ABLATIONS[name]
        matcher = matcher if fine else replace(matcher, fine=None)
    elif not matcher.config.diffusion:
        settings = {"samples": 1, "steps": 1}
    if name.endswith(RAW):
        settings = settings | {"refine": False}
    return dense(pair.source, pair.target, matcher=matcher, **settings)


def baseline(name: str, initial: Callable[[int], Initial], pair: Case) -> Tensor:
    """Return the flow of a baseline; `initial` returns the initial flow from pictures of a given side."""
    if name in REFINED:
        flow = baseline(name.removesuffix(", refined"), initial, pair)
        return refine(pair.source[None], pair.target[None], flow[None])[0]
    if name in PLAIN:
        return PLAIN[name](pair.source, pair.target)
    start, _, filtered = name.partition(", ")
    flow = initial(SIDES[start])
    if filtered.startswith("median"):
        return flow.median(int(filtered.split()[1]))
    return flow.mutual() if filtered else flow.flow()


def marks(prints: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that fingerprints the code and weights of a method, for matchers of these fingerprints."""
    baselines = HERE / "match_baselines.py"
    features = [PACKAGE / "match" / f"{name}.py" for name in FEATURES]
    matching_ = [PACKAGE / "match" / f"{name}.py" for name in MATCHING]
    plain, initial = code(baselines), code(*features, baselines)
    matched = code(*features, *matching_, PACKAGE / "images" / "read.py")

    def mark(method: str) -> str:
        if method in BASELINES:
            return plain if method in PLAIN else f"{prints[OURS]}-{initial}"
        suffix = f"-{plain}" if method == OURS else ""  # for the cycle error of the initial flow
        return f"{prints.get(method, prints[OURS])}-{matched}{suffix}"

    return mark


def pairs_code() -> str:
    """Return a short hash of the code that draws the pairs and measures a flow on them."""
    parts = ("train/warps", "train/scenes", "train/photographs", "match/flow", "metrics/matching")
    return code(HERE / "match_pairs.py", *(PACKAGE / f"{name}.py" for name in parts))


def jobs(plan: Any, store: Store, extra: Sequence[str]) -> list[Job]:
    """Return the pairs and methods that are not measured yet."""
    result: list[Job] = []
    ablations = [n for n in ABLATIONS if LOADED[OURS].fine or not n.startswith("no fine")]
    for name, count in plan.sets.items():
        methods = [*BASELINES, OURS]
        if is_ablated(name):
            methods += [*ablations, *extra]
        for index in range(count):
            missing = tuple(m for m in methods if index not in store.load(name, m))
            if missing:
                result.append(Job(name, index, missing))
    return result


class Errors:
    """The errors of this run's pairs, averaged and compared."""

    def __init__(self, plan: Any, store: Store) -> None:
        self.sets: dict[str, int] = plan.sets
        self.store = store

    def column(self, name: str, method: str, figure: str = "aepe") -> list[float]:
        """Return a figure of each pair of a set, for a "median" that of the best kernel; empty if not measured."""
        if method.endswith(", median"):
            kernels = MEDIANS[method.partition(", ")[0]]
            candidates = [f"{method} {k}" for k in kernels]
            method = min(candidates, key=lambda m: float(np.mean(self.column(name, m))))
        rows = self.store.load(name, method)
        indices = range(self.sets.get(name, 0))
        if not all(i in rows for i in indices):
            return []
        return [rows[i].get(figure, math.nan) for i in indices]

    def mean(self, name: str, method: str, figure: str = "aepe") -> Interval:
        """Return the mean over a set, with an interval over photographs."""
        values, groups = self._finite(name, self.column(name, method, figure))
        mean = share if figure.startswith("pck") else bootstrap
        return mean(values, groups=groups)

    def difference(self, name: str, method: str, other: str, figure: str = "aepe") -> Interval:
        """Return the mean of `method` minus `other` over the pairs."""
        first, second = (self.column(name, m, figure) for m in (other, method))
        if not first or not second:
            return bootstrap([])
        return paired(first, second, groups=self._groups(name))

    def _groups(self, name: str) -> list[str]:
        return [self.store.origins[name][i].photo for i in range(self.sets[name])]

    def _finite(self, name: str, values: Sequence[float]) -> tuple[list[float], list[str] | None]:
        pairs = zip(values, self._groups(name), strict=True) if values else ()
        finite = [(v, g) for v, g in pairs if math.isfinite(v)]
        return [v for v, _ in finite], [g for _, g in finite] or None


def by_family(measured: Errors) -> list[dict[str, Any]]:
    """Return the errors by family of warps; "in layers" are those of the training with layers."""
    families = [("training", f, ("training",)) for f in (*FAMILIES["training"], "")]
    families += [("tests", f, GATED[:3]) for f in FAMILIES["tests"]]
    rows = []
    for kind, family, sets in families:
        pairs = [(n, i) for n in sets for i in range(measured.sets.get(n, 0))]
        pairs = [(n, i) for n, i in pairs if measured.store.origins[n][i].family == family]
        if pairs:
            row = {"family": f"{kind}: {family or 'in layers'}", "pairs": len(pairs)}
            for method in (*RIVALS, OURS):
                row[method] = float(np.mean([measured.column(n, method)[i] for n, i in pairs]))
            rows.append(row)
    return rows


def tables(measured: Errors, extra: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that have rows, by title."""
    foreign = [n for n in (*GATED, *BESIDE) if n in measured.sets]
    gated = [n for n in GATED if n in measured.sets]
    scenes = [n for n in SCENES if n in measured.sets]
    corrupted = [n for n in measured.sets if " + " in n]
    result: dict[str, list[dict[str, Any]]] = {}
    for figure in ("aepe", "pck1", "pck5"):
        result[f"{figure}, synthetic"] = [
            {"method": m} | {n: measured.mean(n, m, figure) for n in foreign}
            for m in (*RIVALS, OURS)
        ]
    result["aepe, ours less a baseline"] = [
        {"method": m} | {n: measured.difference(n, OURS, m) for n in foreign} for m in RIVALS
    ]
    result["aepe, by family of warps"] = by_family(measured)
    for figure in ("aepe", "pck1", "pck5"):
        result[f"{figure}, scenes"] = [
            {"method": m} | {n: measured.mean(n, m, figure).mean for n in scenes}
            for m in (*RIVALS, OURS)
        ]
    if corrupted:
        result["aepe, corrupted"] = [
            {"set": n} | {m: measured.mean(n, m).mean for m in (*RIVALS, OURS)}
            | {"below all": all(measured.difference(n, OURS, m).high < 0 for m in RIVALS)}
            for n in corrupted
        ]  # fmt: skip
    ablated = [n for n in (*gated, "graf13", "graf31") if n in measured.sets]
    names = [n for n in (*ABLATIONS, *extra) if any(measured.column(s, n) for s in ablated)]
    result["aepe, ablations"] = [
        {"method": m} | {n: measured.mean(n, m).mean for n in ablated} for m in (OURS, *names)
    ]
    result["aepe, an ablation less ours, both refined or neither"] = [
        {"method": m} | {n: measured.difference(n, m, RAW if m.endswith(RAW) and m != RAW else OURS) for n in gated}
        for m in names
    ]  # fmt: skip
    seeds = [n for n in extra if n.startswith("seed")]
    if seeds:
        result["aepe, training seeds"] = [
            {"set": n} | {"seeds": 1 + len(seeds)}
            | {"mean": bootstrap([measured.mean(n, m).mean for m in (OURS, *seeds)])}
            for n in ablated
        ]  # fmt: skip
    controls = [n for n in extra if is_whole(n)]
    result["uncertainty, of controls"] = [
        {"method": m, "set": n}
        | {f"{f} stages": measured.mean(n, m, f"{f} stages") for f in ("spearman", "ause")}
        for m in controls for n in ablated
    ]  # fmt: skip
    result["uncertainty"] = [
        {"set": n}
        | {
            f"{f} {d}": measured.mean(n, OURS, f"{f} {d}")
            for d in UNCERTAINTIES for f in ("spearman", "ause")
        }
        for n in (*foreign, "chessboards", "graf13", "graf31") if n in measured.sets
    ]  # fmt: skip
    return {title: rows for title, rows in result.items() if rows}


def figures(measured: Errors) -> dict[str, float]:
    """Return the figures by name."""
    gated = [n for n in GATED if n in measured.sets]
    rivals = {n: [measured.mean(n, m).mean for m in RIVALS] for n in measured.sets}
    result: dict[str, float] = {}
    for name in (n for n in measured.sets if " + " not in n):
        result[f"aepe_{name}"] = measured.mean(name, OURS).mean
        result[f"best_rival_{name}"] = min(rivals[name])
        for figure in ("pck1", "pck5"):
            result[f"{figure}_{name}"] = measured.mean(name, OURS, figure).mean
    for kind in CORRUPTIONS:
        sets = [n for n in measured.sets if n.endswith(f" + {kind}")]
        if sets:
            result[f"aepe_{kind}"] = float(np.mean([measured.mean(n, OURS).mean for n in sets]))
            result[f"best_rival_{kind}"] = float(np.mean([min(rivals[n]) for n in sets]))
    result["beats_all_synthetic"] = float(
        all(measured.difference(n, OURS, m).high < 0 for n in gated for m in RIVALS)
    )
    graf = [n for n in ("graf13", "graf31") if n in measured.sets]
    result["beats_all_graf"] = float(all(result[f"aepe_{n}"] < min(rivals[n]) for n in graf))
    if "chessboards" in measured.sets:
        boards = zip(
            measured.column("chessboards", OURS),
            measured.column("chessboards", "DIS medium"),
            strict=True,
        )
        result["chessboards_below_dis"] = float(sum(a < b for a, b in boards))  # fmt: skip
    for figure in ("spearman", "ause"):
        for name in UNCERTAINTIES:
            values = [measured.mean(n, OURS, f"{figure} {name}").mean for n in gated]
            result[f"{figure}_{name}"] = float(np.mean(values))
    return result


def sizes(plan: Any) -> dict[str, int]:
    """Return the number of pairs to measure of each set."""
    if plan.quick:
        return dict.fromkeys(("plain", "large", "plain + noise", "graf13"), 1)
    pairs: int = plan.pairs
    some = max(pairs // 4, 1)
    result = dict.fromkeys(GATED, pairs) | dict.fromkeys(BESIDE, 2 * some)
    return result | {f"{n} + {c}": some for n in GATED for c in CORRUPTIONS} | SCENES


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one pair of four sets")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--pairs", type=int, default=60, help="pairs of each of the four sets")
    parser.add_argument("--matcher", default="matcher", help="a folder, or the shipped one")
    parser.add_argument(
        "--control", type=Path, action="append", default=[], help="folder of a control"
    )
    parser.add_argument(
        "--seed-folder",
        type=Path,
        action="append",
        default=[],
        help="folder of another training seed",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread, or threads for the timing"
    )
    plan = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)  # before the processes fork
    cv2.setNumThreads(1)
    plan.sets = sizes(plan)
    folders = {OURS: zoo.folder("matcher") if plan.matcher == "matcher" else Path(plan.matcher)}
    folders |= {f"control {p.parent.name}/{p.name}": p for p in plan.control}
    folders |= {f"seed {p.parent.name}/{p.name}": p for p in plan.seed_folder}
    LOADED.update({name: Matcher.load(folder) for name, folder in folders.items()})
    photographs.fetch(PHOTOS, ("opencv-doc",))
    settings = protocol(plan, folders)
    folders |= {f"{n}, {RAW}": folder for n, folder in folders.items() if n.startswith("control")}
    LOADED.update({name: LOADED[name.removesuffix(f", {RAW}")] for name in folders})
    prints = {name: fingerprint(folder) for name, folder in folders.items()}
    extra = [n for n in folders if n != OURS]
    name = f"quick-{os.getpid()}" if plan.quick else f"v{VERSION}-{pairs_code()}"
    store = Store(Path("runs/quality_match") / name, marks(prints))
    try:
        measure(jobs(plan, store, extra), store, plan.workers, start)
        measured = Errors(plan, store)
        cost = cost_of(folders[OURS], 1 if plan.quick else 5, plan.workers)
        result = figures(measured) | cost | {"seconds": time.perf_counter() - start}
        report(plan, tables(measured, extra), {k: as_json(v) for k, v in result.items()}, settings)
    finally:
        if plan.quick:
            shutil.rmtree(store.folder)


def measure(pending: Sequence[Job], store: Store, workers: int, start: float) -> None:
    """Measure pairs in processes that share the matchers, and store their errors."""
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=forked) as pool:
        for i, (job, origin, rows) in enumerate(pool.map(measure_pair, pending), 1):
            store.add(job.set, job.index, origin, rows)
            if i == len(pending) or pending[i].set != job.set:
                seconds = time.perf_counter() - start
                print(f"{job.set}: {i} of {len(pending)} pairs, {seconds:.0f} s", flush=True)


def protocol(plan: Any, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return the settings of the run."""
    device = next(LOADED[OURS].coarse.parameters()).device
    return {
        "commit": card.commit() or "unknown",
        "device": f"{device}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cv2": cv2.__version__},
        "matchers": {name: card_of(folder) for name, folder in folders.items()},
        "sets": plan.sets, "size": SIZE, "samples": 8, "quick": plan.quick, "threads_512": plan.workers,
        "interval": "95 % bootstrap over photographs",
        "note": f"{len(photographs.HELD_OUT)} photographs, so intervals are wide",
        "baselines": {"sift_ratio": RATIO, "initial_sides": SIDES, "initial_offset_cells": OFFSET},
    }  # fmt: skip


def report(
    plan: Any,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    result: Mapping[str, float],
    settings: Mapping[str, Any],
) -> None:
    """Print and write all tables, the figures and the settings."""
    for title, rows in results.items():
        print(markdown(rows, title))
    print(f"\n{settings['note']}.")
    rounded = {
        t: [{k: as_json(v) for k, v in row.items()} for row in rows] for t, rows in results.items()
    }
    out = Path("runs/benchmarks") if plan.quick else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    content = {"result": result, "tables": rounded, "protocol": settings}
    files.write_json(out / "quality_match.json", content)
    if plan.json:
        print(files.to_json(result))


if __name__ == "__main__":
    main()
