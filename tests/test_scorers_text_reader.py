"""Reading words, and the distance of texts."""

import shutil
import sys

import numpy as np
import pytest
import torch
from lettering_worlds import FOLDER
from PIL import Image, ImageDraw, ImageFont

from overpaint.errors import MissingExtra
from overpaint.scorers.text_reader import TesseractReader, TextReader, similarity


def test_similarity_by_hand():
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("word", "ward") == 0.75 and similarity("ab", "ba") == 0
    assert similarity("", "") == 1 and similarity("", "a") == 0


def two_words():
    canvas = Image.new("RGB", (220, 40), "white")
    font = ImageFont.truetype(FOLDER / "DejaVuSans-Bold.ttf", 24)
    ImageDraw.Draw(canvas).text((8, 4), "Hello", fill="black", font=font)
    ImageDraw.Draw(canvas).text((120, 4), "42nd", fill="black", font=font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)[None] / 255


def test_a_word_is_read_and_the_box_decides_which():
    pytest.importorskip("rapidocr")
    images = two_words()
    reader = TextReader()
    assert reader.read_boxes(images, [(4, 2, 100, 38)]) == ["Hello"]
    assert reader.read_boxes(
        images.expand(2, -1, -1, -1), [(4, 2, 100, 38), (112, 2, 216, 38)]
    ) == ["Hello", "42nd"]
    assert reader.read(torch.ones(1, 3, 32, 128)) == [""]
    assert reader.name.startswith("rapidocr ")


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingExtra, match="pip install rapidocr onnxruntime"):
        TextReader()


def test_without_rapidfuzz_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(MissingExtra, match="pip install rapidfuzz"):
        similarity("a", "b")


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
def test_tesseract_reads_both_polarities_in_one_call_and_does_not_correct_spelling():
    images = two_words()
    reader = TesseractReader()
    dark = torch.stack([1 - images[0], images[0] * 0.5 + 0.25])
    assert reader.read_boxes(dark, [(4, 2, 100, 38), (112, 2, 216, 38)]) == ["Hello", "42nd"]
    assert reader.read(torch.ones(1, 3, 32, 128)) == [""] and reader.read(images[:0]) == []
    canvas = Image.new("RGB", (180, 40), "white")
    font = ImageFont.truetype(FOLDER / "DejaVuSans-Bold.ttf", 24)
    ImageDraw.Draw(canvas).text((8, 4), "recieve", fill="black", font=font)
    assert reader.read(torch.from_numpy(np.array(canvas)).permute(2, 0, 1)[None] / 255) == [
        "recieve"
    ]
    assert reader.name.startswith("tesseract ")


def test_without_the_command_the_error_names_its_package(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtra, match="apt-get install tesseract-ocr tesseract-ocr-eng"):
        TesseractReader()
