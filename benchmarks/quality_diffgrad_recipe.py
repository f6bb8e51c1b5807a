"""Loss of the zoo's judge when DiffGrad replaces AdamW in its training recipe.

    python benchmarks/quality_diffgrad_recipe.py [--quick] [--json] [--steps N] [--seeds N]

The recipe of `icons-judge` (Muon inside the network, one rate, its schedule over the steps, gradients clipped), with
embeddings, vectors and the first and last layers updated by AdamW at the recipe's rate, by AdamW at half of it, or by
DiffGrad at the recipe's rate and at twice it. Each seed has one start and one order of pictures for all four. The loss
is the mean over the last fifth of the steps; differences are paired, intervals are Student's. 100 steps are only the
beginning of a training: the result can show that DiffGrad is worse there, but not that it is better after 25 minutes.

About 25 minutes on one idle core; finished runs are stored in `runs/quality_diffgrad_recipe`. Writes
`benchmarks/results/quality_diffgrad_recipe.json`; with `--quick` (two seeds, 2 steps), into `runs/benchmarks`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_diffgrad import interval, record
from torch import Tensor, nn

from overpaint import files
from overpaint.train import icon_world, judge
from overpaint.train.judge import tokenizer
from overpaint.train.loop import Outer, optimizers, rate
from overpaint.train.networks import build_clip

RATE, DECAY = 1e-3, 0.01
OPTIMIZERS: dict[str, tuple[Outer, float]] = {  # times the rate
    "AdamW": ("adamw", 1.0),
    "AdamW, half the rate": ("adamw", 0.5),
    "DiffGrad": ("diffgrad", 1.0),
    "DiffGrad, twice the rate": ("diffgrad", 2.0),
}


class Task:
    """The judge's training data and loss; each step of a seed is the same for all optimisers."""

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


def losses(task: Task, name: str, *, seed: int, steps: int) -> list[float]:
    """Return the loss of each step."""
    outer, factor = OPTIMIZERS[name]
    torch.manual_seed(seed)
    clip = build_clip(judge.RECIPE, len(task.tokens))
    model = judge._Network(clip).train()  # pyright: ignore[reportPrivateUsage]
    pair = optimizers(model, lr=RATE, decay=DECAY, outer=outer)
    values = []
    for step in range(steps):
        now = rate(RATE, step / steps)
        for optimizer, times in zip(pair, (factor, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = times * now
        value = task.loss(model, seed, step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        values.append(value.item())
    return values


def stored_losses(task: Task, work: Path, name: str, *, seed: int, steps: int) -> list[float]:
    """Return the losses; those of a finished run are read from their file.

    The name of the file depends on optimiser, seed and steps, not on the code or the release of torch: empty `work`
    when these change.
    """
    path = work / f"{list(OPTIMIZERS).index(name)}-{seed}-{steps}.json"
    if not path.exists():
        files.write_json(path, losses(task, name, seed=seed, steps=steps))
    return json.loads(path.read_text())


def measure(task: Task, work: Path, *, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Return one row for each optimiser: its loss over the last fifth, and the difference to AdamW's."""
    ends = {name: np.zeros(seeds) for name in OPTIMIZERS}
    for seed in range(seeds):
        for name in OPTIMIZERS:
            run = stored_losses(task, work, name, seed=seed, steps=steps)
            ends[name][seed] = np.mean(run[-max(1, steps // 5) :])
    rows = []
    for name, values in ends.items():
        gap, low, high = interval(values - ends["AdamW"], 4)
        loss = round(float(values.mean()), 4)
        rows.append({"name": name, "loss": loss, "minus_adamw": gap, "low": low, "high": high})
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
    rows = measure(Task(work), work, seeds=seeds, steps=steps)
    for row in rows:
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        print(f"{row['name']:>26} {row['loss']:8.4f} {row['minus_adamw']:+8.4f} {interval}")
    result = {f"{row['name']} loss": row["loss"] for row in rows}
    facts = {"steps": steps, "seeds": list(range(seeds)), "rows": rows}
    record("quality_diffgrad_recipe", result, facts, quick=arguments.quick, start=start)
    if arguments.json:
        print(files.to_json(result))


if __name__ == "__main__":
    main()
