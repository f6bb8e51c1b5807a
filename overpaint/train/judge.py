"""`icons-judge`: the classifier that scores `icons`; it takes no part in training `icons`.

A small `CLIPModel` with a seed and an augmentation of its own (rotation, scale, contrast, blur, noise, erased patches)
and linear heads for object, style and color on the image features. It is trained on all of the artwork, including the
pairs held out from `icons`, so that pictures of these pairs are scored by a model that was trained on them.

    overpaint train icons-judge --minutes 25
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overpaint import files
from overpaint.model.sampling import Progress
from overpaint.scorers import judge as scorer
from overpaint.train import card, icon_world
from overpaint.train.loop import Outer, Schedule, fit, remove_checkpoints, save_tensors
from overpaint.train.networks import CPU, TOKENS, build_clip
from overpaint.train.text_tower import as_pixels, contrast

__all__ = ["batch_loss", "labels", "real_accuracy", "tokenizer", "train"]

RECIPE = replace(
    CPU, text_layers=3, text_width=96, vision_layers=5, vision_width=128, clip_batch=64
)
VOCABULARY = 2304
SEED = 1000  # never used to train `icons`
_OUTER: dict[Outer, str] = {
    "adamw": "AdamW updated embeddings, vectors, the first and the last layer, Muon the rest.",
    "diffgrad": "DiffGrad at twice the rate updated embeddings, vectors, the first and the last layer, Muon the rest.",
}
_COMPARED = (  # benchmarks/quality_diffgrad_recipe.py
    "After 100 steps of this recipe, over five seeds, the loss was 8.979 with AdamW; with DiffGrad at twice the rate "
    "it was higher by 0.0002 [0.0000, 0.0003], which is no visible difference. With DiffGrad at AdamW's rate it was "
    "higher by 0.206 [0.179, 0.233], and with AdamW at half its rate by 0.206 [0.179, 0.233]."
)


class _Network(nn.Module):
    """A CLIP and its heads, trained together."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.projection_dim
        self.heads = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in labels().items()})


def labels() -> dict[str, tuple[str, ...]]:
    """Return the labels of each head, in the order of its outputs."""
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
    on_progress: Progress | None = None,
) -> Path:
    """Train `icons-judge`, write it to `out` and return that folder.

    Arguments as in `icons.train`, `optimizer` as in `loop.Schedule`.
    """
    out = card.prepare(out)
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    work.mkdir(parents=True, exist_ok=True)
    files.remove_drafts_in(work)
    world = icon_world.World(icon_world.fetch(artwork), hold_out=False)
    if not resume:
        remove_checkpoints(work, ["judge"])
    tokens = tokenizer(world, work / "tokenizer", seed=SEED)
    model = _Network(build_clip(RECIPE, len(tokens))).to(device)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, 2, step))
        pictures = [world.sample(rng) for _ in range(RECIPE.clip_batch)]
        generator = torch.Generator().manual_seed(SEED + step)
        return batch_loss(model, tokens, pictures, generator, device)

    schedule = Schedule(minutes, RECIPE.clip_lr, ema_decay=RECIPE.clip_ema, optimizer=optimizer)
    fit(model, loss, schedule, stage="judge", folder=work, on_progress=on_progress)
    with files.atomic_folder(out) as draft:
        _export(model, tokens, draft)
        judge = scorer.load(draft, device=device)
        figures = {
            f"{prefix}{kind}_top1_real": round(value, 4)
            for prefix, held_out in (("", False), ("heldout_", True))
            for kind, value in real_accuracy(judge, world, held_out=held_out).items()
        }
        card.save(
            draft, recipe=asdict(RECIPE), seed=SEED, device=device, trained=card.stages(work, ("judge",)),
            figures=figures, optimizer_note=f"{_OUTER[optimizer]} {_COMPARED}",
        )  # fmt: skip
    return out


