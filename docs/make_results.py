"""Write docs/results.md from benchmarks/results/*.json.

    python docs/make_results.py

Each section has the command, the commit and the settings of its run, its tables, and a note on how to read them. All
figures come from the JSON files, except those of `make demo`, which stand in docs/results_demo.md.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import diffgrad_sections
import edit_sections
import scene_text_sections
from tables import Run, number, origin, percent, table, wrapped

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
HEAD = """# Results

All larger tables of this repository stand here, once. `docs/make_results.py` writes this page from
`benchmarks/results/*.json`; a test compares the two. Brackets are 95 % intervals. Times were measured on two CPU cores
of a shared machine and compare only inside one table. An aim is the target that was set for a figure.

`icons` has new weights since 2026-11-29. The sections on text layers and preserve weights were measured on the weights
before them, in which most concepts had a token of their own. They have not been repeated yet.
"""


def icons(run: Run) -> str:
    """Return the section on the pictures of the shipped model."""
    figures, intervals = run["figures"], run["intervals"]
    rows = []
    for label, name in (("seen pairs", ""), ("held-out pairs", "heldout_")):
        for kind in ("object", "style"):
            key = f"{name}{kind}_top1"
            low, high, n = intervals[key]
            rows.append(
                [
                    f"{kind}, {label}",
                    f"{100 * figures[key]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]",
                    f"{n}",
                    f"{100 * figures[key + '_real']:.1f} %",
                    f"{figures[f'{name}{kind}_ratio']:.2f}",
                    _ICONS_AIMS[name, kind],
                ]
            )
    seconds = figures["seconds_per_picture"]
    seeds = f"seeds {', '.join(map(str, run['seeds']))}"
    command = "python benchmarks/quality_icons.py"
    return (
        "## What `icons` draws\n\n"
        + origin(command, run["protocol"], commit=run["commit"], more=seeds)
        + "\nTop-1 accuracy of `icons-judge`, which was not used to train `icons`, on drawn "
        "pictures and on the real "
        "artwork. Held-out (object, style) pairs were not in the training data. The aims are "
        "ratios.\n\n"
        + table(["top-1", "drawn", "pictures", "real artwork", "ratio", "aim"], rows)
        + f"\nOne 64x64 picture takes {seconds:.2f} s. A grid of 100 pictures: "
        "[docs/images/icons_grid.png](images/icons_grid.png).\n\n" + _wordings(figures, intervals)
    )


_ICONS_AIMS = {
    ("", "object"): "0.85", ("", "style"): "0.80", ("heldout_", "object"): "0.65", ("heldout_", "style"): "0.70",
}  # fmt: skip


def _wordings(figures: dict[str, float], intervals: dict[str, list[float]]) -> str:
    """Return the table of other wordings, places and pairs of objects; empty for a run without it."""
    if "frames_ratio" not in figures:
        return ""
    labels = {
        "frames_trained_object": "object, frames of training",
        "frames_heldout_object": "object, held-out frames",
        "synonyms_name_object": "object, its name",
        "synonyms_object": "object, a held-out synonym",
        "synonyms_other_words_object": "object, a held-out synonym without the name",
        "synonyms_other_words_name_object": "object, the name of the row before",
        "synonyms_trained_object": "object, a synonym of training",
        "place_obeyed": "the named side of the picture",
    }
    for name, size in (("two_", "128 pixels"), ("two_64_", "64 pixels")):
        labels |= {
            f"{name}one_seen": f"one of two named objects, {size}",
            f"{name}seen": f"both of two named objects, {size}",
            f"{name}control": f"both of two other objects (control), {size}",
            f"{name}autoencoder": f"both on their artwork behind the autoencoder (limit), {size}",
            f"{name}artwork": f"both on their artwork (limit), {size}",
        }
    rows = []
    for key, label in labels.items():
        if key not in intervals:  # a run before pictures of two objects had two sizes
            continue
        low, high, n = intervals[key]
        rows.append(
            [label, f"{100 * figures[key]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]", f"{n}"]
        )
    sides = ", ".join(
        f"{side} {100 * figures[f'place_{side}']:.0f} %"
        for side in ("left", "right", "top", "bottom")
    )
    return (
        "Other wordings, in pictures of 20 steps. A frame is a caption without its object and style. Two "
        "tenths of the parts of frames and of the synonyms are in no training caption; one is read here, once, the "
        "other served for validation.\n\n"
        + table(["seen in", "drawn", "pictures"], rows)
        + f"\nHeld-out frames reach {figures['frames_ratio']:.3f} of the rate of trained frames (aim: 0.9), "
        f"held-out synonyms {figures['synonyms_ratio']:.2f} of the rate of the names (aim: 0.7), those "
        "without the name "
        f"{figures['synonyms_other_words_ratio']:.2f}. Sides: {sides} (aim: 70 % together); both of two objects, "
        f"128 pixels: aim 40 %. Of the 30 concepts of `quality_edit`, {100 * figures['shared_tokens']:.0f} % "
        "have no token of their own.\n"
    )


def layers(run: Run) -> str:
    """Return the section on the text layer to edit."""
    names = {
        "before": "nowhere",
        "layer0_plain": "layer 0, no preserve list",
        "layer0": "layer 0",
        "layer1": "layer 1",
        "layer2": "layer 2",
    }
    figures, protocol = run["figures"], run["protocol"]
    rows = [
        [text, percent(figures[f"{key}_target"]), percent(figures[f"{key}_others"])]
        for key, text in names.items()
    ]
    more = f"{len(protocol['frames'])} prompt frames, {protocol['preserved']} preserved prompts"
    return (
        "## Which text layer to edit\n\n"
        + origin("python benchmarks/quality_layers.py", protocol, commit=run["commit"], more=more)
        + "\n`openmoji style` → `noto style`, by `icons-judge`.\n\n"
        + table(["edit at", "still openmoji", "the five other styles, recognised"], rows)
    )


def front(run: Run) -> str:
    """Return the section on the preserve weight."""
    rows = [
        [
            row["concept"],
            f"{row['weight']:g}" + (" (chosen)" if row["chosen"] else ""),
            *(percent(row[k]) for k in ("target", "redirection", "lost")),
            f"{row['drift']:.3f}",
            "yes" if row["on_front_of_three"] else "no",
        ]
        for row in run["rows"]
    ]
    heads = ["concept", "weight", "still the concept", "now the replacement", "other labels lost"]
    result = run["result"]
    return (
        "## The preserve weight that `edit.auto` chooses\n\n"
        + origin("python benchmarks/quality_front.py", run["protocol"], commit=run["commit"])
        + "\nOne edit for each weight; no other table uses these two concepts. *On the front*: no "
        "other weight is better "
        "in all three of erased, redirected and kept.\n\n"
        + table([*heads, "drift of text features", "on the front"], rows)
        + "\nDrift of text features and labels lost have a rank correlation of "
        f"{result['drift_to_lost']:.2f}. Few pictures were "
        "drawn of each concept. "
    )


def trace_speed(run: Run) -> str:
    """Return the section on the speed of tracing."""
    result = run["result"]
    rows = [
        [
            label,
            f"{result[f'states_{key}']}",
            f"{result[f'lockstep_{key}_seconds']:.1f} s",
            f"{result[f'naive_{key}_seconds']:.1f} s",
            f"{result[f'ratio_{key}']:.1f}",
            "3",
            f"{result[f'ratio_{key}_kind']:.1f}",
        ]
        for key, label in (("text", "text encoder"), ("unet", "UNet"))
    ]
    memory = ", ".join(f"{result[f'tensors_mib_{steps}']:.1f}" for steps in (10, 20, 50))
    heads = ["map", "states", "one batch", "one call for each state", "ratio", "aim, at least"]
    return (
        "## Speed of tracing\n\n"
        + origin("python benchmarks/speed_trace.py", run["protocol"])
        + "\nClean, corrupted and restored pictures in one denoising batch, against one pipeline "
        "call for each state. The "
        "last column is the ratio to a loop that draws the restored picture only.\n\n"
        + table([*heads, "ratio, restored only"], rows)
        + f"\nThe largest difference between the maps is {result['max_difference']:.0e}. Memory of "
        "activations for 10, 20 and 50 "
        f"steps: {memory} MiB. "
    )


def _automatic(result: Mapping[str, float]) -> list[list[str]]:
    """Return the rows of the automatic edit and of the rivals' edits; results of older runs have none."""
    if "auto_seconds" not in result:
        return []
    names = ("time", "loco", "dp", "speed", "hirm", "oce")
    times = ", ".join(f"`{name}` {result[f'{name}_seconds']:.1f} s" for name in names)
    return [
        ["automatic edit", f"{result['auto_seconds']:.1f} s", "10 s"],
        ["the same without MLP and everyday captions", f"{result['auto_layer_seconds']:.1f} s", ""],
        [f"one edit by other methods: {times}", "", ""],
    ]


