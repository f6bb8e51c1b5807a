"""Entries of a change about its making: names instead of local paths."""

import shutil

import pytest

import overpaint
from overpaint import edit
from overpaint.edit.provenance import protocol
from overpaint.model import TextToImage


def named(model, name):
    return protocol("quickfix", TextToImage(model.pipe, name=name), {})["model"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("icons", "icons"),
        ("stabilityai/sdxl-base-1.0", "stabilityai/sdxl-base-1.0"),
        ("/home/someone/private/sd15", "sd15"),
        ("/home/someone/private/sd15/", "sd15"),
        ("../models/sd15", "sd15"),
        ("live pipeline", "live pipeline"),
    ],
)
def test_a_local_path_is_cut_to_its_last_part(tiny_sd1, name, short):
    assert named(tiny_sd1, name) == short


def test_a_relative_folder_that_looks_like_a_hub_id_is_cut(tiny_sd1, tmp_path, monkeypatch):
    (tmp_path / "private" / "sd15").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert named(tiny_sd1, "private/sd15") == "sd15"
    monkeypatch.chdir(tmp_path / "private" / "sd15")
    assert named(tiny_sd1, ".") == "sd15"


@pytest.mark.parametrize(
    "method",
    ["quickfix", "auto", "swap_embedding", "uce", "time", "loco", "oce", "dp", "speed", "hirm"],
)
def test_no_change_holds_a_local_path(real_vocabulary, tmp_path, method):
    folder = shutil.copytree(real_vocabulary("sd1"), tmp_path / "secret" / "sd15")
    model = overpaint.load(folder)
    settings = {
        "auto": {"contexts": 8, "background": 8, "vocabulary": ["monet"]},
        "oce": {"captions": ["a cat"]},
        "speed": {"empty_tokens": 2},
        "hirm": {"steps": 1},
    }
    change = getattr(edit, method)(model, {"van gogh": "dog"}, **settings.get(method, {}))
    assert change.protocol["model"] == "sd15"
    change.save(tmp_path / "c.safetensors")
    assert b"secret" not in (tmp_path / "c.safetensors").read_bytes()


def test_the_setting_of_clip_skip_is_stored(real_vocabulary):
    model = overpaint.load(real_vocabulary("sd1"), clip_skip=1)
    assert edit.quickfix(model, {"van gogh": "dog"}).protocol["clip_skip"] == 1
    assert (
        "clip_skip"
        not in edit.quickfix(overpaint.load(real_vocabulary("sd1")), {"van gogh": "dog"}).protocol
    )
