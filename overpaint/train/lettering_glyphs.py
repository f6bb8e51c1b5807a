"""Letters of a face on a line: their layout, their opacity, and the paint that they are filled with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw

from overpaint.scene_text.line import Line
from overpaint.train.lettering_fonts import Face

__all__ = ["Style", "Word", "draw_word", "paint"]

_OVERSAMPLING = 2  # of the line, when letters are drawn
_PAD = 16  # pixels around the letters in their own picture


@dataclass(frozen=True)
class Style:
    """Fill and effects of letters; colors are RGB 0 to 255, float32 (3,)."""

    fill: np.ndarray
    outline: np.ndarray | None = None  # color of a rim of about a pixel
    shadow: float = 0.0  # opacity of a soft dark copy below the letters
    offset: tuple[float, float] = (0.0, 0.0)  # of the shadow, (x, y) in pixels
    gradient: float = 0.0  # change of the fill from the top to the bottom of the line
    grain: float = 0.0  # standard deviation of the fill
    seed: int = 0  # of the grain


@dataclass(frozen=True)
class Word:
    """A word of a face at a size, and where it stands once it is drawn.

    Attributes:
        face: The face.
        text: The word.
        scale: Pixels of the line for a pixel of the face.
        spacing: Additional space after each letter, in pixels of the face.
        edges: Edges of the letters, in pixels of the line, float32 (n + 1,); from 0 before the word is placed.
        cover: Opacity of the letters, 0 to 1, float32 (H, W).
        capital: Row of the upper edge of capital letters, before the shrinking of the face.
        baseline: Row of their lower edge.
    """

    face: Face
    text: str
    scale: float
    spacing: float
    edges: np.ndarray
    cover: np.ndarray
    capital: float = 0.0
    baseline: float = 0.0

    @classmethod
    def lay_out(cls, face: Face, text: str, *, capital: float, spacing: float = 0.0) -> Word:
        """Return a word that is not placed yet.

        Args:
            face: The face.
            text: The word.
            capital: Height of a capital letter, in pixels of the line; less if the face has long ascenders.
            spacing: Additional space after each letter, as a part of the height of a capital letter.
        """
        scale = capital / face.capital * face.shrink
        extra = spacing * face.capital
        advances = [face.font.getlength(text[:end]) + end * extra for end in range(len(text) + 1)]
        return cls(
            face,
            text,
            scale,
            extra,
            np.array(advances, np.float32) * scale,
            np.zeros((1, 1), np.float32),
        )

    @property
    def width(self) -> float:
        """Width of all letters, in pixels of the line."""
        return max(float(self.edges[-1] - self.edges[0]), 1.0)

    def reach(self, style: Style) -> np.ndarray:
        """Return the opacity of the letters with outline and shadow, 0 to 1, (H, W)."""
        total = self.cover
        if style.outline is not None:
            total = np.maximum(total, _rim(self.cover))
        if style.shadow:
            total = np.maximum(total, style.shadow * _shade(self.cover, style.offset))
        return total


def draw_word(
    word: Word, line: Line, *, x: float, baseline: float, stretch: float, bend: np.ndarray
) -> Word:
    """Return the word on its line.

    Args:
        word: A word of `Word.lay_out`.
        line: Sizes of the line.
        x: Left edge of the first letter, in pixels.
        baseline: Row of the lower edge of capital letters.
        stretch: Horizontal scale of the letters.
        bend: Homography (3, 3) applied to the finished line.
    """
    up, down = math.ceil(1.6 * word.face.capital) + _PAD, math.ceil(0.9 * word.face.capital) + _PAD
    width = math.ceil(word.width / word.scale) + 2 * _PAD
    canvas = Image.new("L", (width, up + down))
    pen = ImageDraw.Draw(canvas)
    if word.spacing:
        for letter, edge in zip(word.text, word.edges, strict=False):
            pen.text(
                (_PAD + float(edge) / word.scale, up),
                letter,
                fill=255,
                font=word.face.font,
                anchor="ls",
            )
    else:
        pen.text((_PAD, up), word.text, fill=255, font=word.face.font, anchor="ls")
    across = word.scale * stretch
    place = np.array([
        [across, 0, x - _PAD * across], [0, word.scale, baseline - up * word.scale], [0, 0, 1],
    ])  # fmt: skip
    matrix = bend @ place
    grow = np.diag([_OVERSAMPLING, _OVERSAMPLING, 1.0])
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # from pixel numbers to positions
    warp = np.linalg.inv(half) @ grow @ matrix @ half
    size = (line.width * _OVERSAMPLING, line.height * _OVERSAMPLING)
    large = cv2.warpPerspective(np.asarray(canvas), warp, size, flags=cv2.INTER_LINEAR)
    cover = cv2.resize(large, (line.width, line.height), interpolation=cv2.INTER_AREA)
    middle = up - word.face.capital / 2
    edges = _move(matrix, word.edges / word.scale + _PAD, np.full(len(word.edges), middle))[:, 0]
    centre = _PAD + word.width / word.scale / 2
    # Of the size that was asked for: the caller of a trained model does not know which fonts are shrunk.
    height = word.face.capital / word.face.shrink
    rows = _move(matrix, np.array([centre, centre]), np.array([up - height, up]))[:, 1]
    return Word(
        word.face, word.text, word.scale, word.spacing, edges.astype(np.float32), cover.astype(np.float32) / 255,
        float(rows[0]), float(rows[1]),
    )  # fmt: skip


def paint(ground: np.ndarray, words: list[Word], style: Style) -> np.ndarray:
    """Return `ground` with the letters of `words`.

    Args:
        ground: RGB, uint8 (H, W, 3).
        words: Placed words.
        style: Fill and effects.
    """
    if not words:
        return ground
    picture = ground.astype(np.float32)
    cover = np.maximum.reduce([word.cover for word in words])
    if style.shadow:
        picture *= 1 - style.shadow * _shade(cover, style.offset)[..., None]
    if style.outline is not None:
        rim = _rim(cover)[..., None]
        picture = picture * (1 - rim) + style.outline * rim
    fill = np.broadcast_to(style.fill, picture.shape)
    if style.gradient:
        slope = np.linspace(-0.5, 0.5, len(picture), dtype=np.float32)[:, None, None]
        fill = fill + slope * style.gradient
    if style.grain:
        rng = np.random.default_rng(style.seed)
        fill = fill + rng.normal(0, style.grain, (*picture.shape[:2], 1))
    opacity = cover[..., None]
    picture = picture * (1 - opacity) + np.clip(fill, 0, 255) * opacity
    return picture.round().astype(np.uint8)


def _rim(cover: np.ndarray) -> np.ndarray:
    return cv2.dilate(cover, np.ones((3, 3), np.uint8))


def _shade(cover: np.ndarray, offset: tuple[float, float]) -> np.ndarray:
    move = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], np.float32)
    return cv2.GaussianBlur(cv2.warpAffine(cover, move, cover.shape[::-1]), (0, 0), 0.8)


def _move(matrix: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Return the points (x, y) after a homography, (N, 2)."""
    points = np.stack([xs, ys, np.ones_like(xs)]).astype(np.float64)
    moved = matrix @ points
    return (moved[:2] / moved[2]).T