def edit_speed(run: Run) -> str:
    """Return the section on the speed of editing."""
    r = run["result"]
    parts = ", ".join(
        f"{k} {r[f'one_edit_{k}_ms']:.0f} ms" for k in ("keys", "values", "solve", "report")
    )
    left, edited = r["finetune_target_after"], r["edit_target_after"]
    rows = [
        [f"one edit, no preserve list ({parts})", f"{r['one_edit_seconds']:.3f} s", "0.25 s"],
        ["a hundred edits in one joint solve", f"{r['hundred_edits_seconds']:.2f} s", "2 s"],
        *_automatic(r),
        ["apply, revert", f"{r['apply_ms']:.1f} ms, {r['revert_ms']:.1f} ms", "10 ms"],
        ["change file at rank 16, of random weights", f"{r['change_kb']:.0f} KB", "100 KB"],
        ["share of the movement that rank 16 loses there", percent(r["compact_error"]), ""],
        [f"plain loop, same result to {r['difference_naive']:.0e}", f"{r['ratio_naive']:.1f} times as long", ""],
        ["UCE's formula as released, 32 matrices", f"{r['ratio_uce']:.1f} times as long", ""],
        [
            f"UCE by this solver, same result to {r['difference_uce']:.0e}",
            f"{r['ratio_uce_same']:.1f} times as fast",
            "",
        ],
        [
            f"fine-tuning on `icons`: after {r['finetune_steps']} steps {percent(left)} are still the style,"
            f" after the edit {percent(edited)}",
            f"{r['ratio_finetune']:,.0f} times as long",
            "",
        ],
    ]  # fmt: skip
    more = f"medians of {r['repeats']}"
    return (
        "## Speed of editing\n\n"
        + origin("python benchmarks/speed_edit.py", run["protocol"], more=more)
        + "\nA text encoder of SD 1.4's size with random weights, `van gogh` → `painting`.\n\n"
        + table(["", "figure", "aim, below"], rows)
    )


