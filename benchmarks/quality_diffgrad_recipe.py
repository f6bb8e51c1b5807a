"""Would the zoo's judge be trained as well by DiffGrad as by AdamW, in the part that AdamW has?

    python benchmarks/quality_diffgrad_recipe.py [--quick] [--json] [--steps N] [--seeds N]

The recipe of `icons-judge` as it is (Muon inside the network, one rate, its schedule over the steps, gradients clipped)
with embeddings, vectors and both ends given to AdamW at the recipe's rate, to AdamW at half of it, or to DiffGrad at
the recipe's rate and at twice it. Each seed has one start and one order of pictures for all four, and the loss that
counts is the mean over the last fifth of the steps; differences are paired, intervals Student's. 100 steps are a start
and not a training: they can say that DiffGrad loses, and not that it would win after 25 minutes.

About 20 minutes on one idle core; finished runs are kept in `runs/quality_diffgrad_recipe`. Writes
`benchmarks/results/quality_diffgrad_recipe.json`; with `--quick` (two seeds, 2 steps), into `runs/benchmarks`.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from overpaint import __version__
from overpaint.optim import DiffGrad
from overpaint.train import card, icon_world, judge
from overpaint.train.icons import as_pixels, build_clip, contrast, tokenizer
from overpaint.train.muon import Muon

RESULTS = Path(__file__).parent / "results"
RATE, DECAY, BETAS = 1e-3, 0.01, (0.9, 0.99)
ENDS = ("embed", "conv_in", "conv_out", "head", "projection")
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
WAYS: dict[str, tuple[float, Make]] = {
    "AdamW": (1.0, lambda g: torch.optim.AdamW(g, betas=BETAS, fused=True)),
    "AdamW, half the rate": (0.5, lambda g: torch.optim.AdamW(g, betas=BETAS, fused=True)),
    "DiffGrad": (1.0, lambda g: DiffGrad(g, betas=BETAS, decoupled_weight_decay=True, fused=True)),
    "DiffGrad, twice the rate": (
        2.0,
        lambda g: DiffGrad(g, betas=BETAS, decoupled_weight_decay=True, fused=True),
    ),
}


class Lessons:
    """The judge's world and its loss, step by step the same for all optimisers of a seed."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.world = icon_world.World(icon_world.fetch(Path("runs/artwork")), hold_out=False)
        self.tokens = tokenizer(self.world, work / "tokenizer", seed=judge.SEED)
        self.index = {
            kind: {name: i for i, name in enumerate(names)}
            for kind, names in judge.labels().items()
        }

    def loss(self, model: Any, seed: int, step: int) -> Tensor:
        """Return the loss of `judge.train` on pictures drawn by `seed` and `step`."""
        rng = np.random.default_rng((seed, 2, step))
        pictures = [self.world.sample(rng) for _ in range(judge.RECIPE.clip_batch)]
        captions = [p.caption for p in pictures]
        generator = torch.Generator().manual_seed(1000 * seed + step)
        pixels = judge._augment(as_pixels(pictures), generator)  # pyright: ignore[reportPrivateUsage]
        ids = self.tokens(captions, padding="longest", return_tensors="pt").input_ids
        clip = model.clip
        seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        read = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        logits = clip.logit_scale.exp() * F.normalize(read, dim=1) @ F.normalize(seen, dim=1).t()
        total = contrast(logits, captions)
        for kind, head in model.heads.items():
            found = [self.index[kind].get(getattr(p, kind), -100) for p in pictures]
            total = total + F.cross_entropy(head(seen), torch.tensor(found))
        return total


def optimizers(model: nn.Module, make: Make) -> list[torch.optim.Optimizer]:
    """Return the recipe's two, one of them made by `make`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside = {n for n, p in named if p.ndim > 1 and not any(end in n for end in ENDS)}
    outer = [(n, p) for n, p in named if n not in inside]
    groups = [
        {"params": [p for _, p in outer if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for _, p in outer if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [make(groups), Muon([p for n, p in named if n in inside], RATE, decay=DECAY)]


def losses(lessons: Lessons, way: str, *, seed: int, steps: int) -> list[float]:
    """Return the loss of each step."""
    factor, make = WAYS[way]
    torch.manual_seed(seed)
    clip = build_clip(judge.RECIPE, len(lessons.tokens))
    model = judge._Judged(clip).train()  # pyright: ignore[reportPrivateUsage]
    pair = optimizers(model, make)
    found = []
    for step in range(steps):
        share = step / steps
        rate = RATE * min(1.0, share / 0.02 + 1e-3) * 0.5 * (1 + math.cos(math.pi * share))
        for optimizer, times in zip(pair, (factor, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = times * rate
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
        _write(path, losses(lessons, way, seed=seed, steps=steps))
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
        gap = values - ends["AdamW"]
        reach = float(stats.t.ppf(0.975, seeds - 1) * stats.sem(gap))
        mean = float(gap.mean())
        rows.append(
            {"name": way, "loss": round(float(values.mean()), 4), "minus_adamw": round(mean, 4),
             "low": round(mean - reach, 4), "high": round(mean + reach, 4)}
        )  # fmt: skip
    return rows


def _write(path: Path, value: Any) -> None:
    """Write beside the place, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(beside, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, 2 steps")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (2, 2) if arguments.quick else (arguments.seeds, arguments.steps)
    start = time.perf_counter()
    work = Path("runs/quality_diffgrad_recipe")
    rows = measure(Lessons(work), work, seeds=seeds, steps=steps)
    for row in rows:
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        print(f"{row['name']:>26} {row['loss']:8.4f} {row['minus_adamw']:+8.4f} {interval}")
    protocol = {
        "steps": steps,
        "seeds": list(range(seeds)),
        "rows": rows,
        "device": "cpu",
        "threads": 1,
        "machine": platform.machine(),
        "quick": arguments.quick,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"overpaint": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": card.commit(),
    }  # fmt: skip
    result = {f"{row['name']} loss": row["loss"] for row in rows}
    folder = Path("runs/benchmarks") if arguments.quick else RESULTS
    _write(folder / "quality_diffgrad_recipe.json", {"result": result, "protocol": protocol})
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
