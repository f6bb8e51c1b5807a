"""Would the zoo's judge be trained as well by DiffGrad as by AdamW, in the part that AdamW has?

    python benchmarks/quality_diffgrad_recipe.py [--quick] [--json] [--steps N] [--seeds N]

The recipe of `icons-judge` as it is (Muon inside the network, one rate, its schedule over the steps, gradients clipped)
with embeddings, vectors and both ends given to AdamW at the recipe's rate, to AdamW at half of it, or to DiffGrad at
the recipe's rate and at twice it. Each seed has one start and one order of pictures for all four, and the loss that
counts is the mean over the last fifth of the steps; differences are paired, intervals Student's. 100 steps are a start
and not a training: they can say that DiffGrad loses, and not that it would win after 25 minutes.

About 25 minutes on one idle core; finished runs are kept in `runs/quality_diffgrad_recipe`. Writes
`benchmarks/results/quality_diffgrad_recipe.json`; with `--quick` (two seeds, 2 steps), into `runs/benchmarks`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_diffgrad import interval, record, write
from torch import Tensor, nn

from overpaint.train import icon_world, judge
from overpaint.train.icons import build_clip, tokenizer
from overpaint.train.loop import Outer, optimizers, rate

RATE, DECAY = 1e-3, 0.01
WAYS: dict[str, tuple[Outer, float]] = {  # times the rate
    "AdamW": ("adamw", 1.0),
    "AdamW, half the rate": ("adamw", 0.5),
    "DiffGrad": ("diffgrad", 1.0),
    "DiffGrad, twice the rate": ("diffgrad", 2.0),
}


class Lessons:
    """The judge's world and its loss, step by step the same for all optimisers of a seed."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.world = icon_world.World(icon_world.fetch(Path("runs/artwork")), hold_out=False)
        self.tokens = tokenizer(self.world, work / "tokenizer", seed=judge.SEED)

    def loss(self, model: Any, seed: int, step: int) -> Tensor:
        """Return the loss of `judge.train` on pictures drawn by `seed` and `step`."""
        rng = np.random.default_rng((seed, 2, step))
        pictures = [self.world.sample(rng) for _ in range(judge.RECIPE.clip_batch)]
        generator = torch.Generator().manual_seed(1000 * seed + step)
        return judge.batch_loss(model, self.tokens, pictures, generator)


def losses(lessons: Lessons, way: str, *, seed: int, steps: int) -> list[float]:
    """Return the loss of each step."""
    outer, factor = WAYS[way]
    torch.manual_seed(seed)
    clip = build_clip(judge.RECIPE, len(lessons.tokens))
    model = judge._Network(clip).train()  # pyright: ignore[reportPrivateUsage]
    pair = optimizers(model, lr=RATE, decay=DECAY, outer=outer)
    found = []
    for step in range(steps):
        now = rate(RATE, step / steps)
        for optimizer, times in zip(pair, (factor, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = times * now
        value = lessons.loss(model, seed, step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found.append(value.item())
    return found


def kept(lessons: Lessons, work: Path, way: str, *, seed: int, steps: int) -> list[float]:
    """Return the losses, from their file if the run is finished.

    The file is known by way, seed and steps, not by the code or torch that made it: empty `work` when either changes.
    """
    path = work / f"{list(WAYS).index(way)}-{seed}-{steps}.json"
    if not path.exists():
        write(path, losses(lessons, way, seed=seed, steps=steps))
    return json.loads(path.read_text())


def measure(lessons: Lessons, work: Path, *, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Return one row an optimiser: loss over the last fifth, and its difference to AdamW's."""
    ends = {way: np.zeros(seeds) for way in WAYS}
    for seed in range(seeds):
        for way in WAYS:
            run = kept(lessons, work, way, seed=seed, steps=steps)
            ends[way][seed] = np.mean(run[-max(1, steps // 5) :])
    rows = []
    for way, values in ends.items():
        gap, low, high = interval(values - ends["AdamW"], 4)
        loss = round(float(values.mean()), 4)
        rows.append({"name": way, "loss": loss, "minus_adamw": gap, "low": low, "high": high})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, 2 steps")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (2, 2) if arguments.quick else (arguments.seeds, arguments.steps)
    start = time.perf_counter()
    work = Path("runs/quality_diffgrad_recipe")
    rows = measure(Lessons(work), work, seeds=seeds, steps=steps)
    for row in rows:
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        print(f"{row['name']:>26} {row['loss']:8.4f} {row['minus_adamw']:+8.4f} {interval}")
    result = {f"{row['name']} loss": row["loss"] for row in rows}
    facts = {"steps": steps, "seeds": list(range(seeds)), "rows": rows}
    record("quality_diffgrad_recipe", result, facts, quick=arguments.quick, start=start)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
