"""`icons-judge`: the classifier that scores `icons` and never helped to train it.

A small `CLIPModel` with its own seed, its own augmentation (blur, noise, brightness, erased patches) and linear heads
for object, style and color on the image tower's pooled output. It sees the training pairs only, so its accuracy on
held-out pairs is a true generalisation figure, and the yardstick of the generator's.

    overpaint train icons-judge --minutes 15
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overpaint.train import icon_world
from overpaint.train.icons import CPU, as_pixels, build_clip, contrast, tokenizer
from overpaint.train.loop import Progress, fit, save_tensors

__all__ = ["labels", "real_accuracy", "train"]

RECIPE = replace(CPU, text_layers=3, text_width=96, vision_layers=5, vision_width=128, clip_batch=64)
SEED = 1000  # never the generator's


class _Judged(nn.Module):
    """A CLIP and its heads, trained together."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in labels().items()})


def labels() -> dict[str, tuple[str, ...]]:
    """Return what each head can say, in the order of its outputs."""
    return {
        "object": icon_world.subjects(),
        "style": tuple(icon_world.STYLES),
        "color": tuple(icon_world.COLORS),
    }


def train(
    *,
    out: Path,
    minutes: float = 15.0,
    device: str = "cpu",
    resume: bool = True,
    threads: int = 2,
    work: Path = Path("runs/icons-judge"),
    artwork: Path = Path("runs/artwork"),
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train `icons-judge` and write it to `out`; arguments as in `icons.train`."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    work.mkdir(parents=True, exist_ok=True)
    world = icon_world.World(artwork)
    tokens = tokenizer(world, work / "tokenizer", seed=SEED)
    model = _Judged(build_clip(RECIPE, len(tokens))).to(device)
    index = {kind: {name: i for i, name in enumerate(names)} for kind, names in labels().items()}

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, 2, step))
        pictures = [world.sample(rng) for _ in range(RECIPE.clip_batch)]
        captions = [p.caption for p in pictures]
        pixels = _augment(as_pixels(pictures), torch.Generator().manual_seed(SEED + step)).to(device)
        ids = tokens(captions, padding="longest", return_tensors="pt").input_ids.to(device)
        result = model.clip(input_ids=ids, pixel_values=pixels)
        total = contrast(result.logits_per_text, captions)
        pooled = result.vision_model_output.pooler_output
        for kind, head in model.heads.items():
            target = torch.tensor([index[kind].get(getattr(p, kind), -100) for p in pictures]).to(device)
            total = total + F.cross_entropy(head(pooled), target)
        return total

    fit(
        model, loss, stage="judge", folder=work, minutes=minutes, lr=1e-3, ema_decay=0.99,
        resume=resume, on_progress=on_progress,
    )  # fmt: skip
    return _export(model, tokens, out)


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, shift of brightness, noise and an erased patch, each of random strength a row; (B, 3, H, W) in [-1, 1]."""
    rows = len(pixels)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, 1, 1, 1, generator=generator)

    side = icon_world.SIZE
    soft = F.interpolate(F.avg_pool2d(pixels, 2), size=side, mode="bilinear")
    pixels = pixels.lerp(soft, draw(0, 1) * (draw(0, 1) < 0.5))
    pixels = pixels * draw(0.85, 1.1) + draw(-0.1, 0.1)
    pixels = pixels + draw(0, 0.15) * torch.randn(pixels.shape, generator=generator)
    grid = torch.arange(side).float()
    top, left = draw(0, side), draw(0, side)
    hole = ((grid.view(1, 1, -1, 1) - top).abs() < 6) & ((grid.view(1, 1, 1, -1) - left).abs() < 6)
    hole = hole & (draw(0, 1) < 0.3)
    return torch.where(hole, pixels.mean((2, 3), keepdim=True), pixels)


def _export(model: _Judged, tokens: Any, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    model.clip.half().save_pretrained(out, safe_serialization=True)
    tokens.save_pretrained(out)
    save_tensors({k: v.half() for k, v in model.heads.state_dict().items()}, out / "heads.safetensors")
    (out / "labels.json").write_text(json.dumps(labels(), indent=1) + "\n")
    return out


def real_accuracy(judge: Any, artwork: Path, *, held_out: bool, seed: int = 7) -> dict[str, float]:
    """Return the judge's top-1 on real artwork, object and style, over all seen or all held-out pairs.

    Every (object, style) pair once, on a color that training allows, placed as in training.
    """
    world = icon_world.World(artwork)
    rng = np.random.default_rng(seed)
    pairs = [
        (o, s)
        for o in icon_world.OBJECTS
        for s in icon_world.STYLES
        if ((o, s) in world.held_out) == held_out
    ]
    colors = [
        str(rng.choice([c for c in icon_world.COLORS if (o, c) not in world.held_out_colors])) for o, _ in pairs
    ]
    pixels = np.stack([world.single(o, s, c, rng) for (o, s), c in zip(pairs, colors, strict=True)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    truth = {"object": [o for o, _ in pairs], "style": [s for _, s in pairs], "color": colors}
    figures = {}
    for kind, names in truth.items():
        best = judge.classify(images, kind).argmax(1)
        said = [judge.labels[kind][i] for i in best]
        figures[kind] = sum(a == b for a, b in zip(said, names, strict=True)) / len(names)
    return figures
