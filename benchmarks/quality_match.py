"""Where does the matcher lie below what needs no model, where not, and does its diffusion earn its keep?

    python benchmarks/quality_match.py [--quick] [--json] [--pairs N] [--matcher FOLDER]
                                       [--control FOLDER ...] [--seed-folder FOLDER ...]

Test pairs, none of whose seven photographs was trained on: four synthetic sets of 256x256 pixels (plain, textureless,
repetitive, large), warped by other families than in training; layered ones and ones of the training's own families
beside; the four again under noise, blur and JPEG (severity 3 of ImageNet-C, on both pictures); graf1 and graf3 both
ways; motorcycle and aloe (depth edges); the corners of 13 pairs of chessboards (cv2.findChessboardCorners).

Asked of each method: the mean distance from the truth (AEPE, pixels) and the share of places within 1 and 5 pixels
(PCK), where the truth lies in the source and only there; the difference to ours in the same pairs. Intervals are 95 %
bootstrap over photographs, with all of their pairs, since pairs of one photograph are not independent; over so few
photographs they are wide. Then: the error by family of warps; no refinement by optical flow, and without it fewer steps
and hypotheses; no fine stage and controls (the same network trained to answer once), both ways; other training seeds;
whether the spread knows the error (Spearman, AUSE), beside how far the flow of the coarse stage alone lies from that of
both, which a single answer has too, and the cycle error of the initial flow; seconds and peak resident memory of a
match at 512x512 in a process of its own.

Baselines are as `match_baselines.py` says, the initial flow from pictures of 256x256, as the matcher sees them, and of
512x512, which suits the larger scenes, four of them refined by optical flow as ours is; of three median filters that
with the lowest error of a set is taken, in the baseline's favour.

Takes about an hour with the default pairs on two cores (two processes of one thread each): some 20 core-seconds a pair
with all ablations, 8 without, and 4 more of the former for each `--seed-folder`. Errors are kept pair by pair in
`runs/quality_match`, under the hashes of the code and weights that made them: stop it, start it again. Writes
`benchmarks/results/quality_match.json`.
"""

import argparse
import functools
import json
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
from match_store import Origin, Store, card_of, code, fingerprint
from torch import Tensor
from torch.nn import functional as F

from overpaint import zoo
from overpaint.match import Match, Matcher, dense
from overpaint.match.optical_flow import refined
from overpaint.metrics import Interval, bootstrap, matching, paired
from overpaint.train import card, photographs

HERE, PACKAGE = Path(__file__).parent, Path(photographs.__file__).parents[1]
RESULTS = HERE / "results"
VERSION = 4  # of the constants and of `errors`, `measured`, `answer`, `baseline`; errors of another are not read
GATED = ("plain", "textureless", "repetitive", "large")
BESIDE = ("layered", "training")
OURS = "ours"
SIDES = {"initial": 256, "initial at 512": 512}
MEDIANS = {"initial": (3, 5, 7), "initial at 512": (5, 7, 11)}  # kernels
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": zero, "DIS medium": dis, "Farneback": farneback, "SIFT, interpolated": sift,
}  # fmt: skip
REFINED = tuple(  # as ours is
    f"{n}, refined"
    for n in ("zero", "SIFT, interpolated", "initial, mutual", "initial at 512, mutual")
)
BASELINES = (*PLAIN, *(
    f"{n}{f}" for n in SIDES for f in ("", ", mutual", *(f", median {k}" for k in MEDIANS[n]))
), *REFINED)  # fmt: skip
RIVALS = (*PLAIN, *(f"{n}{f}" for n in SIDES for f in ("", ", median", ", mutual")), *REFINED)
RAW = "no refinement"
NO_FINE = "no fine stage"
ROUGH = ", coarse"  # of a control without its fine stage
# Settings of `dense`, and whether the fine stage runs.
ABLATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    RAW: ({"samples": 8, "steps": 5, "refine": False}, True),
    f"5 steps, 1 hypothesis, {RAW}": ({"samples": 1, "steps": 5, "refine": False}, True),
    f"1 step, 1 hypothesis, {RAW}": ({"samples": 1, "steps": 1, "refine": False}, True),
    f"{NO_FINE}, {RAW}": ({"samples": 8, "steps": 5, "refine": False}, False),
    NO_FINE: ({"samples": 8, "steps": 5}, False),
}


