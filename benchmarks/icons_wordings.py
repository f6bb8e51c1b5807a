"""Prompts of `quality_icons` about wordings, places and two objects, and how their pictures are scored."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

import overpaint as op
from overpaint.probes.text import article
from overpaint.scorers import judge as scorers
from overpaint.train import captions, icon_world

__all__ = [
    "FREE",
    "Row",
    "frames",
    "hits",
    "obeyed",
    "places",
    "seen_objects",
    "synonyms",
    "two",
    "two_on_artwork",
]

# Free wordings for the grid, written by hand and not drawn from the grammar, which has some of their words too.
FREE = (
    "please draw me one lonely {object}, {style} style",
    "could we have the {object} once, {style} style would be nice",
    "{style} style. just {article} {object}.",
    "what would {article} {object} look like in {style} style?",
    "i dreamt of {article} {object} last night, draw it in {style} style",
    "{object}, but in {style} style",
    "my grandmother's {object} as a {style} style icon",
    "hello! {article} {object} please, {style} style, {color} background",
    "a very good {object} on a {color} background, {style} style",
    "{color} background with {article} {object} on it, {style} style",
)


@dataclass(frozen=True)
class Row:
    """A prompt, the object and the style that it names, and the unit of its interval."""

    prompt: str
    object: str
    style: str
    unit: str


def frames(
    pairs: Sequence[tuple[str, str]], part: captions.Part, number: int, seed: int = 0
) -> list[Row]:
    """Return `number` prompts of each pair in frames of `part`; the name of the object is as in training."""
    rng = np.random.default_rng(seed)
    words = captions.Captions(part)
    return [
        Row(words.frame(words.noun_phrase(o, rng), s, "", rng), o, s, f"{o} {s}")
        for o, s in pairs
        for _ in range(number)
    ]


def synonyms(names: dict[str, str], number: int, *, own_name: bool) -> list[Row]:
    """Return `number` prompts of each synonym in different styles, or of the name in its place."""
    reserved = icon_world.held_out()
    rows = []
    for synonym, name in names.items():
        styles = [s for s in icon_world.STYLES if (name, s) not in reserved][:number]
        word = name if own_name else synonym
        rows += [Row(f"{article(word)} {word} in {s} style", name, s, synonym) for s in styles]
    return rows


def places(pairs: Sequence[tuple[str, str]]) -> list[tuple[Row, str]]:
    """Return for each pair one prompt for each side of the picture."""
    return [
        (Row(f"{article(o)} {o} on the {side}, {s} style", o, s, f"{o} {s}"), side)
        for o, s in pairs
        for side in captions.SIDES
    ]


def two(number: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Return `number` prompts that name two objects, with the two names."""
    rng = np.random.default_rng(seed)
    reserved = icon_world.held_out()
    rows = []
    while len(rows) < number:
        one, other = (str(n) for n in rng.choice(list(icon_world.OBJECTS), 2, replace=False))
        style = str(rng.choice(list(icon_world.STYLES)))
        if not reserved & {(one, style), (other, style)}:
            text = f"{article(one)} {one} and {article(other)} {other} in {style} style"
            rows.append((text, one, other))
    return rows


