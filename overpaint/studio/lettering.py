"""Lettering in the studio: the picture that a visitor opens, the region drawn on it, and the word written there.

Names and contents of pictures are not trusted: the size is read from the header before any pixel is decoded.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from overpaint import files, zoo
from overpaint.errors import check_seed
from overpaint.images.read import load_picture
from overpaint.model.sampling import Progress
from overpaint.scene_text import Config, Lettering
from overpaint.scene_text.pasting import paste, save_png
from overpaint.scene_text.rewriting import Rewriting, rewrite_samples
from overpaint.studio import uploads
from overpaint.studio.tasks import LabelledPicture

__all__ = [
    "MAX_PIXELS", "MAX_SAMPLES", "LetterSettings", "LetteredPicture", "letter", "load_model", "names", "parse_region",
    "read_picture", "reduced", "save",
]  # fmt: skip

MAX_PIXELS = 16_000_000  # of an opened picture
MAX_SAMPLES = 4
_STEPS = 20
_SIDE = 800  # pixels of the longer side of a picture in the page
_SEED_BITS = 53  # a browser holds larger integers as rounded numbers
_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class LetterSettings:
    """The word to write, and where.

    Attributes:
        region: x, y, width and height in pixels.
        text: The word.
        font: Name of a font; `None` for the style beside the region.
        color: Name of a color; `None` for that of the style.
        seed: Seed of the first sample.
        samples: 1 to 4.

    Raises:
        ValueError: Seed or number of samples is out of range.
    """

    region: tuple[float, ...]
    text: str
    font: str | None = None
    color: str | None = None
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        check_seed(self.seed, bits=_SEED_BITS)
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise ValueError(
                f"the number of samples must be 1 to {MAX_SAMPLES}, got {self.samples}: write again for more."
            )


@dataclass(frozen=True, eq=False)
class LetteredPicture:
    """A picture with a new word.

    Attributes:
        settings: The word and its place.
        instruction: The instruction.
        seed: Seed of the sample that is shown.
        picture: The whole picture, RGB.
        before: The original, reduced to fit the page.
        after: The picture, reduced likewise.
        samples: The region in each sample; empty if there is only one.
        ranking: A sentence on how the sample was chosen.
    """

    settings: LetterSettings
    instruction: str
    seed: int
    picture: Image.Image
    before: Image.Image
    after: Image.Image
    samples: tuple[LabelledPicture, ...]
    ranking: str


def names(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the fonts and colors that a lettering model knows; none if the model of the zoo is not shipped.

    Raises:
        ValueError: The folder `source` holds no configuration, or a damaged one.
    """
    folder = zoo.folder(source) if source == "lettering" else files.user_path(source, "lettering")
    path = folder / "config.json"
    if not path.is_file():
        if source == "lettering":
            return (), ()
        raise ValueError(
            f"no lettering model at {source!r}: config.json is missing. Name the folder of a model."
        )
    try:
        config = Config.from_json(files.from_json(path.read_bytes()))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is no configuration of a lettering model: train or copy the model again."
        ) from error
    return config.fonts, config.colors


def load_model(source: str, device: str) -> Lettering:
    """Return a lettering model on a device; errors as `Lettering.load`."""
    model = Lettering.load(source)
    model.network.to(device)
    return model


def read_picture(path: str | Path) -> Image.Image:
    """Return an uploaded picture, upright, RGB; transparent pixels are blended with white.

    Raises:
        ValueError: The file is not a picture, damaged, or too large.
    """
    name = uploads.shown_name(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as header:
                width, height = header.size
        if width * height <= MAX_PIXELS:
            pixels = load_picture(path, "picture")[0]
            values = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
            return Image.fromarray(np.ascontiguousarray(values))
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS
    except (UnidentifiedImageError, ValueError, SyntaxError, OSError) as error:
        raise ValueError(
            f"{name!r} cannot be read as a picture of at least 8 × 8 pixels: choose a PNG, JPEG or WebP."
        ) from error
    raise ValueError(
        f"{name!r} has more than {MAX_PIXELS // 10**6} megapixels and was not decoded: make it smaller, or use "
        "`overpaint letter`."
    )


def reduced(picture: Image.Image) -> Image.Image:
    """Return a picture whose longer side has at most 800 pixels."""
    copy = picture.copy()
    copy.thumbnail((_SIDE, _SIDE))
    return copy


def parse_region(text: str) -> tuple[float, ...]:
    """Return x, y, width and height of a text with four numbers.

    Raises:
        ValueError: The text has another form.
    """
    parts = re.split(r"[\s,;]+", str(text).strip())
    if len(parts) != 4 or not all(re.fullmatch(r"-?\d{1,6}(\.\d{1,3})?", part) for part in parts):
        raise ValueError(
            "the region must be four numbers x, y, width, height: draw a box on the picture."
        )
    return tuple(float(part) for part in parts)


def letter(
    model: Lettering, picture: Image.Image, settings: LetterSettings, on_progress: Progress
) -> LetteredPicture:
    """Return the picture with the word of `settings` in their region; errors as `rewrite_samples`."""
    result = rewrite_samples(
        picture, settings.region, settings.text, font=settings.font, color=settings.color, model=model, steps=_STEPS,
        seed=settings.seed, samples=settings.samples, on_progress=on_progress,
    )  # fmt: skip
    whole = paste(picture, result)
    return LetteredPicture(
        settings, result.plan.instruction, result.seeds[result.chosen], whole, reduced(picture), reduced(whole),
        _samples(result) if len(result.seeds) > 1 else (), _ranking(result),
    )  # fmt: skip


def save(lettered: LetteredPicture, folder: Path) -> Path:
    """Write the whole picture with its new word as PNG under a safe name, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = uploads.file_name(lettered.settings.text, default="picture")
    return save_png(lettered.picture, folder / f"{name}-lettering.png")


def _samples(result: Rewriting) -> tuple[LabelledPicture, ...]:
    """Return the part around the region of each sample, with its seed and reading."""
    pictures = []
    for index, crop in enumerate(result.crops):
        values = (crop.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        image = reduced(Image.fromarray(np.ascontiguousarray(values)))
        text = ""
        if result.readings:
            text = f"read as “{result.readings[index]}”" if result.readings[index] else "not read"
        chosen = " (chosen)" if index == result.chosen else ""
        title = f"Seed {result.seeds[index]}{chosen}"
        pictures.append(LabelledPicture(image, title, text or "not ranked"))
    return tuple(pictures)


def _ranking(result: Rewriting) -> str:
    if len(result.seeds) == 1:
        return "one sample; with more of them, the one that an OCR reads best is chosen."
    if result.readings:
        return f"the sample whose reading by {result.reader} is nearest to the word is chosen."
    return (
        "the samples are not ranked, and the first is chosen: install rapidocr, onnxruntime and rapidfuzz to rank "
        "them."
    )
