"""Which layer of the text encoder has to be edited to erase a style, and what does the preserve list protect?

    python benchmarks/quality_layers.py [--quick] [--json]

Replaces one style of `icons`, `openmoji`, by `noto` with seven prompt frames: at layer 0 without and with the preserve
list, then at layers 1 and 2 with it. `icons-judge` classifies pictures of the same objects and seeds in the target
style and in every other style, before and after. Writes `benchmarks/results/quality_layers.json`; with `--quick`, into
`runs/benchmarks`.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import overpaint as op
from overpaint import files, metrics
from overpaint.edit import Change
from overpaint.probes import questions
from overpaint.scorers import judge as scorers
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
FRAMES = (
    "",
    "a photo of ",
    "an image of ",
    "a picture of ",
    "a drawing of ",
    "a cat in ",
    "a bus, ",
)
OBJECTS = (
    "apple", "rocket", "owl", "umbrella", "castle", "fox", "key", "tulip", "car", "star",
    "carrot", "anchor", "palm tree", "penguin", "guitar", "rainbow", "cactus", "balloon", "trophy", "skull",
)  # fmt: skip


def verdicts(
    model: op.TextToImage, judge: scorers.Judge, change: Change | None, *, objects: int
) -> dict[str, list[bool]]:
    """Return for each style whether the judge recognises it in the picture of each object."""
    pairs = [(o, s) for s in judge.labels["style"] for o in OBJECTS[:objects]]
    prompts = [f"{'an' if o[0] in 'aeiou' else 'a'} {o} in {s} style" for o, s in pairs]
    seeds = [i % objects for i in range(len(pairs))]
    if change is None:
        images = model.generate(prompts, seed=seeds, steps=12).images
    else:
        with change.applied(model):
            images = model.generate(prompts, seed=seeds, steps=12).images
    predicted = judge.predict(images, "style")
    return {
        style: [a == style for a, (_, s) in zip(predicted, pairs, strict=True) if s == style]
        for style in judge.labels["style"]
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pictures, the same code")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on the last line"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    model, judge = op.load("icons"), scorers.load()
    preserved = list(
        questions.preserve_prompts(
            "style", "openmoji", labels=judge.labels, held_out=model.held_out
        )
    )
    pairs = {"openmoji style": "noto style"}
    cases = {
        "before": None,
        "layer0_plain": op.edit.quickfix(model, pairs, frames=FRAMES),
        **{
            f"layer{layer}": op.edit.quickfix(
                model, pairs, frames=FRAMES, preserve=preserved, layer=layer
            )
            for layer in (0, 1, 2)
        },
    }
    figures: dict[str, float] = {}
    intervals: dict[str, metrics.Interval] = {}
    for name, change in cases.items():
        hits = verdicts(model, judge, change, objects=8 if arguments.quick else len(OBJECTS))
        others = [
            (i, hit)
            for style, row in hits.items()
            for i, hit in enumerate(row)
            if style != "openmoji"
        ]
        intervals[f"{name}_target"] = metrics.share(hits["openmoji"])
        intervals[f"{name}_others"] = metrics.share(  # an object in several styles is one unit
            [hit for _, hit in others], groups=[i for i, _ in others]
        )
        for part in ("target", "others"):
            figures[f"{name}_{part}"] = round(intervals[f"{name}_{part}"].mean, 4)
        print(
            f"{name:14} openmoji {intervals[f'{name}_target']}   others {intervals[f'{name}_others']}"
        )
    figures["seconds"] = round(time.perf_counter() - start, 1)
    folder = Path("runs/benchmarks") if arguments.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    protocol = {
        **model.protocol(steps=12, guidance_scale=model.guidance_scale),
        "frames": FRAMES,
        "preserved": len(preserved),
    }
    result = {
        "figures": figures,
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
        "protocol": protocol,
        "quick": arguments.quick,
        "commit": card.commit(),
    }
    files.write_json(folder / "quality_layers.json", result)
    if arguments.json:
        print(files.to_json(figures))


if __name__ == "__main__":
    main()