def errors(case: Case, flow: Tensor, **doubts: Tensor) -> dict[str, float]:
    """Return one pair's figures; `doubts` are uncertainties (H, W) by name."""
    if case.points is not None:
        values = torch.cat([flow, *(d[None] for d in doubts.values())])
        size = torch.tensor([flow.shape[2], flow.shape[1]])
        at = ((2 * case.points + 1) / size - 1)[None, None]
        values = F.grid_sample(values[None], at, align_corners=False, padding_mode="border")[0]
        flow, doubts = values[:2], dict(zip(doubts, values[2:], strict=True))
    truth, valid = case.truth[None].float(), case.valid[None, None]
    result = {"aepe": matching.epe(flow[None], truth, valid).item()}
    for pixels in (1, 5):
        result[f"pck{pixels}"] = matching.pck(flow[None], truth, pixels, valid).item()
    distance = (flow - truth[0]).norm(dim=0)[None, None]
    for name, doubt in doubts.items():
        result[f"spearman {name}"] = matching.spearman(doubt[None, None], distance, valid).item()
        result[f"ause {name}"] = matching.ause(doubt[None, None], distance, valid).item()
    return result


@dataclass(frozen=True)
class Job:
    """One pair and the methods that its errors are not known of."""

    set: str
    index: int
    methods: tuple[str, ...]


LOADED: dict[str, Matcher] = {}  # by name; filled before the processes fork
PHOTOS = Path("runs/photographs")


def measured(job: Job) -> tuple[Job, Origin, dict[str, dict[str, float]]]:
    """Return where the pair comes from and the errors of each method; runs in a process of its own."""
    torch.set_num_threads(1)
    pair = case(job.set, job.index, PHOTOS)
    ours = LOADED[OURS]
    initial = functools.cache(lambda side: Initial(ours, pair.source, pair.target, side))
    answers = functools.cache(lambda name: answer(name, pair))
    found: dict[str, dict[str, float]] = {}
    for name in job.methods:
        if name in BASELINES:
            found[name] = errors(pair, baseline(name, initial, pair))
            continue
        flow, doubts = answers(name).flow, {}
        if name == OURS:
            doubts = {"std": answers(OURS).std, "cycle": initial(ours.config.image).doubt()}
        if is_ablated(job.set) and is_whole(name):
            rough = NO_FINE if name == OURS else f"{name}{ROUGH}"
            doubts["stages"] = (flow - answers(rough).flow).norm(dim=0)
        found[name] = errors(pair, flow, **doubts)
    return job, Origin(pair.photo, pair.family), found


def is_ablated(name: str) -> bool:
    """Say whether the ablations are measured on a set."""
    return name in GATED or name.startswith("graf")


def is_whole(name: str) -> bool:
    """Say whether a method is ours or a control, both stages and the refinement."""
    return name == OURS or (name.startswith("control") and not name.endswith(RAW))


def answer(name: str, pair: Case) -> Match:
    """Return what our matcher finds, as an ablation does, or another matcher, or one of them without its fine stage."""
    matcher = LOADED.get(name.removesuffix(ROUGH), LOADED[OURS])
    if name.endswith(ROUGH):
        name, matcher = name.removesuffix(ROUGH), replace(matcher, fine=None)
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
    """Return a baseline's flow; `initial` makes the initial flow from pictures of a side."""
    if name in REFINED:
        flow = baseline(name.removesuffix(", refined"), initial, pair)
        return refined(pair.source[None], pair.target[None], flow[None])[0]
    if name in PLAIN:
        return PLAIN[name](pair.source, pair.target)
    start, _, filtered = name.partition(", ")
    found = initial(SIDES[start])
    if filtered.startswith("median"):
        return found.median(int(filtered.split()[1]))
    return found.mutual() if filtered else found.flow()


