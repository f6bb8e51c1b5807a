"""Read words in pictures with PP-OCR, whose models are in the wheel of `rapidocr`; nothing is downloaded.

Source: PaddleOCR's PP-OCR models (Apache-2.0) in RapidOCR, https://github.com/RapidAI/RapidOCR (Apache-2.0).
"""

import logging
from importlib import import_module
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from overpaint.errors import MissingExtra

__all__ = ["TextReader", "edit_distance", "similarity"]

_HEIGHT = 48  # pixels, of the recogniser's input


class TextReader:
    """Recogniser of a line of text, without dictionary."""

    def __init__(self, *, threads: int = 1) -> None:
        """Load the models.

        Args:
            threads: CPU threads.

        Raises:
            MissingExtra: `rapidocr` or `onnxruntime` is not installed.
        """
        try:
            import_module("onnxruntime")
            module: Any = import_module("rapidocr")
        except ImportError as error:
            raise MissingExtra(
                "reading words needs rapidocr and onnxruntime. Install them with: pip install rapidocr onnxruntime."
            ) from error
        logger = logging.getLogger("RapidOCR")
        engine = "EngineConfig.onnxruntime."
        self._engine = module.RapidOCR(params={
            "Global.log_level": "critical", f"{engine}intra_op_num_threads": threads,
            f"{engine}inter_op_num_threads": threads,
        })  # fmt: skip
        logger.setLevel(logging.CRITICAL)
        self.name = f"rapidocr {version('rapidocr')}"

    def read(self, images: Tensor) -> list[str]:
        """Return the text of each line; characters other than printable ASCII and all spaces are left out.

        Args:
            images: One line of text each, RGB in [0, 1], (B, 3, H, W).
        """
        return [self._read(image) for image in images]

    def read_boxes(
        self, images: Tensor, boxes: list[tuple[int, int, int, int]], *, margin: int = 3
    ) -> list[str]:
        """Return the text in a box of each picture.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).
            boxes: Left, top, right and bottom edge in pixels.
            margin: Pixels that are read beside the box.
        """
        cuts = []
        for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
            rows = slice(max(0, top - margin), bottom + margin)
            cuts.append(image[:, rows, max(0, left - margin) : right + margin])
        return [self._read(cut) for cut in cuts]

    def _read(self, image: Tensor) -> str:
        pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        scale = _HEIGHT / pixels.shape[0]
        size = (max(1, round(pixels.shape[1] * scale)), _HEIGHT)
        enlarged = cv2.resize(
            np.ascontiguousarray(pixels[..., ::-1]), size, interpolation=cv2.INTER_CUBIC
        )
        result = self._engine(enlarged, use_det=False, use_cls=False, use_rec=True)
        text = (result.txts or ("",))[0]
        return "".join(c for c in text if c.isascii() and c.isprintable() and c != " ")


def edit_distance(first: str, second: str) -> int:
    """Return the least number of characters to insert, delete or replace to turn one text into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        previous, row = row, [i]
        for j, b in enumerate(second, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def similarity(first: str, second: str) -> float:
    """Return 1 - NED: one minus the edit distance divided by the length of the longer text; 1 for two empty ones."""
    longest = max(len(first), len(second))
    return 1 - edit_distance(first, second) / longest if longest else 1.0
