"""CLIP's real vocabulary, and the folders that are built with it."""

import json

import layouts
import pytest


def test_the_vocabulary_is_clips():
    words = layouts.tokenizer()
    assert len(words) == 49408
    assert words("a photo of an astronaut riding a horse").input_ids == [
        49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407,
    ]  # fmt: skip
    assert words.tokenize("van gogh") == ["van</w>", "gogh</w>"]
    assert words.tokenize("r2d2") == ["r</w>", "2</w>", "d</w>", "2</w>"]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_folder_of_each_layout_is_as_diffusers_writes_it(tmp_path, layout):
    folder = layouts.folder(tmp_path / "model", layout)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == {
        "sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
        "inpainting": "StableDiffusionInpaintPipeline",
    }[layout]  # fmt: skip
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert config["vocab_size"] == 49408
    channels = json.loads((folder / "unet" / "config.json").read_text())["in_channels"]
    assert channels == (9 if layout == "inpainting" else 4)
    assert (folder / "safety_checker" / "model.safetensors").is_file() == (layout == "sd1")
