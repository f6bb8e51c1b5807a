"""Pictures of one line of lettering with a known word, font, color and place of each letter, drawn for training.

A sample is a function of (world, stage, seed, index) alone. The word stands on a plain, textured or photographed
background; in half of the samples of the later stages a second word of the same style stands beside the mask, from
which the style can be copied. The stages are a curriculum: grey letters of one font; one font in color on photographs;
all training fonts with second words; and free placement with mild perspective, shadows, outlines, textures, and masks
that are larger than the word.

Source: the curriculum and the fixed line follow a prototype that learned to spell on one CPU core; the mixture of
basic and XKCD colors and the second word follow Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from overpaint.scene_text.instructions import compose
from overpaint.scene_text.line import Line
from overpaint.train import lettering_words as words
from overpaint.train import photographs
from overpaint.train.lettering_backgrounds import DARK, LIGHT, background
from overpaint.train.lettering_colors import contrast, luminance, palette
from overpaint.train.lettering_fonts import Face
from overpaint.train.lettering_glyphs import Style, Word, draw_word, paint

__all__ = [
    "STAGES", "Sample", "Stage", "World", "draw", "draw_named", "faces_of", "photograph_names", "world",
]  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Settings of one stage of the curriculum."""

    in_color: bool = True  # False: grey letters on grey
    font: str | None = None  # the only face; None for all of the world
    is_plain: bool = False  # lower-case words of letters only
    # Share of samples with free size, spacing, perspective, effects and larger masks.
    free: float = 0.0
    siblings: float = 0.0  # share of samples with a second word of the same style beside the mask
    basic: float = 0.4  # share of the eleven basic colors
    least_contrast: float = 2.0  # contrast ratio of letters and background


STAGES = {
    "grey": Stage(in_color=False, font="Roboto-Bold", is_plain=True),
    "single": Stage(font="Roboto-Bold", basic=0.7),
    "fonts": Stage(siblings=0.5, basic=0.5),
    "photographs": Stage(free=0.8, siblings=0.5, least_contrast=1.8),
}


@dataclass(frozen=True)
class World:
    """Faces, photographs and the line; those of training, or held-out ones."""

    faces: tuple[Face, ...]
    photos: tuple[np.ndarray, ...]  # RGB uint8 (H, W, 3)
    line: Line = field(default_factory=Line)
    held_out_words: bool = False  # draw words of the held-out tenth


@dataclass(frozen=True)
class Sample:
    """One picture and its labels.

    Attributes:
        image: The line with the word, RGB uint8 (H, W, 3).
        mask: True where the word is to be written, bool (H, W).
        edges: Left edge of the first letter and right edge of each, in pixels, float32 (n + 1,).
        text: The word.
        instruction: Names the word, and font and color or only one of them or neither.
        font: Name of the face.
        color: Name of the color.
        capital: Row of the upper edge of capital letters; lower down if the face is shrunk to hold its ascenders.
        baseline: Row of their lower edge.
        cover: Opacity of the letters of the word, 0 to 1, float32 (H, W).
        clean: The line without the word, RGB uint8 (H, W, 3).
    """

    image: np.ndarray
    mask: np.ndarray
    edges: np.ndarray
    text: str
    instruction: str
    font: str
    color: str
    capital: float
    baseline: float
    cover: np.ndarray
    clean: np.ndarray


def photograph_names(split: str) -> tuple[str, ...]:
    """Return the photographs of a split, without pictures of text, by the lists of `photographs`.

    Args:
        split: `"training"`, or `"held-out"` for those that monitor or measure.
    """
    lists = (
        photographs.TRAINING
        if split == "training"
        else photographs.VALIDATION + photographs.HELD_OUT
    )
    with_text = (
        "text", "page", "notes", "sudoku", "cards", "licenseplate", "ml.png", "stanford", "building", "box_in", "stuff",
    )  # fmt: skip
    return tuple(name for name in lists if not any(part in name.lower() for part in with_text))


