"""Generated pictures as files and grids, and detection of blank ones."""

import json

import pytest
import torch
from PIL import Image

from overpaint.images.pictures import is_blank


def test_pictures_save_and_grid(tiny_sd1, tmp_path):
    pictures = tiny_sd1.generate(["a cat", "a dog", "a fish"], steps=1)
    paths = pictures.save(tmp_path / "new")
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"]
    assert Image.open(paths[1]).tobytes() == pictures.pil()[1].tobytes()
    about = json.loads((tmp_path / "new" / "pictures.json").read_text())
    assert about["prompts"] == ["a cat", "a dog", "a fish"]
    assert about["protocol"] == pictures.protocol
    assert not list(tmp_path.rglob("*.part"))
    sheet = pictures.grid(2)
    assert sheet.size == (16 * 2 + 2, 16 * 2 + 2)
    assert sheet.crop((18, 0, 34, 16)).tobytes() == pictures.pil()[1].tobytes()
    assert sheet.getpixel((33, 33)) == (255, 255, 255)
    with pytest.raises(ValueError, match="`columns` must be at least 1, got 0"):
        pictures.grid(0)


def test_is_blank_detects_pictures_of_one_color():
    images = torch.stack([torch.zeros(3, 4, 4), torch.rand(3, 4, 4), torch.full((3, 4, 4), 0.5)])
    images[2, 0] = 1.0  # one color, if not grey
    assert is_blank(images).tolist() == [True, False, True]