MATCHERS = {
    "DIS medium": "DIS",
    "zero, refined": "the refinement alone",
    "SIFT, interpolated": "SIFT, ratio test, interpolated",
    "SIFT, interpolated, refined": "SIFT, refined by DIS",
    "initial at 512, mutual": "XFeat at 512, mutual, interpolated",
    "initial at 512, mutual, refined": "XFeat at 512, refined by DIS",
    "initial, mutual, refined": "XFeat at 256, refined by DIS",
    "ours": "**the matcher**",
}
SETS = ("plain", "textureless", "repetitive", "large", "layered")
SCENES = ("graf13", "graf31", "motorcycle", "aloe", "chessboards")
PARTS = {
    "no refinement": "without the refinement",
    "5 steps, 1 hypothesis, no refinement": "one hypothesis, without the refinement",
    "1 step, 1 hypothesis, no refinement": "one hypothesis, one step, without the refinement",
    "no fine stage, no refinement": "without the fine stage and the refinement",
    "no fine stage": "without the fine stage",
    "control matcher-control/model": "control: trained to answer once",
    "control matcher-control/model, no refinement": "control, without the refinement",
    "seed matcher-1/model": "training seed 1",
    "seed matcher-2/model": "training seed 2",
}


def match_parts(tables: Run) -> str:
    """Return the tables of the matcher without one of its parts, its controls, and other training seeds."""
    sets = (*SETS[:4], "graf13", "graf31")
    errors = {row["method"]: row for row in tables["aepe, ablations"]}
    paired = {
        row["method"]: row for row in tables["aepe, an ablation less ours, both refined or neither"]
    }
    rows = [
        [text, *(number(errors[m].get(k)) for k in sets)]
        for m, text in {"ours": "**the matcher**", **PARTS}.items()
    ]
    differences = [
        [PARTS[m], *(number(paired[m].get(k)) for k in SETS[:4])] for m in PARTS if m in paired
    ]
    return (
        "\nParts, controls and training seeds, end-point error in pixels. The control has the "
        "same network, pairs, seed "
        "and number of steps, and is trained to answer once, without noise.\n\n"
        + table(["", *sets], rows)
        + "\nThe same, paired: error of the row minus that of the matcher, both refined or neither. "
        "Below zero the row is "
        "better.\n\n" + table(["", *SETS[:4]], differences)
    )


def control(tables: Run) -> str:
    """Return the paragraph that compares the matcher with the control, which draws no hypotheses."""
    rows = tables["aepe, an ablation less ours, both refined or neither"]
    paired = {row["method"]: row for row in rows}
    counts = []
    for end in ("", ", no refinement"):
        cells = [paired[f"control matcher-control/model{end}"][k] for k in SETS[:4]]
        lower = sum(cell["mean"] < 0 for cell in cells)
        better, worse = (
            sum(cell["high"] < 0 for cell in cells),
            sum(cell["low"] > 0 for cell in cells),
        )
        counts.append(
            f"the control's error is lower on {lower} of {len(cells)} sets ({better} intervals "
            f"below zero, {worse} above)"
        )
    return (
        "\nThe rows of controls and seeds need networks that are trained first, with `overpaint train matcher "
        f"--no-diffusion` and `--seed`. With the refinement {counts[0]}, without it {counts[1]}: "
        "**the diffusion is not "
        "shown to help**.\n\n"
    )