def two_on_artwork(
    model: op.TextToImage,
    judge: scorers.Judge,
    rows: Sequence[tuple[str, str, str]],
    world: icon_world.World,
    size: int,
) -> tuple[list[float], list[float]]:
    """Return for each row of `two` whether both objects are seen on the real artwork, and behind the autoencoder.

    The artwork of the two is drawn side by side as in training, in pictures of `size` pixels.
    """
    drawn = []
    for text, *names in rows:
        set_ = icon_world.STYLES[text.rpartition(" in ")[2].removesuffix(" style")]
        canvas = np.ones((size, size, 3), np.float32)
        width = size * 15 // 32
        for name, left in zip(names, (size // 32, size - size // 32 - width), strict=True):
            icon = world.icon(icon_world.OBJECTS[name], set_, width)
            icon_world.place(canvas, icon, left, (size - width) // 2)
        drawn.append(torch.from_numpy(np.clip(canvas, 0, 1)).permute(2, 0, 1))
    real = torch.stack(drawn)
    vae = model.pipe.vae
    decoded = []
    with torch.no_grad():
        for batch in real.split(32):
            pixels = (2 * batch - 1).to(vae.device, vae.dtype)
            decoded.append(vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float().cpu())
    coded = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
    verdicts = []
    for images in (real, coded):
        seen = seen_objects(judge, images)
        verdicts.append([float({a, b} <= s) for (_, a, b), s in zip(rows, seen, strict=True)])
    return verdicts[0], verdicts[1]


def hits(
    model: op.TextToImage, judge: scorers.Judge, rows: Sequence[Row], *, seeds: range, steps: int
) -> dict[str, list[float]]:
    """Return for each picture, seed by seed, whether object and style are right, 1 or 0, and the CLIP score."""
    prompts = [row.prompt for _ in seeds for row in rows]
    images = model.generate(
        prompts, seed=[seed for seed in seeds for _ in rows], steps=steps
    ).images
    objects, styles = judge.predict(images, "object"), judge.predict(images, "style")
    truth = [row for _ in seeds for row in rows]
    return {
        "object_top1": [float(a == row.object) for a, row in zip(objects, truth, strict=True)],
        "style_top1": [float(a == row.style) for a, row in zip(styles, truth, strict=True)],
        "clip_score": judge.clip_score(images, prompts).tolist(),
    }


def obeyed(image: Tensor, side: str) -> float:
    """Return 1 if the centre of what is drawn is off the middle by 4 pixels or more, most of all to `side`, else 0.

    Args:
        image: (3, 64, 64) in [0, 1].
        side: One of `captions.SIDES`.
    """
    mask = drawn(image)
    if not mask.any():
        return 0.0
    row, column = ndimage.center_of_mass(mask)
    middle = (image.shape[-1] - 1) / 2
    offsets = {
        "left": middle - column, "right": column - middle, "top": middle - row, "bottom": row - middle,
    }  # fmt: skip
    return float(max(offsets, key=lambda name: offsets[name]) == side and offsets[side] >= 4)


def drawn(image: Tensor) -> np.ndarray:
    """Return where a picture differs from its background, the median of its border; bool (H, W)."""
    return ((image - _background(image)).abs().amax(0) > 0.15).numpy()


def _background(image: Tensor) -> Tensor:
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    return border.median(1).values[:, None, None]


def seen_objects(judge: scorers.Judge, images: Tensor) -> list[set[str]]:
    """Return the objects that the judge sees in parts of each picture: the pieces of what is drawn, and the halves.

    Args:
        judge: Names the parts, scaled to the 64 pixels that it was trained on.
        images: (N, 3, S, S) in [0, 1].
    """
    parts, owners = [], []
    for index, image in enumerate(images):
        for part in _parts(image):
            parts.append(part)
            owners.append(index)
    seen: list[set[str]] = [set() for _ in images]
    for owner, label in zip(owners, judge.predict(torch.stack(parts), "object"), strict=True):
        seen[owner].add(label)
    return seen


def _parts(image: Tensor) -> list[Tensor]:
    side = image.shape[-1]
    half = side // 2
    boxes = [(0, side, 0, half), (0, side, half, side), (0, half, 0, side), (half, side, 0, side)]
    mask = drawn(image)
    labels, _ = ndimage.label(ndimage.binary_dilation(mask, iterations=1))
    for rows, columns in ndimage.find_objects(labels):
        if (rows.stop - rows.start) * (columns.stop - columns.start) >= 100 * (side / 64) ** 2:
            boxes.append((rows.start, rows.stop, columns.start, columns.stop))
    return [_square(image, mask, box) for box in boxes]


def _square(image: Tensor, drawn_mask: np.ndarray, box: tuple[int, int, int, int]) -> Tensor:
    """Return what is drawn in a box, scaled to four fifths of 64 pixels on the picture's background."""
    top, bottom, left, right = box
    mask = drawn_mask[top:bottom, left:right]
    if mask.any():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, bottom = top + int(rows[0]), top + int(rows[-1]) + 1
        left, right = left + int(columns[0]), left + int(columns[-1]) + 1
    cut = image[:, top:bottom, left:right]
    size = icon_world.SIZE
    longest = max(cut.shape[1:])
    height, width = (max(1, round(0.8 * size * n / longest)) for n in cut.shape[1:])
    scaled = F.interpolate(cut[None], (height, width), mode="bilinear", antialias=True)[0]
    square = _background(image).expand(3, size, size).clone()
    y, x = (size - height) // 2, (size - width) // 2
    square[:, y : y + height, x : x + width] = scaled
    return square
