"""Does `icons` draw the object and the style of its prompt, in its own words and in others?

    python benchmarks/quality_icons.py [--quick] [--json]

`icons-judge`, which took no part in training `icons`, classifies the pictures; its accuracy on the real artwork, from
its card, is the upper bound. Measured are

- object and style of every (object, style) pair, and of the pairs held out of training;
- frames: seen pairs in frames of training, and in frames whose parts training never shows (`frames_ratio`);
- synonyms: the 28 held-out synonyms against the names of their objects (`synonyms_ratio`), those that do not hold the
  name (`synonyms_other_words_ratio`), and synonyms of training;
- places: the centre of the drawn pixels of "a fox on the left, noto style" lies nearer to that side than to any other
  (`place_obeyed`);
- two objects: both are recognised in parts of a picture of 128 pixels (`two_seen`; `two_control`: two other names), and
  of 64 pixels (`two_64_seen`); on the artwork itself side by side, and behind the autoencoder (`two_artwork`,
  `two_autoencoder`, `two_64_artwork`, `two_64_autoencoder`), which bound them;
- tokens: concepts of `quality_edit` all of whose tokens occur in another word of WordNet, or whose words are in another
  name (`shared_tokens`).

Intervals are over pairs or synonyms, each with all its pictures. `--quick` draws fewer pictures, with one seed, and
writes to `runs/benchmarks`. Writes `benchmarks/results/quality_icons.json` and, into `docs/images`, `icons_grid.png`,
100 pictures of free wordings, and `before_after.png`, one style before and after its edit; `--card` adds the figures to
the model's card.
"""

import argparse
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import icons_wordings as wordings
import torch

import overpaint as op
from overpaint import files, metrics, zoo
from overpaint.probes import questions
from overpaint.probes.text import article
from overpaint.scorers import judge as scorers
from overpaint.train import captions, card, icon_world, language

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
    rows = [wordings.Row(f"{article(o)} {o} in {s} style", o, s, f"{o} {s}") for o, s in chosen]
    return wordings.hits(model, judge, rows, seeds=seeds, steps=steps)


