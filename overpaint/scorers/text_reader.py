"""Read words in pictures by two engines: PP-OCR, whose models are in the wheel of `rapidocr`, and Tesseract's command.

Neither downloads anything. Tesseract's dictionaries are off, so that it does not correct spelling.

Source: PaddleOCR's PP-OCR models (Apache-2.0) in RapidOCR, https://github.com/RapidAI/RapidOCR (Apache-2.0); Tesseract,
https://github.com/tesseract-ocr/tesseract (Apache-2.0).
"""

import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from overpaint.errors import MissingExtra

__all__ = ["Box", "LocatedText", "TesseractReader", "TextReader", "similarity"]

_HEIGHT = 48  # pixels, of PP-OCR's input
_TESSERACT_HEIGHT = 64  # pixels, of a line before the border is added
_TESSERACT_BORDER = 16  # pixels around a line

Box = tuple[int, int, int, int]  # left, top, right and bottom edge in pixels


@dataclass(frozen=True, eq=False)
class LocatedText:
    """A line of text in a picture, or one of its words.

    Attributes:
        text: As it is read, with spaces; printable ASCII.
        corners: Of its box, (x, y) in pixels from the upper left clockwise as the text is read, float64 (4, 2).
        score: Confidence of the recogniser, 0 to 1.
    """

    text: str
    corners: np.ndarray
    score: float


class TextReader:
    """Detector of text and recogniser of its lines, without dictionary."""

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

    def read_boxes(self, images: Tensor, boxes: list[Box], *, margin: int = 3) -> list[str]:
        """Return the text in a box of each picture.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).
            boxes: Left, top, right and bottom edge in pixels.
            margin: Pixels that are read beside the box.
        """
        return [self._read(cut) for cut in _cuts(images, boxes, margin)]

    def locate(self, image: Tensor) -> list[LocatedText]:
        """Return the lines of text in a picture, and after each line of several words these words.

        Args:
            image: RGB in [0, 1], (3, H, W).
        """
        pixels = np.ascontiguousarray(_pixels(image)[..., ::-1])
        result = self._engine(
            pixels, use_det=True, use_cls=False, use_rec=True, return_word_box=True
        )
        if result.boxes is None:
            return []
        texts = []
        for text, corners, score, words in zip(
            result.txts, result.boxes, result.scores, result.word_results, strict=True
        ):
            texts.append(_located(text, corners, score))
            if len(words) > 1:
                texts += [_located(word, box, certainty) for word, certainty, box in words]
        return [one for one in texts if one.text]

    def _read(self, image: Tensor) -> str:
        pixels = _pixels(image)
        scale = _HEIGHT / pixels.shape[0]
        size = (max(1, round(pixels.shape[1] * scale)), _HEIGHT)
        enlarged = cv2.resize(
            np.ascontiguousarray(pixels[..., ::-1]), size, interpolation=cv2.INTER_CUBIC
        )
        result = self._engine(enlarged, use_det=False, use_cls=False, use_rec=True)
        text = (result.txts or ("",))[0]
        return _visible(text)