def marks(prints: Mapping[str, str]) -> Callable[[str], str]:
    """Return what names the code and weights behind a method's errors, of matchers of these fingerprints."""
    own = HERE / "match_baselines.py"
    seen = ("backbone", "conditions", "cost", "flow", "matcher", "refine")
    begun, matched = (
        code(*(PACKAGE / "match" / f"{name}.py" for name in parts), *beside)
        for parts, beside in ((seen, (own,)), ((*seen, "denoise", "dense", "reading", "sizes"), ()))
    )
    plain = code(own)

    def mark(method: str) -> str:
        if method in BASELINES:
            return plain if method in PLAIN else f"{prints[OURS]}-{begun}"
        beside = f"-{plain}" if method == OURS else ""  # the initial flow's doubt
        return f"{prints.get(method, prints[OURS])}-{matched}{beside}"

    return mark


def pairs_code() -> str:
    """Return a short name for the code that makes the pairs and measures a flow on them."""
    parts = ("train/warps", "train/scenes", "train/photographs", "match/flow", "metrics/matching")
    return code(HERE / "match_pairs.py", *(PACKAGE / f"{name}.py" for name in parts))


def jobs(plan: Any, store: Store, extra: Sequence[str]) -> list[Job]:
    """Return what is left to measure."""
    wanted: list[Job] = []
    ablations = [n for n in ABLATIONS if LOADED[OURS].fine or not n.startswith("no fine")]
    for name, count in plan.sets.items():
        methods = [*BASELINES, OURS]
        if is_ablated(name):
            methods += [*ablations, *extra]
        for index in range(count):
            missing = tuple(m for m in methods if index not in store.load(name, m))
            if missing:
                wanted.append(Job(name, index, missing))
    return wanted


class Found:
    """The errors of this run's pairs, ready for tables."""

    def __init__(self, plan: Any, store: Store) -> None:
        self.sets: dict[str, int] = plan.sets
        self.store = store

    def column(self, name: str, method: str, figure: str = "aepe") -> list[float]:
        """Return a figure of a set's pairs; of a "median" that of the best kernel. Empty where not measured."""
        if method.endswith(", median"):
            kernels = MEDIANS[method.partition(", ")[0]]
            tried = [f"{method} {k}" for k in kernels]
            method = min(tried, key=lambda m: float(np.mean(self.column(name, m))))
        rows = self.store.load(name, method)
        indices = range(self.sets.get(name, 0))
        if not all(i in rows for i in indices):
            return []
        return [rows[i].get(figure, math.nan) for i in indices]

    def mean(self, name: str, method: str, figure: str = "aepe") -> Interval:
        """Return the mean over a set, its interval over photographs."""
        values, groups = self._known(name, self.column(name, method, figure))
        return bootstrap(values, groups=groups)

    def less(self, name: str, method: str, other: str, figure: str = "aepe") -> Interval:
        """Return what `method` has more than `other`, pair by pair."""
        first, second = (self.column(name, m, figure) for m in (other, method))
        if not first or not second:
            return bootstrap([])
        return paired(first, second, groups=self._groups(name))

    def _groups(self, name: str) -> list[str]:
        return [self.store.origins[name][i].photo for i in range(self.sets[name])]

    def _known(self, name: str, values: Sequence[float]) -> tuple[list[float], list[str] | None]:
        pairs = zip(values, self._groups(name), strict=True) if values else ()
        kept = [(v, g) for v, g in pairs if math.isfinite(v)]
        return [v for v, _ in kept], [g for _, g in kept] or None


def by_family(found: Found) -> list[dict[str, Any]]:
    """Return the errors by family of warps; "in layers" are the training's that are broken up after it."""
    families = [("training", f, ("training",)) for f in (*FAMILIES["training"], "")]
    families += [("tests", f, GATED[:3]) for f in FAMILIES["tests"]]
    rows = []
    for kind, family, sets in families:
        pairs = [(n, i) for n in sets for i in range(found.sets.get(n, 0))]
        pairs = [(n, i) for n, i in pairs if found.store.origins[n][i].family == family]
        if pairs:
            row = {"family": f"{kind}: {family or 'in layers'}", "pairs": len(pairs)}
            for method in (*RIVALS, OURS):
                row[method] = float(np.mean([found.column(n, method)[i] for n, i in pairs]))
            rows.append(row)
    return rows