def seconds_per_picture(model: op.TextToImage, *, repeats: int = 3) -> float:
    """Return the median time of one guided picture of 20 steps, drawn alone."""
    times = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        model.generate("a cat in noto style", seed=seed, steps=20)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def grid(model: op.TextToImage, path: Path, *, steps: int) -> None:
    """Save 100 pictures of free wordings: objects in turn, styles in turn."""
    objects, styles = list(icon_world.OBJECTS), list(icon_world.STYLES)
    colors = random.Random(0).choices(["blue", "green", "pink", "yellow"], k=100)
    prompts = []
    for i in range(100):
        name = objects[i % len(objects)]
        form = wordings.FREE[(i // 10 + i) % len(wordings.FREE)]
        prompts.append(
            form.format(
                object=name, style=styles[i % len(styles)], color=colors[i], article=article(name)
            )
        )
    path.parent.mkdir(exist_ok=True)
    model.generate(prompts, seed=list(range(100)), steps=steps).grid(10).save(path)


def measure_wordings(
    model: op.TextToImage, judge: scorers.Judge, *, quick: bool
) -> dict[str, tuple[list[float], list[str]]]:
    """Return verdicts of 0 and 1 with their units: frames, synonyms, places, two objects."""
    size = 20 if quick else 160
    chosen = random.Random(1).sample(pairs(held_out=False), size)
    table: dict[str, tuple[list[float], list[str]]] = {}

    def add(name: str, rows: list[wordings.Row]) -> None:
        found = wordings.hits(model, judge, rows, seeds=range(1), steps=20)
        units = [row.unit for row in rows]
        table[f"{name}_object"], table[f"{name}_style"] = (
            (found["object_top1"], units), (found["style_top1"], units),
        )  # fmt: skip

    add("frames_trained", wordings.frames(chosen, "trained", 2))
    add("frames_heldout", wordings.frames(chosen, "held out", 2))
    reserved, unseen = captions.held_out_synonyms(), captions.unseen_synonyms()
    number = 2 if quick else 5
    for name, words in {
        "synonyms": reserved,
        "synonyms_trained": dict(
            random.Random(2).sample(
                [(s, o) for o, v in captions.synonyms().items() for s in v if s not in unseen], 28
            )
        ),
    }.items():
        add(name, wordings.synonyms(words, number, own_name=False))
        add(f"{name}_name", wordings.synonyms(words, number, own_name=True))
    for kind in ("", "_name"):  # of the same pictures
        verdicts, units = table[f"synonyms{kind}_object"]
        others = [i for i, s in enumerate(units) if not set(s.split()) & set(reserved[s].split())]
        table[f"synonyms_other_words{kind}_object"] = (
            [verdicts[i] for i in others], [units[i] for i in others],
        )  # fmt: skip
    rows = wordings.places(chosen[: size // 4])
    images = model.generate(
        [row.prompt for row, _ in rows], seed=list(range(len(rows))), steps=20
    ).images
    units = [row.unit for row, _ in rows]
    verdicts = [wordings.obeyed(i, side) for i, (_, side) in zip(images, rows, strict=True)]
    table["place_obeyed"] = verdicts, units
    for side in captions.SIDES:
        of_side = [i for i, (_, s) in enumerate(rows) if s == side]
        table[f"place_{side}"] = [verdicts[i] for i in of_side], [units[i] for i in of_side]
    for name, side in (("two", 128), ("two_64", 64)):
        table |= {f"{name}_{k}": v for k, v in measure_two(model, judge, size, side).items()}
    return table


def measure_two(
    model: op.TextToImage, judge: scorers.Judge, number: int, side: int
) -> dict[str, tuple[list[float], list[str]]]:
    """Return verdicts of 0 and 1 with their units for prompts that name two objects, in pictures of `side` pixels."""
    texts = wordings.two(number)
    labels = [text for text, *_ in texts]
    images = model.generate(
        labels, seed=list(range(number)), steps=20, height=side, width=side
    ).images
    seen = wordings.seen_objects(judge, images)
    others = [*texts[1:], texts[0]]
    world = icon_world.World(icon_world.fetch(Path("runs/artwork")))
    artwork, coded = wordings.two_on_artwork(model, judge, texts, world, side)
    verdicts = {
        "seen": [float({a, b} <= s) for (_, a, b), s in zip(texts, seen, strict=True)],
        "one_seen": [float(bool({a, b} & s)) for (_, a, b), s in zip(texts, seen, strict=True)],
        "control": [float({a, b} <= s) for (_, a, b), s in zip(others, seen, strict=True)],
        "artwork": artwork, "autoencoder": coded,
    }  # fmt: skip
    return {name: (values, labels) for name, values in verdicts.items()}


def shared_tokens(model: op.TextToImage) -> float:
    """Return the part of the concepts of `quality_edit` whose tokens all occur elsewhere.

    A token occurs elsewhere if another word of WordNet has it, or if its word is part of another subject's name.
    """
    from edit_concepts import SEEN as CONCEPTS

    tokens = model.tokenizer
    packages = Path("runs/packages")
    language.fetch(packages)
    owners: dict[str, set[str]] = {}
    for word in language.words(packages):
        for token in tokens.tokenize(word):
            owners.setdefault(token, set()).add(word.lower())
    names = [*icon_world.subjects(), *(f"{s} style" for s in icon_world.STYLES)]
    names += [f"{c} background" for c in icon_world.COLORS]
    every = [concept for kind in CONCEPTS.values() for concept in kind]
    shared = [
        all(
            owners.get(token, set()) - {word}
            or any(word in name.split() for name in names if name != concept)
            for word in concept.split()
            for token in tokens.tokenize(word)
        )
        for concept in every
    ]
    return sum(shared) / len(every)


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
        prompts = [f"{article(o)} {o} in {style} style" for o in objects]
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
    for name, (values, units) in measure_wordings(model, judge, quick=arguments.quick).items():
        interval = metrics.share(values, groups=units)
        figures[name] = round(interval.mean, 4)
        intervals[name] = [interval.low, interval.high, len(values)]
    for name, above, below in (
        ("frames_ratio", "frames_heldout_object", "frames_trained_object"),
        ("frames_style_ratio", "frames_heldout_style", "frames_trained_style"),
        ("synonyms_ratio", "synonyms_object", "synonyms_name_object"),
        ("synonyms_other_words_ratio", "synonyms_other_words_object", "synonyms_other_words_name_object"),
        ("synonyms_trained_ratio", "synonyms_trained_object", "synonyms_trained_name_object"),
    ):  # fmt: skip
        figures[name] = round(figures[above] / max(figures[below], 1e-9), 4)
    if not arguments.quick:
        figures["shared_tokens"] = round(shared_tokens(model), 4)
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