class TesseractReader:
    """Recogniser of a line of text by Tesseract's command, without its dictionaries.

    Tesseract is trained on black print on white paper. Each line is therefore made grey, stretched to the full range,
    enlarged, inverted if most of its border is below Otsu's threshold, and given a border of its own edge. It reads few
    words on photographs. The page mode is that of a single line (7): that of a single word (8) read 57 % of clean grey
    words of one font, this one all of them.
    """

    def __init__(self, *, threads: int = 1) -> None:
        """Look for the command.

        Args:
            threads: CPU threads.

        Raises:
            MissingExtra: The command `tesseract` is not installed.
        """
        path = shutil.which("tesseract")
        if path is None:
            raise MissingExtra(
                "reading words with Tesseract needs its command, which is not installed. Install it with: apt-get "
                "install tesseract-ocr tesseract-ocr-eng."
            )
        self._command, self._threads = path, threads
        answer = subprocess.run([path, "-v"], capture_output=True, text=True, check=True)
        self.name = (answer.stdout or answer.stderr).splitlines()[0].strip()

    def read(self, images: Tensor) -> list[str]:
        """Return the text of each line, as `TextReader.read`.

        Args:
            images: One line of text each, RGB in [0, 1], (B, 3, H, W).
        """
        return self._read(list(images))

    def read_boxes(self, images: Tensor, boxes: list[Box], *, margin: int = 3) -> list[str]:
        """Return the text in a box of each picture, as `TextReader.read_boxes`.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).
            boxes: Left, top, right and bottom edge in pixels.
            margin: Pixels that are read beside the box.
        """
        return self._read(_cuts(images, boxes, margin))

    def _read(self, images: list[Tensor]) -> list[str]:
        """Return the texts, read by one call of the command; that of a line of one color is empty.

        Raises:
            RuntimeError: The command fails.
        """
        lines = {i: line for i, line in enumerate(map(_pixels, images)) if np.ptp(line) > 0}
        if not lines:
            return [""] * len(images)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{i:05}.png" for i in lines]
            for path, line in zip(paths, lines.values(), strict=True):
                cv2.imwrite(str(path), _printed(line))
            pages = Path(folder) / "pages.txt"
            pages.write_text("\n".join(map(str, paths)) + "\n")
            command = [self._command, str(pages), "stdout", "-l", "eng", "--oem", "1", "--psm", "7"]
            for name in ("load_system_dawg", "load_freq_dawg"):
                command += ["-c", f"{name}=0"]
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"OMP_THREAD_LIMIT": str(self._threads)}
            )  # fmt: skip
        texts = done.stdout.split("\f")[: len(lines)]
        if done.returncode or len(texts) != len(lines):
            raise RuntimeError(
                f"tesseract read {len(texts)} of {len(lines)} lines and ended with {done.returncode}: "
                f"{done.stderr.strip()[-200:]!r}. Install its English data with: apt-get install tesseract-ocr-eng."
            )
        by_line = dict(zip(lines, texts, strict=True))
        return [_visible(by_line.get(i, "")) for i in range(len(images))]


def similarity(first: str, second: str) -> float:
    """Return 1 - NED: one minus the edit distance divided by the length of the longer text; 1 for two empty ones.

    Raises:
        MissingExtra: `rapidfuzz` is not installed.

    Source: Levenshtein's distance, by RapidFuzz, https://github.com/rapidfuzz/RapidFuzz (MIT).
    """
    try:
        distance: Any = import_module("rapidfuzz.distance")
    except ImportError as error:
        raise MissingExtra(
            "comparing texts needs rapidfuzz. Install it with: pip install rapidfuzz."
        ) from error
    return float(distance.Levenshtein.normalized_similarity(first, second))


def _cuts(images: Tensor, boxes: list[Box], margin: int) -> list[Tensor]:
    """Return the part of each picture in its box and `margin` pixels beside it, (3, h, w) each."""
    cuts = []
    for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
        rows = slice(max(0, top - margin), bottom + margin)
        cuts.append(image[:, rows, max(0, left - margin) : right + margin])
    return cuts


def _pixels(image: Tensor) -> np.ndarray:
    """Return a picture (3, H, W) in [0, 1] as RGB uint8 (H, W, 3)."""
    return (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _located(text: str, corners: Any, score: float) -> LocatedText:
    printable = "".join(c for c in text if c.isascii() and c.isprintable()).strip()
    return LocatedText(printable, np.asarray(corners, np.float64), float(score))


def _visible(text: str) -> str:
    """Return the printable ASCII characters of a text, without spaces."""
    return "".join(c for c in text if c.isascii() and c.isprintable() and c != " ")


def _printed(pixels: np.ndarray) -> np.ndarray:
    """Return a line as dark letters on a light ground, enlarged, with a border, grey uint8 (H, W)."""
    grey = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
    scale = _TESSERACT_HEIGHT / grey.shape[0]
    size = (max(1, round(grey.shape[1] * scale)), _TESSERACT_HEIGHT)
    large = cv2.resize(grey, size, interpolation=cv2.INTER_CUBIC)
    low, high = int(large.min()), int(large.max())
    level = (large.astype(np.float32) - low) * (255 / max(high - low, 1))
    level = level.round().astype(np.uint8)
    threshold, _ = cv2.threshold(level, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    border = np.concatenate([level[0], level[-1], level[:, 0], level[:, -1]])
    if (border > threshold).mean() < 0.5:
        level = 255 - level
    return np.pad(level, _TESSERACT_BORDER, mode="edge")
