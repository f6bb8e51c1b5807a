"""Does `icons` draw the object and the style of its prompt, also in pairs that are held out of training?

    python benchmarks/quality_icons.py [--quick] [--json]

Draws every (object, style) pair of the icon world once for each seed. `icons-judge`, which took no part in training
`icons` and was trained on the held-out pairs too, classifies the pictures; its accuracy on the real artwork, from its
card, is the upper bound. Intervals are bootstrapped over pairs, each with all its seeds. `--quick` draws 120 seen pairs
with one seed and writes to `runs/benchmarks`. Writes `benchmarks/results/quality_icons.json` and, into `docs/images`, a
grid of 100 pictures, `icons_grid.png`, and one style before and after its edit, `before_after.png`; `--card` adds the
figures to the model's card.
"""

import argparse
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import overpaint as op
from overpaint import files, metrics, zoo
from overpaint.probes import questions
from overpaint.scorers import judge as scorers
from overpaint.train import card, icon_world

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"


def pairs(*, held_out: bool) -> list[tuple[str, str]]:
    """Return all (object, style) pairs that are held out of training, or all others."""
    reserved = icon_world.held_out()
    every = [(o, s) for o in icon_world.OBJECTS for s in icon_world.STYLES]
    return [pair for pair in every if (pair in reserved) == held_out]


def score(
    model: op.TextToImage,
    judge: scorers.Judge,
    chosen: list[tuple[str, str]],
    *,
    seeds: range,
    steps: int,
) -> dict[str, list[float]]:
    """Return for a picture of each pair and seed whether object and style are right, 1 or 0, and the CLIP score."""
    rows = [(o, s, seed) for seed in seeds for o, s in chosen]
    prompts = [f"{'an' if o[0] in 'aeiou' else 'a'} {o} in {s} style" for o, s, _ in rows]
    images = model.generate(prompts, seed=[seed for *_, seed in rows], steps=steps).images
    objects, styles = judge.predict(images, "object"), judge.predict(images, "style")
    return {
        "object_top1": [float(label == o) for label, (o, *_) in zip(objects, rows, strict=True)],
        "style_top1": [float(label == s) for label, (_, s, _) in zip(styles, rows, strict=True)],
        "clip_score": judge.clip_score(images, prompts).tolist(),
    }


def seconds_per_picture(model: op.TextToImage, *, repeats: int = 3) -> float:
    """Return the median time of one guided picture of 20 steps, drawn alone."""
    times = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        model.generate("a cat in noto style", seed=seed, steps=20)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def grid(model: op.TextToImage, path: Path, *, steps: int) -> None:
    """Save 100 pictures: objects in turn, styles in turn, half on a named color."""
    rng = random.Random(0)
    objects, styles = list(icon_world.OBJECTS), list(icon_world.STYLES)
    prompts = []
    for i in range(100):
        object_ = objects[i % len(objects)]
        text = (
            f"{'an' if object_[0] in 'aeiou' else 'a'} {object_} in {styles[i % len(styles)]} style"
        )
        prompts.append(
            text
            + (
                f" on a {rng.choice(['blue', 'green', 'pink', 'yellow'])} background"
                if i % 2
                else ""
            )
        )
    path.parent.mkdir(exist_ok=True)
    model.generate(prompts, seed=list(range(100)), steps=steps).grid(10).save(path)


def before_after(model: op.TextToImage, judge: scorers.Judge, path: Path) -> None:
    """Save one style before and after its edit, and another style before and after: four rows, equal seeds."""
    preserved, evaluated = questions.split_concepts(judge.labels)
    change = op.edit.auto(
        model, {"openmoji style": "noto style"}, vocabulary=preserved, without=evaluated
    )
    objects = ["strawberry", "cat", "fish", "umbrella", "bomb", "tulip", "car", "light bulb"]
    rows = []
    for style in ("openmoji", "high contrast"):
        settings = {"seed": list(range(len(objects))), "steps": 20}
        prompts = [f"{'an' if o[0] in 'aeiou' else 'a'} {o} in {style} style" for o in objects]
        rows.append(model.generate(prompts, **settings).images)
        with change.applied(model):
            rows.append(model.generate(prompts, **settings).images)
    drawn = op.Pictures(torch.cat(rows), ("",) * 4 * len(objects), (0,) * 4 * len(objects), {})
    drawn.grid(len(objects)).save(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pictures, the same code")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on the last line"
    )
    parser.add_argument("--card", action="store_true", help="write the figures into the card")
    arguments = parser.parse_args()
    start = time.perf_counter()
    model, judge = op.load("icons"), scorers.load("icons-judge")
    seen, held = pairs(held_out=False), pairs(held_out=True)
    seeds = range(1) if arguments.quick else range(2)
    if arguments.quick:
        seen = random.Random(0).sample(seen, 120)
    table = {"": score(model, judge, seen, seeds=seeds, steps=20)}
    table["heldout_"] = score(model, judge, held, seeds=seeds, steps=20)
    figures: dict[str, float] = {}
    intervals: dict[str, Any] = {}
    for prefix, columns in table.items():
        for name, values in columns.items():
            groups = (held if prefix else seen) * len(seeds)
            mean = metrics.share if name.endswith("_top1") else metrics.bootstrap
            interval = mean(values, groups=groups)
            figures[prefix + name] = round(interval.mean, 4)
            intervals[prefix + name] = [interval.low, interval.high, len(values)]
    figures |= {
        name: value for name, value in judge.card["figures"].items() if name.endswith("_real")
    }
    for kind in ("object", "style"):
        for prefix in ("", "heldout_"):
            ratio = figures[f"{prefix}{kind}_top1"] / figures[f"{prefix}{kind}_top1_real"]
            figures[f"{prefix}{kind}_ratio"] = round(ratio, 4)
    figures["seconds_per_picture"] = round(seconds_per_picture(model), 3)
    if not arguments.quick:
        grid(model, IMAGES / "icons_grid.png", steps=20)
        before_after(model, judge, IMAGES / "before_after.png")
    figures["seconds"] = round(time.perf_counter() - start, 1)
    result = {
        "figures": figures, "intervals": intervals, "seeds": list(seeds), "machine": platform.processor(),
        "protocol": model.protocol(steps=20, guidance_scale=model.guidance_scale), "card": judge.card.get("date"),
        "commit": card.commit(),
    }  # fmt: skip
    folder = Path("runs/benchmarks") if arguments.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "quality_icons.json", result)
    for name, value in figures.items():
        extra = intervals.get(name)
        print(
            f"{name:28} {value:8.4f}"
            + (f"   [{extra[0]:.3f}, {extra[1]:.3f}] n={extra[2]}" if extra else "")
        )
    if arguments.card:
        card.add_figures(zoo.folder("icons"), figures)
    if arguments.json:
        print(files.to_json(figures))


if __name__ == "__main__":
    main()