def world(
    faces: Sequence[Face], photos: Path, split: str = "training", *, line: Line | None = None
) -> World:
    """Return the world of a split: its faces of `faces`, its photographs, and held-out words unless it is training.

    Args:
        faces: All faces, of `lettering_fonts.load`.
        photos: Folder of the photographs, of `photographs.fetch`.
        split: `"training"`; `"held-out"` for words and photographs that were never trained on, in training faces; or
            `"held-out fonts"` for faces that were not either.
        line: Sizes of the line.
    """
    names = photograph_names("training" if split == "training" else "held-out")
    pictures = (photographs.read(name, photos, side=384) for name in names)
    return World(
        faces=faces_of(faces, split),
        photos=tuple(np.ascontiguousarray(p.permute(1, 2, 0).numpy()) for p in pictures),
        line=line or Line(),
        held_out_words=split != "training",
    )


def faces_of(faces: Sequence[Face], split: str) -> tuple[Face, ...]:
    """Return the faces of a split of `world`: the held-out ones for `"held-out fonts"`, else those of training."""
    wanted = "held-out" if split == "held-out fonts" else "training"
    return tuple(face for face in faces if face.split == wanted)


def draw(
    world: World,
    stage: Stage,
    seed: int,
    index: int,
    *,
    text: str | None = None,
    names_style: bool | None = None,
) -> Sample:
    """Return sample `index` of a stage.

    Args:
        world: Faces, photographs and line.
        stage: Settings.
        seed: Seed of the run.
        index: Number of the sample.
        text: The word, instead of a random one.
        names_style: Whether the instruction names font and color; by default each with probability 1/2.

    Raises:
        ValueError: The world does not have the face of the stage.
    """
    rng = np.random.default_rng([seed, index])
    is_free = rng.random() < stage.free
    face = _face(world, stage, rng)
    if text is None:
        text = words.draw(rng, held_out=world.held_out_words, is_plain=stage.is_plain)
        text = text if stage.is_plain else words.draw_case(rng, text)
    sibling = ""
    if rng.random() < stage.siblings:
        sibling = words.draw(rng, held_out=world.held_out_words, longest=8)
        sibling = words.draw_case(rng, sibling)
    target, second = _place(world.line, rng, face, text, sibling, is_free)
    ground = background(rng, world, in_color=stage.in_color)
    style, name = _style(stage, rng, ground, target, is_free)
    covers = [word for word in (target, second) if word is not None]
    clean = paint(ground, covers[1:], style)
    image = paint(clean, covers[:1], style)
    if is_free:
        clean, image = _camera(rng, clean, image)
    mask = _mask(world.line, rng, target, second, style, is_free)
    with_font, with_color = draw_named(rng) if names_style is None else (names_style,) * 2
    instruction = _instruction(
        rng, text, face.name if with_font else None, name if with_color else None
    )
    if not stage.in_color:
        instruction = compose(text)
    return Sample(
        image=image, mask=mask, edges=target.edges, text=text, instruction=instruction, font=face.name, color=name,
        capital=target.capital, baseline=target.baseline, cover=target.cover, clean=clean,
    )  # fmt: skip


def draw_named(rng: np.random.Generator) -> tuple[bool, bool]:
    """Return whether an instruction names the font and whether it names the color, each with probability 1/2."""
    with_font, with_color = rng.random(2) < 0.5
    return bool(with_font), bool(with_color)


def _face(world: World, stage: Stage, rng: np.random.Generator) -> Face:
    """Return the face of the stage, or a random one: each family equally often."""
    if stage.font is not None:
        named = [face for face in world.faces if face.name == stage.font]
        if not named:
            raise ValueError(
                f"the world has no face {stage.font!r} of this stage: take the faces of training."
            )
        return named[0]
    families = sorted({face.family for face in world.faces})
    family = families[rng.integers(len(families))]
    faces = [face for face in world.faces if face.family == family]
    return faces[rng.integers(len(faces))]