def tables(found: Found, extra: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return all tables."""
    foreign = [n for n in (*GATED, *BESIDE) if n in found.sets]
    gated = [n for n in GATED if n in found.sets]
    scenes = [n for n in SCENES if n in found.sets]
    rough = [n for n in found.sets if " + " in n]
    result: dict[str, list[dict[str, Any]]] = {}
    for figure in ("aepe", "pck1", "pck5"):
        result[f"{figure}, synthetic"] = [
            {"method": m} | {n: found.mean(n, m, figure) for n in foreign} for m in (*RIVALS, OURS)
        ]
    result["aepe, ours less a baseline"] = [
        {"method": m} | {n: found.less(n, OURS, m) for n in foreign} for m in RIVALS
    ]
    result["aepe, by family of warps"] = by_family(found)
    for figure in ("aepe", "pck1", "pck5"):
        result[f"{figure}, scenes"] = [
            {"method": m} | {n: found.mean(n, m, figure).mean for n in scenes}
            for m in (*RIVALS, OURS)
        ]
    if rough:
        result["aepe, corrupted"] = [
            {"set": n} | {m: found.mean(n, m).mean for m in (*RIVALS, OURS)}
            | {"below all": all(found.less(n, OURS, m).high < 0 for m in RIVALS)}
            for n in rough
        ]  # fmt: skip
    asked = [n for n in (*gated, "graf13", "graf31") if n in found.sets]
    names = [n for n in (*ABLATIONS, *extra) if any(found.column(s, n) for s in asked)]
    result["aepe, ablations"] = [
        {"method": m} | {n: found.mean(n, m).mean for n in asked} for m in (OURS, *names)
    ]
    result["aepe, an ablation less ours, both refined or neither"] = [
        {"method": m} | {n: found.less(n, m, RAW if m.endswith(RAW) and m != RAW else OURS) for n in gated}
        for m in names
    ]  # fmt: skip
    seeds = [n for n in extra if n.startswith("seed")]
    if seeds:
        result["aepe, training seeds"] = [
            {"set": n} | {"seeds": 1 + len(seeds)}
            | {"mean": bootstrap([found.mean(n, m).mean for m in (OURS, *seeds)])}
            for n in asked
        ]  # fmt: skip
    controls = [n for n in extra if is_whole(n)]
    result["uncertainty, of controls"] = [
        {"method": m, "set": n}
        | {f"{f} stages": found.mean(n, m, f"{f} stages") for f in ("spearman", "ause")}
        for m in controls for n in asked
    ]  # fmt: skip
    result["uncertainty"] = [
        {"set": n}
        | {
            f"{f} {d}": found.mean(n, OURS, f"{f} {d}")
            for d in ("std", "stages", "cycle") for f in ("spearman", "ause")
        }
        for n in (*foreign, "chessboards", "graf13", "graf31") if n in found.sets
    ]  # fmt: skip
    return result


def figures(found: Found) -> dict[str, float]:
    """Return the flat figures."""
    gated = [n for n in GATED if n in found.sets]
    rivals = {n: [found.mean(n, m).mean for m in RIVALS] for n in found.sets}
    result: dict[str, float] = {}
    for name in (n for n in found.sets if " + " not in n):
        result[f"aepe_{name}"] = found.mean(name, OURS).mean
        result[f"best_rival_{name}"] = min(rivals[name])
        for figure in ("pck1", "pck5"):
            result[f"{figure}_{name}"] = found.mean(name, OURS, figure).mean
    for kind in CORRUPTIONS:
        sets = [n for n in found.sets if n.endswith(f" + {kind}")]
        if sets:
            result[f"aepe_{kind}"] = float(np.mean([found.mean(n, OURS).mean for n in sets]))
            result[f"best_rival_{kind}"] = float(np.mean([min(rivals[n]) for n in sets]))
    result["beats_all_synthetic"] = float(
        all(found.less(n, OURS, m).high < 0 for n in gated for m in RIVALS)
    )
    graf = [n for n in ("graf13", "graf31") if n in found.sets]
    result["beats_all_graf"] = float(all(result[f"aepe_{n}"] < min(rivals[n]) for n in graf))
    if "chessboards" in found.sets:
        boards = zip(
            found.column("chessboards", OURS),
            found.column("chessboards", "DIS medium"),
            strict=True,
        )
        result["chessboards_below_dis"] = float(sum(a < b for a, b in boards))  # fmt: skip
    for figure in ("spearman", "ause"):
        for doubt in ("std", "stages", "cycle"):
            values = [found.mean(n, OURS, f"{figure} {doubt}").mean for n in gated]
            result[f"{figure}_{doubt}"] = float(np.mean(values))
    return result


def markdown(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return a Markdown table."""
    lines = [f"\n### {title}\n", f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    cells = (
        " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in r.values()) for r in rows
    )
    return "\n".join([*lines, *(f"| {row} |" for row in cells)])


def bare(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, Interval):
        return {
            key: bare(getattr(value, key)) for key in ("mean", "low", "high")
        } | {"n": value.n}  # fmt: skip
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def sizes(plan: Any) -> dict[str, int]:
    """Return how many pairs of each set to measure."""
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
    parser.add_argument("--pairs", type=int, default=60, help="of each of the four sets")
    parser.add_argument("--matcher", default="matcher", help="a folder, or the shipped one")
    parser.add_argument("--control", type=Path, action="append", default=[], help="a control's")
    parser.add_argument("--seed-folder", type=Path, action="append", default=[], help="another's")
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
    told = protocol(plan, folders)
    folders |= {f"{n}, {RAW}": folder for n, folder in folders.items() if n.startswith("control")}
    LOADED.update({name: LOADED[name.removesuffix(f", {RAW}")] for name in folders})
    prints = {name: fingerprint(folder) for name, folder in folders.items()}
    extra = [n for n in folders if n != OURS]
    name = f"quick-{os.getpid()}" if plan.quick else f"v{VERSION}-{pairs_code()}"
    store = Store(Path("runs/quality_match") / name, marks(prints))
    try:
        measure(jobs(plan, store, extra), store, plan.workers, start)
        found = Found(plan, store)
        cost = cost_of(folders[OURS], 1 if plan.quick else 5, plan.workers)
        result = figures(found) | cost | {"seconds": time.perf_counter() - start}
        report(plan, tables(found, extra), {k: bare(v) for k, v in result.items()}, told)
    finally:
        if plan.quick:
            shutil.rmtree(store.folder)


def measure(wanted: Sequence[Job], store: Store, workers: int, start: float) -> None:
    """Measure what is left, in processes that share the matchers, and keep it."""
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=forked) as pool:
        for i, (job, origin, found) in enumerate(pool.map(measured, wanted), 1):
            store.add(job.set, job.index, origin, found)
            if i == len(wanted) or wanted[i].set != job.set:
                took = time.perf_counter() - start
                print(f"{job.set}: {i} of {len(wanted)} pairs, {took:.0f} s", flush=True)


def protocol(plan: Any, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the figures were made with."""
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
    made: Mapping[str, Sequence[Mapping[str, Any]]],
    result: Mapping[str, float],
    told: Mapping[str, Any],
) -> None:
    """Print and write all tables and the flat figures, with what they were made with."""
    for title, rows in made.items():
        print(markdown(rows, title))
    print(f"\n{told['note']}.")
    rounded = {
        t: [{k: bare(v) for k, v in row.items()} for row in rows] for t, rows in made.items()
    }
    out = Path("runs/benchmarks") if plan.quick else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    beside = out / ".quality_match.part"
    text = json.dumps({"result": result, "tables": rounded, "protocol": told}, indent=1)
    beside.write_text(text + "\n")
    os.replace(beside, out / "quality_match.json")
    if plan.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
