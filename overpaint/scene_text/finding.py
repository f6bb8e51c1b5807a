"""Find a text in a picture by an OCR, as the region to rewrite. Needs the extra `ocr`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from overpaint.errors import check_one_text, listed
from overpaint.images.read import load_picture
from overpaint.scorers.text_reader import LocatedText, TextReader, similarity

__all__ = ["FoundText", "find_text"]

_LEAST = 0.6  # similarity of a text that counts as a match


@dataclass(frozen=True, eq=False)
class FoundText:
    """A place of a picture where a text is read.

    Attributes:
        text: As it is read.
        similarity: To the wanted text, without case and spaces, 0.6 to 1.
        corners: Of its box, (x, y) in pixels, (4, 2): a region for `rewrite`.
    """

    text: str
    similarity: float
    corners: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x, y, width and height of the upright box around it, in whole pixels."""
        low, high = self.corners.min(0), self.corners.max(0)
        return int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1])


def find_text(image: Any, text: str) -> tuple[FoundText, ...]:
    """Return the places of a picture where `text` is read, the most similar first, then from top to bottom.

    Lines and single words are compared, without case and spaces.

    Args:
        image: A path, PIL image, array or tensor, as for `load_picture`.
        text: The text to find.

    Returns:
        At least one place.

    Raises:
        ValueError: The picture cannot be read, the text is empty, or nothing like it is read.
        MissingExtra: The extra `ocr` is not installed.

    Source: PP-OCR, see `overpaint.scorers.text_reader`.
    """
    check_one_text(text, "the text to find", "find one after another")
    if not _plain(text):
        raise ValueError("the text to find is empty: give a word that stands in the picture.")
    picture = load_picture(image, "image")[0]
    similarity("", "")  # raises without its package, before the slow search
    located = TextReader().locate(picture)
    scored = [(similarity(_plain(one.text), _plain(text)), one) for one in located]
    matches = [(score, one) for score, one in scored if score >= _LEAST]
    if not matches:
        texts = listed(repr(one.text) for one in located)
        raise ValueError(
            f"no text like {text!r} is read in the picture, only: {texts}. Name one of them, or give the "
            "region as a box."
        )
    ordered = sorted(matches, key=lambda match: (-match[0], *_place(match[1])))
    return tuple(FoundText(one.text, score, one.corners) for score, one in _distinct(ordered))


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _place(located: LocatedText) -> tuple[float, float]:
    return float(located.corners[:, 1].min()), float(located.corners[:, 0].min())


def _distinct(matches: list[tuple[float, LocatedText]]) -> list[tuple[float, LocatedText]]:
    """Return the matches without those whose centre lies in the box of a better one, or around it."""
    distinct: list[tuple[float, LocatedText]] = []
    for score, one in matches:
        if not any(_overlap(one.corners, other.corners) for _, other in distinct):
            distinct.append((score, one))
    return distinct


def _overlap(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether one of two boxes holds the centre of the other."""
    pairs = ((first, second), (second, first))
    return any(
        bool((a.min(0) <= b.mean(0)).all() and (b.mean(0) <= a.max(0)).all()) for a, b in pairs
    )