def _place(
    line: Line, rng: np.random.Generator, face: Face, text: str, sibling: str, is_free: bool
) -> tuple[Word, Word | None]:
    """Return the word on its line, and the second word to the left or right of it."""
    height = line.baseline - line.capital
    capital, baseline, stretch, spacing = height, line.baseline, 1.0, 0.0
    if is_free:
        capital = height * rng.uniform(0.8, 1.15)
        baseline += rng.uniform(-1.5, 1.5) * (capital < height)
        stretch = rng.uniform(0.85, 1.2)
        spacing = rng.uniform(-0.02, 0.25) * (rng.random() < 0.3)
    word = Word.lay_out(face, text, capital=capital, spacing=spacing)
    room = line.width - 2 * line.margin
    stretch = min(stretch, (room - 4) / word.width)
    width = word.width * stretch
    slack = line.width - 2 * line.margin - width
    to_right = rng.random() < 0.5
    share = rng.random() ** (2 if sibling else 1)  # a second word gets more room
    x = line.margin + slack * (share if to_right else 1 - share)
    bend = _bend(line, rng) if is_free else np.eye(3)
    target = draw_word(word, line, x=x, baseline=baseline, stretch=stretch, bend=bend)
    if not sibling:
        return target, None
    beside = Word.lay_out(face, sibling, capital=capital, spacing=spacing)
    gap = capital * rng.uniform(0.45, 0.9) + 2
    place = x + width + gap if to_right else x - gap - beside.width * stretch
    return target, draw_word(beside, line, x=place, baseline=baseline, stretch=stretch, bend=bend)


def _bend(line: Line, rng: np.random.Generator) -> np.ndarray:
    """Return a homography that moves the corners of the line by less than a pixel or two."""
    corners = np.array(
        [[0, 0], [line.width, 0], [line.width, line.height], [0, line.height]], np.float32
    )
    moved = corners + rng.uniform(-1, 1, (4, 2)).astype(np.float32) * np.array([3, 0.8], np.float32)
    return cv2.getPerspectiveTransform(corners, moved)


def _style(
    stage: Stage, rng: np.random.Generator, ground: np.ndarray, target: Word, is_free: bool
) -> tuple[Style, str]:
    """Return fill and effects of the letters, and the name of their color, which contrasts with the background."""
    under = ground[cv2.dilate(target.cover, np.ones((5, 5), np.uint8)) > 0.3]
    under = under if len(under) else ground.reshape(-1, 3)
    if not stage.in_color:
        level = rng.uniform(*(DARK if under.mean() > 127 else LIGHT))
        return Style(np.full(3, level, np.float32)), "grey"
    behind = luminance(under)  # of each pixel
    style = Style(np.zeros(3, np.float32))
    if is_free:
        style = _effects(rng, float(behind.mean()))
        behind = luminance(style.outline[None]) if style.outline is not None else behind
    colors = palette()
    levels = [behind.mean(), *np.quantile(behind, (0.2, 0.8))]
    ratios = np.stack([contrast(colors.luminances, level) for level in levels])
    ratios[1:] *= 1.3  # a fifth of the pixels may be closer to the letters
    lowest = ratios.min(0)
    allowed = lowest >= stage.least_contrast
    basics = allowed & colors.basic
    choices = np.flatnonzero(basics if basics.any() and rng.random() < stage.basic else allowed)
    if len(choices) == 0:
        choices = np.array([lowest.argmax()])
    chosen = int(choices[rng.integers(len(choices))])
    return replace(style, fill=colors.values[chosen]), colors.names[chosen]


def _effects(rng: np.random.Generator, behind: float) -> Style:
    """Return a style without fill, at times with outline, shadow, gradient and grain."""
    outline = None
    if rng.random() < 0.15:
        outline = np.full(3, 245 if behind < 0.3 else 15, np.float32)
        if rng.random() < 0.4:
            outline = rng.uniform(0, 255, 3).astype(np.float32)
    shadow = rng.uniform(0.3, 0.8) if rng.random() < 0.25 else 0.0
    return Style(
        fill=np.zeros(3, np.float32),
        outline=outline,
        shadow=float(shadow),
        offset=(float(rng.uniform(-1.5, 1.5)), float(rng.uniform(0.5, 1.5))),
        gradient=float(rng.uniform(-30, 30)) if rng.random() < 0.2 else 0.0,
        grain=float(rng.uniform(4, 14)) if rng.random() < 0.2 else 0.0,
        seed=int(rng.integers(2**31)),
    )