def match(run: Run) -> str:
    """Return the section on the matcher and its baselines."""
    tables, result, protocol = run["tables"], run["result"], run["protocol"]
    synthetic = {row["method"]: row for row in tables["aepe, synthetic"]}
    scenes = {row["method"]: row for row in tables["aepe, scenes"]}
    near = {row["method"]: row for row in tables["pck1, synthetic"]}
    rows = [[text, *(number(synthetic[m][k]) for k in SETS)] for m, text in MATCHERS.items()]
    scene_rows = [[text, *(number(scenes[m][k]) for k in SCENES)] for m, text in MATCHERS.items()]
    near_rows = [[text, *(percent(near[m][k]) for k in SETS)] for m, text in MATCHERS.items()]
    noisy = [
        [row["set"], number(row["ours"]), number(min(row[m] for m in MATCHERS if m != "ours"))]
        for row in tables["aepe, corrupted"]
    ]
    doubt = [
        [
            label,
            number(result[f"spearman_{key}"]),
            number(result[f"ause_{key}"]),
        ]
        for key, label in (
            ("std", "spread of the refined hypotheses"),
            ("stages", "distance of the coarse answer from the whole one"),
            ("cycle", "forward-backward error"),
        )
    ]
    pairs = protocol["sets"]["plain"]
    photographs = str(protocol["note"]).partition(" ")[0]
    more = f"{pairs} pairs a set of {protocol['size']}x{protocol['size']}, {protocol['samples']} hypotheses"
    return (
        "## Matching\n\n"
        + origin(f"python benchmarks/quality_match.py --pairs {pairs}", protocol, more=more)
        + f"\nMean end-point errors in pixels on warped photographs ({photographs} photographs that "
        "were not used in training, "
        "warps of other families than in training; intervals over photographs):\n\n"
        + table(["", *SETS], rows)
        + "\nThe same on scenes with a ground truth of their own:\n\n"
        + table(["", *SCENES], scene_rows)
        + "\nShare of places within one pixel:\n\n"
        + table(["", *SETS], near_rows)
        + "\nUnder noise, blur and JPEG, end-point error in pixels:\n\n"
        + table(["set", "the matcher", "best baseline shown above"], noisy)
        + match_parts(tables)
        + control(tables)
        + "How well an uncertainty orders places by their error, over the first four sets (rank "
        "correlation: higher is "
        "better; AUSE: lower is better):\n\n"
        + table(["uncertainty", "rank correlation", "AUSE"], doubt)
        + f"\nAt 512x512 the matcher takes {result['seconds_512']:.1f} s and "
        f"{result['peak_gib_512']:.2f} GiB on\n"
        f"{protocol['threads_512']} threads. "
    )


def studio(run: Run) -> str:
    """Return the section on many people in one studio."""
    rows = [
        ["people at once", f"{run['sessions']}"],
        ["crashed", f"{run['crashed']}"],
        ["pictures of somebody else's edit", f"{run['cross_talk']}"],
        ["distinct pictures", f"{run['distinct_pictures']}"],
        ["sessions left open at the end", f"{run['left_sessions']}"],
        ["memory before, with all at work", f"{run['memory_before_mb']:.0f} MiB, {run['memory_open_mb']:.0f} MiB"],
        ["heap left by a second round", f"{run['heap_left_mb']:.1f} MiB"],
        ["time, to the sum of the same work one after another", f"{run['ratio']:.1f}"],
    ]  # fmt: skip
    protocol = run["protocol"]
    return (
        "## The studio\n\n"
        + origin("python benchmarks/speed_studio.py", protocol)
        + "\n"
        + table(["", "figure"], rows)
    )


SECTIONS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("quality_icons", icons),
    ("quality_edit", edit_sections.contest),
    ("quality_edit", edit_sections.many),
    ("quality_layers", layers),
    ("quality_front", front),
    ("speed_edit", edit_speed),
    ("speed_trace", trace_speed),
    ("quality_match", match),
    ("quality_scene_text", scene_text_sections.lettering),
    ("quality_diffgrad", diffgrad_sections.accuracy),
    ("quality_diffgrad_recipe", diffgrad_sections.recipe),
    ("speed_diffgrad", diffgrad_sections.speed),
    ("speed_studio", studio),
)
WAITING = ("quality_scene_text",)  # no result until its model is trained
TRACING = """## What the maps of `icons` say

The tables of `benchmarks/quality_trace.py` stand in [Findings](findings.md), with their limits.
"""


def page() -> str:
    """Return the whole of docs/results.md."""
    parts = [HEAD]
    for name, section in SECTIONS:
        path = RESULTS / f"{name}.json"
        if path.exists() or name not in WAITING:
            parts.append(section(json.loads(path.read_text())))
    parts += [TRACING, (DOCS / "results_demo.md").read_text()]
    return wrapped("\n\n".join(part.strip() for part in parts))


if __name__ == "__main__":
    (DOCS / "results.md").write_text(page())
