"""Reading words, and the distance of texts."""

import sys

import numpy as np
import pytest
import torch
from lettering_worlds import FOLDER
from PIL import Image, ImageDraw, ImageFont

from overpaint.errors import MissingExtra
from overpaint.scorers.text_reader import TextReader, edit_distance, similarity


def test_edit_distance_and_similarity_by_hand():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
    assert edit_distance("abc", "abc") == 0 and edit_distance("ab", "ba") == 2
    assert (
        similarity("word", "ward") == 0.75 and similarity("", "") == 1 and similarity("", "a") == 0
    )


def test_a_word_is_read_and_the_box_decides_which():
    pytest.importorskip("rapidocr")
    canvas = Image.new("RGB", (220, 40), "white")
    font = ImageFont.truetype(FOLDER / "DejaVuSans-Bold.ttf", 24)
    ImageDraw.Draw(canvas).text((8, 4), "Hello", fill="black", font=font)
    ImageDraw.Draw(canvas).text((120, 4), "42nd", fill="black", font=font)
    images = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)[None] / 255
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