def tokenizer(world: icon_world.World, folder: Path, *, seed: int = SEED) -> Any:
    """Return a `CLIPTokenizer`, loaded from `folder` or trained on icon names and captions and saved there."""
    import transformers

    build: Any = transformers.CLIPTokenizer
    if not (folder / "tokenizer.json").exists():
        rng = np.random.default_rng((seed, 1))
        captions = [world.sample(rng).caption for _ in range(400)]
        vocabulary, merges = _byte_pairs(icon_world.captions_corpus(world.sets, captions))
        tokens = build(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        with files.atomic(folder) as draft:
            tokens.save_pretrained(draft)
    return build.from_pretrained(folder)


def _byte_pairs(lines: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a BPE vocabulary and its merges, trained with CLIP's pre-tokenizer.

    Numbered as in CLIP: bytes, bytes + `</w>`, merges, two special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    byte_pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    byte_pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - 256,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    byte_pairs.train_from_iterator((line.lower() for line in lines), trainer)
    merges = [tuple(pair) for pair in json.loads(byte_pairs.to_str())["model"]["merges"]]
    names = alphabet + [letter + "</w>" for letter in alphabet]
    seen = set(names)
    used = []
    for left, right in merges:
        if left + right not in seen and len(names) < VOCABULARY - 2:
            seen.add(left + right)
            names.append(left + right)
            used.append((left, right))
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: index for index, name in enumerate(names)}, used


def batch_loss(
    model: Any,
    tokens: Any,
    pictures: list[icon_world.Picture],
    generator: torch.Generator,
    device: str = "cpu",
) -> Tensor:
    """Return the contrastive loss plus the cross-entropy of each head, on augmented pictures."""
    captions = [p.caption for p in pictures]
    pixels = _augment(as_pixels(pictures), generator).to(device)
    ids = tokens(captions, padding="longest", return_tensors="pt").input_ids.to(device)
    clip = model.clip
    images = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    texts = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    logits = clip.logit_scale.exp() * F.normalize(texts, dim=1) @ F.normalize(images, dim=1).t()
    total = contrast(logits, captions)
    for kind, names in labels().items():
        index = {name: i for i, name in enumerate(names)}
        target = torch.tensor([index.get(getattr(p, kind), -100) for p in pictures])
        total = total + F.cross_entropy(model.heads[kind](images), target.to(device))
    return total


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures (B, 3, H, W) in [-1, 1] with random moves, blur, contrast, brightness, noise, erased patches."""
    rows = len(pixels)
    pixels = _move(pixels, generator)

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


def _move(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 12 degrees, scale by 0.85 to 1.2, shift by up to 4 pixels; one row in four is unchanged."""
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


def _export(model: _Network, tokens: Any, folder: Path) -> None:
    """Write the networks, the tokenizer and the labels, in half precision."""
    model.clip.half().save_pretrained(folder, safe_serialization=True)
    tokens.save_pretrained(folder)
    heads = {k: v.half() for k, v in model.heads.state_dict().items()}
    save_tensors(heads, folder / "heads.safetensors")
    files.write_json(folder / "labels.json", labels())


def real_accuracy(
    judge: scorer.Judge, world: icon_world.World, *, held_out: bool, seed: int = 7
) -> dict[str, float]:
    """Return the judge's top-1 accuracy on real artwork for object, style and color.

    Over all (object, style) pairs that are held out from `icons`, or all others, each once, placed as in training, on
    a color that is not held out.
    """
    rng = np.random.default_rng(seed)
    reserved = icon_world.held_out()
    pairs = [
        (o, s)
        for o in icon_world.OBJECTS
        for s in icon_world.STYLES
        if ((o, s) in reserved) == held_out
    ]
    reserved_colors = icon_world.held_out_colors()
    colors = [
        str(rng.choice([c for c in icon_world.COLORS if (o, c) not in reserved_colors]))
        for o, _ in pairs
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
