"""`icons-judge`: the classifier that scores `icons` and never helped to train it.

A small `CLIPModel` with its own seed, its own augmentation (turned, scaled, faded, blurred, noisy, torn) and linear
heads for object, style and color on the image features. It knows the whole of the artwork, the pairs held out from
`icons` too: what a model draws for a pair that it never saw is judged by one who has seen the real thing.

    overpaint train icons-judge --minutes 25
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overpaint.scorers import judge as features
from overpaint.train import card, icon_world
from overpaint.train.icons import (
    CPU,
    as_pixels,
    build_clip,
    contrast,
    tokenizer,
)
from overpaint.train.loop import Outer, Progress, fit, save_tensors

__all__ = ["labels", "real_accuracy", "train"]

RECIPE = replace(
    CPU, text_layers=3, text_width=96, vision_layers=5, vision_width=128, clip_batch=64
)
SEED = 1000  # never the generator's
_OUTER: dict[Outer, str] = {
    "adamw": "AdamW took embeddings, vectors and both ends, Muon the rest.",
    "diffgrad": "DiffGrad at twice the rate took embeddings, vectors and both ends, Muon the rest.",
}
_COMPARED = (  # benchmarks/quality_diffgrad_recipe.py
    "After 100 steps of this recipe, over five seeds, the loss was 8.979 with AdamW; with DiffGrad at twice the rate "
    "+0.0002 [+0.0000, +0.0003] on top. It does not gain, and loses nothing that a picture would show. At AdamW's own "
    "rate that was +0.206 [0.179, 0.233], and with AdamW at half of it +0.206 [0.179, 0.233]."
)


class _Judged(nn.Module):
    """A CLIP and its heads, trained together."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.projection_dim
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
    minutes: float = 25.0,
    device: str = "cpu",
    resume: bool = True,
    threads: int = 2,
    work: Path = Path("runs/icons-judge"),
    artwork: Path = Path("runs/artwork"),
    optimizer: Outer = "diffgrad",
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train `icons-judge` and write it to `out`; arguments as in `icons.train`, `optimizer` as in `loop.fit`."""
    card.check_target(out)
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    work.mkdir(parents=True, exist_ok=True)
    world = icon_world.World(icon_world.fetch(artwork), hold_out=False)
    tokens = tokenizer(world, work / "tokenizer", seed=SEED)
    model = _Judged(build_clip(RECIPE, len(tokens))).to(device)
    index = {kind: {name: i for i, name in enumerate(names)} for kind, names in labels().items()}

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, 2, step))
        pictures = [world.sample(rng) for _ in range(RECIPE.clip_batch)]
        captions = [p.caption for p in pictures]
        pixels = _augment(as_pixels(pictures), torch.Generator().manual_seed(SEED + step)).to(
            device
        )
        ids = tokens(captions, padding="longest", return_tensors="pt").input_ids.to(device)
        clip = model.clip
        seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        read = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        logits = clip.logit_scale.exp() * F.normalize(read, dim=1) @ F.normalize(seen, dim=1).t()
        total = contrast(logits, captions)
        for kind, head in model.heads.items():
            target = torch.tensor([index[kind].get(getattr(p, kind), -100) for p in pictures]).to(
                device
            )
            total = total + F.cross_entropy(head(seen), target)
        return total

    fit(
        model, loss, stage="judge", folder=work, minutes=minutes, lr=1e-3, ema_decay=0.99,
        optimizer=optimizer, resume=resume, on_progress=on_progress,
    )  # fmt: skip
    _export(model, tokens, out)
    judge = features.load(out, device=device)
    figures = {
        f"{prefix}{kind}_top1_real": round(value, 4)
        for prefix, held in (("", False), ("heldout_", True))
        for kind, value in real_accuracy(judge, world, held_out=held).items()
    }
    trained = card.stages(work, ("judge",))
    card.write_card(
        out, recipe=asdict(RECIPE), seed=SEED, device=device, trained=trained, figures=figures,
        optimizer_note=f"{_OUTER[optimizer]} {_COMPARED}",
    )  # fmt: skip
    return out


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, fade, blur, brighten, add noise, erase a patch: random strengths a row; (B, 3, H, W) in [-1, 1]."""
    rows = len(pixels)
    pixels = _moved(pixels, generator)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, 1, 1, 1, generator=generator)

    side = icon_world.SIZE
    soft = F.interpolate(F.avg_pool2d(pixels, 2), size=side, mode="bilinear")
    pixels = pixels.lerp(soft, draw(0, 1) * (draw(0, 1) < 0.5))
    pixels = pixels.lerp(pixels.mean(1, keepdim=True), draw(0, 0.4) * (draw(0, 1) < 0.3))
    pixels = pixels * draw(0.85, 1.1) + draw(-0.1, 0.1)
    pixels = pixels + draw(0, 0.15) * torch.randn(pixels.shape, generator=generator)
    grid = torch.arange(side).float()
    top, left = draw(0, side), draw(0, side)
    hole = ((grid.view(1, 1, -1, 1) - top).abs() < 6) & ((grid.view(1, 1, 1, -1) - left).abs() < 6)
    hole = hole & (draw(0, 1) < 0.3)
    return torch.where(hole, pixels.mean((2, 3), keepdim=True), pixels)


def _moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by 0.85 to 1.2, shift by up to 4 pixels; a row in four stays as it is."""
    rows = len(pixels)
    angle, size, x, y, keep = torch.rand(5, rows, generator=generator)
    angle, size = (angle * 2 - 1) * 0.21, 0.85 + 0.35 * size
    cosine, sine = angle.cos() / size, angle.sin() / size
    shift = torch.stack([x, y], 1) * 0.25 - 0.125
    matrix = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], 1).view(
        rows, 2, 3
    )
    matrix = torch.where(keep.view(-1, 1, 1) < 0.25, torch.eye(2, 3), matrix)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _export(model: _Judged, tokens: Any, out: Path) -> None:
    with card.replacing(out) as beside:
        model.clip.half().save_pretrained(beside, safe_serialization=True)
        tokens.save_pretrained(beside)
        heads = {k: v.half() for k, v in model.heads.state_dict().items()}
        save_tensors(heads, beside / "heads.safetensors")
        (beside / "labels.json").write_text(json.dumps(labels(), indent=1) + "\n")


def real_accuracy(
    judge: features.Judge, world: icon_world.World, *, held_out: bool, seed: int = 7
) -> dict[str, float]:
    """Return the judge's top-1 on real artwork: object, style and color, over all seen or all held-out pairs.

    Every (object, style) pair once, on a color that training allows, placed as in training.
    """
    rng = np.random.default_rng(seed)
    kept = icon_world.held_out()
    pairs = [
        (o, s)
        for o in icon_world.OBJECTS
        for s in icon_world.STYLES
        if ((o, s) in kept) == held_out
    ]
    barred = icon_world.held_out_colors()
    colors = [
        str(rng.choice([c for c in icon_world.COLORS if (o, c) not in barred])) for o, _ in pairs
    ]
    pixels = np.stack([world.single(o, s, c, rng) for (o, s), c in zip(pairs, colors, strict=True)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    truth = {"object": [o for o, _ in pairs], "style": [s for _, s in pairs], "color": colors}
    return {
        kind: float(
            np.mean([a == b for a, b in zip(judge.predict(images, kind), names, strict=True)])
        )
        for kind, names in truth.items()
    }