def _camera(
    rng: np.random.Generator, clean: np.ndarray, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return both pictures with the same blur, noise and JPEG artefacts."""
    blur = rng.uniform(0.3, 0.7) if rng.random() < 0.3 else 0.0
    noise = rng.normal(0, rng.uniform(1, 5), image.shape) if rng.random() < 0.5 else 0.0
    quality = int(rng.integers(55, 95)) if rng.random() < 0.15 else 0
    results = []
    for picture in (clean, image):
        seen = cv2.GaussianBlur(picture, (0, 0), blur) if blur else picture
        seen = np.clip(seen + noise, 0, 255).round().astype(np.uint8)
        if quality:
            _, data = cv2.imencode(".jpg", seen[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
            decoded: Any = cv2.imdecode(data, cv2.IMREAD_COLOR)
            seen = np.ascontiguousarray(decoded[..., ::-1])
        results.append(seen)
    return results[0], results[1]


def _mask(
    line: Line,
    rng: np.random.Generator,
    target: Word,
    second: Word | None,
    style: Style,
    is_free: bool,
) -> np.ndarray:
    """Return the region to rewrite: the box of the word, in free samples larger or with slanted sides."""
    left, right = float(target.edges[0]) - 2, float(target.edges[-1]) + 2
    rows, columns = np.nonzero(target.reach(style) > 0.02)
    if len(columns):
        left, right = min(left, columns.min()), max(right, columns.max() + 1)
    top, bottom = float(line.top), float(line.bottom)
    if len(rows):
        top, bottom = min(top, rows.min()), max(bottom, rows.max() + 1)
    lowest, highest = 0.0, float(line.width)
    if second is not None:
        is_right = second.edges[0] > target.edges[0]
        highest = min(highest, max(right, second.edges[0] - 1)) if is_right else highest
        lowest = lowest if is_right else max(lowest, min(left, second.edges[-1] + 1))
    slants = np.zeros(4)
    if is_free:
        wide = rng.random() < 0.25
        left -= rng.uniform(0, 40 if wide else 4)
        right += rng.uniform(0, 40 if wide else 4)
        slants = rng.uniform(0, 4, 4) * (rng.random() < 0.3)
    left, right = max(lowest, left), min(highest, right)
    corners = np.array([
        [left - slants[0], top], [right + slants[1] - 1, top], [right + slants[2] - 1, bottom - 1],
        [left - slants[3], bottom - 1],
    ])  # fmt: skip
    mask = np.zeros((line.height, line.width), np.uint8)
    cv2.fillConvexPoly(mask, np.round(corners).astype(np.int32), 1)
    return mask.astype(bool)


def _instruction(rng: np.random.Generator, text: str, font: str | None, color: str | None) -> str:
    """Return the template of DiffSTE in 6 of 10 draws, and the same in other words otherwise."""
    if rng.random() < 0.6:
        return compose(text, font, color)
    texts = {
        (True, True): (
            'Write "{w}" in {c} with the font {f}', 'The word "{w}" in font {f}, colored in {c}',
            '"{w}" in {c} {f} letters', 'Write "{w}" in {c} color and {f} font',
        ),
        (False, True): (
            'Write "{w}" in {c}', 'The word "{w}" is colored in {c}', '"{w}" in {c} letters', 'A {c} "{w}"',
            'Write "{w}" in {c} color',
        ),
        (True, False): ('Write "{w}" in {f}', '"{w}" in the font {f}', 'The word "{w}" in {f} letters'),
        (False, False): ('"{w}"', 'The word "{w}"', 'Write the word "{w}"'),
    }[font is not None, color is not None]  # fmt: skip
    return texts[rng.integers(len(texts))].format(w=text, f=font, c=color)
