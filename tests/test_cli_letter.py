"""`overpaint letter`: what it writes is what the function returns, and bad input is one line and writes nothing."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lettering_worlds import FOLDER
from PIL import Image, ImageDraw, ImageFont

from overpaint import scene_text
from overpaint.scene_text import Config, Lettering

BOX = ("--box", "20,10,80,30")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A picture of a word, a mask of it, and a small model with random weights, on disk."""
    folder = tmp_path_factory.mktemp("letter")
    canvas = Image.new("RGB", (240, 100), "white")
    font = ImageFont.truetype(FOLDER / "DejaVuSans-Bold.ttf", 28)
    ImageDraw.Draw(canvas).text((20, 8), "OPEN", fill="black", font=font)
    canvas.save(folder / "sign.png")
    mask = Image.new("L", (240, 100))
    ImageDraw.Draw(mask).rectangle((20, 10, 99, 39), fill=255)
    mask.save(folder / "mask.png")
    model = Lettering.build(replace(Config.smoke(), fonts=("Roboto", "Courgette")))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.network.unet.conv_out.weight, std=0.1, generator=generator)
    model.save(folder / "model")
    return folder


def pixels(path):
    return np.array(Image.open(path))


def test_the_file_is_what_the_function_returns_and_all_else_is_equal(run, inputs, tmp_path):
    code, out, err = run(
        "letter", inputs / "sign.png", *BOX, "--text", "wizards", "--font", "courgette", "--color",
        "red", "--seed", 3, "--steps", 2, "--model", inputs / "model", "-o", tmp_path / "out.png", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["instruction"] == 'Write "wizards" in font: Courgette and color: red'
    assert facts["region"] == "20,10,80,30" and facts["seed"] == 3
    assert facts["picture"] == str(tmp_path / "out.png")
    result = scene_text.rewrite(
        inputs / "sign.png", (20, 10, 80, 30), "wizards", font="courgette", color="red", seed=3, steps=2,
        model=inputs / "model",
    )  # fmt: skip
    written = pixels(tmp_path / "out.png")
    assert (written == (result * 255).round().byte().permute(1, 2, 0).numpy()).all()
    before = pixels(inputs / "sign.png")
    inside = np.zeros(before.shape[:2], bool)
    inside[10:40, 20:100] = True
    assert (written[~inside] == before[~inside]).all() and (written[inside] != before[inside]).any()
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_all_forms_of_a_region_agree(run, inputs, tmp_path):
    forms = (
        BOX, ("--mask", inputs / "mask.png"), ("--polygon", "20,10 100,10 100,40 20,40"),
        ("--rotated-box", "60,25,80,30,0"),
    )  # fmt: skip
    common = ("--text", "red", "--steps", 1, "--model", inputs / "model", "--json")
    lines = []
    for number, form in enumerate(forms):
        path = tmp_path / f"{number}.png"
        code, out, err = run("letter", inputs / "sign.png", *form, *common, "-o", path)
        assert (code, err) == (0, "")
        lines.append(json.loads(out)["line"])
    assert len(set(lines)) == 1
    before = pixels(inputs / "sign.png")
    for number in range(len(forms)):
        changed = (pixels(tmp_path / f"{number}.png") != before).any(-1)
        assert (
            changed[14:36, 24:96].mean() > 0.9
        )  # and at most the border of the polygon beside the box
        assert not changed[:9].any() and not changed[42:].any() and not changed[:, 102:].any()
    turned = ("--rotated-box", "120,50,80,30,10", "--dry-run", *common)
    _, out, _ = run("letter", inputs / "sign.png", *turned)
    assert json.loads(out)["upright"].startswith("80x30 pixels")


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        "letter", inputs / "sign.png", "--box", "10,20,220,20", "--text", "ab", "--model", inputs / "model", "--dry-run"
    )  # fmt: skip
    assert (code, err) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(facts) == [
        "region",
        "upright",
        "line",
        "letters",
        "instruction",
        "filled",
        "written",
    ]
    assert facts["region"] == "10,20,220,20" and facts["instruction"] == 'Write "ab"'
    assert facts["upright"].startswith("220x20 pixels, ")
    assert facts["letters"] == "125% of their natural width"
    assert facts["filled"].startswith("all but the middle ")
    assert facts["written"] == "nothing: --dry-run"
    assert list(tmp_path.iterdir()) == []


def test_samples_give_a_sheet_and_say_that_they_are_not_ranked(run, inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    command = (
        "letter",
        inputs / "sign.png",
        *BOX,
        "--text",
        "red",
        "--steps",
        1,
        "--model",
        inputs / "model",
    )
    code, out, _ = run(*command, "--samples", 3, "--seed", 5, "-o", tmp_path / "a.png")
    assert code == 0
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["ranked"].startswith("no, the first is kept: install rapidocr")
    assert facts["seed"] == "5" and facts["sheet"] == str(tmp_path / "a-samples.png")
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "a-samples.png"}
    run(*command, "--seed", 5, "-o", tmp_path / "single.png")
    assert (pixels(tmp_path / "single.png") == pixels(tmp_path / "a.png")).all()


def test_samples_are_ranked_and_a_found_text_is_the_region(run, inputs, tmp_path):
    pytest.importorskip("rapidocr")
    pytest.importorskip("rapidfuzz")
    code, out, _ = run(
        "letter", inputs / "sign.png", "--find", "open", "--text", "red", "--steps", 1, "--samples", 2, "--model",
        inputs / "model", "-o", tmp_path / "a.png", "--json",
    )  # fmt: skip
    assert code == 0
    facts = json.loads(out)
    assert len(facts["found"]) == 1 and facts["found"][0].startswith("1 'OPEN' at ")
    assert facts["found"][0].endswith("100% alike, taken")
    assert facts["ranked"].startswith("by rapidocr ") and len(facts["readings"]) == 2
    assert sum(", kept" in row for row in facts["readings"]) == 1
    changed = (pixels(tmp_path / "a.png") != pixels(inputs / "sign.png")).any(-1)
    rows, columns = changed.nonzero()
    assert rows.max() < 60 and columns.max() < 140
    code, _, err = run(
        "letter", inputs / "sign.png", "--find", "open", "--which", 2, "--text", "a", "--model", inputs / "model",
        "-o", tmp_path / "b.png",
    )  # fmt: skip
    assert code == 2 and "--which must be 1 to 1, the number of matches, got 2: 1 'OPEN' at" in err


def test_nothing_is_overwritten_without_force(run, inputs, tmp_path):
    (tmp_path / "a.png").write_text("mine")
    command = (
        "letter",
        inputs / "sign.png",
        *BOX,
        "--text",
        "a",
        "--steps",
        1,
        "--model",
        inputs / "model",
    )
    code, _, err = run(*command, "-o", tmp_path / "a.png")
    assert code == 2 and "exists already" in err and (tmp_path / "a.png").read_text() == "mine"
    code, _, err = run(*command, "-o", inputs / "sign.png")
    assert code == 2 and "exists already" in err
    assert run(*command, "-o", tmp_path / "a.png", "--force")[0] == 0
    assert pixels(tmp_path / "a.png").shape == (100, 240, 3)
    (tmp_path / "b-samples.png").write_text("mine")
    code, _, err = run(*command, "-o", tmp_path / "b.png", "--samples", 2)
    assert code == 2 and "b-samples.png' exists already" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one option must name the region, got none"),
        ((*BOX, "--find", "OPEN"), "got --box and --find: give one of --box"),
        ((*BOX, "--which", "1"), "--which chooses among the matches of --find"),
        (("--box", "1,2,3"), "'1,2,3' is not x,y,width,height: give 4 numbers"),
        (("--box", "1,2,3,x"), "give 4 numbers"),
        (("--box", "20,10,0,5"), "must have a positive size, got 0x5"),
        (("--box", "900,10,50,50"), "outside of the picture of 240x100"),
        (("--box", "0,0,240,100"), "covers the whole picture"),
        (("--polygon", "1,2 3,4"), "give at least 3 points"),
        (("--rotated-box", "60,25,80,30,90"), "90 degrees are out of range: give -45 to 45"),
        (("--rotated-box", "60,25,-80,30,9"), "the box of --rotated-box must have a positive size"),
        (("--mask", "{inputs}/none.png"), "`mask`: there is no file"),
        ((*BOX, "--text", "naïve"), "with 'ï': replace them"),
        ((*BOX, "--text", ""), "at least one visible character"),
        ((*BOX, "--text", "a" * 9), "may have 8 characters"),
        ((*BOX, "--font", "Corgette"), "unknown font 'Corgette'"),
        ((*BOX, "--color", "rod"), "unknown color 'rod'"),
        ((*BOX, "--samples", "65"), "65 is out of range: give 1 to 64"),
        ((*BOX, "--device", "moon"), "cannot use device 'moon'"),
        ((*BOX, "-o", "{tmp}/a.jpg"), "saved as PNG, which keeps every pixel, not as 'a.jpg'"),
        ((*BOX, "--model", "nowhere"), "no lettering model at 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(run, inputs, tmp_path, arguments, message):
    filled = [x.format(inputs=inputs, tmp=tmp_path) for x in arguments]
    defaults = (("--text", "a"), ("--model", inputs / "model"), ("-o", tmp_path / "a.png"))
    rest = [x for pair in defaults if pair[0] not in filled for x in pair]
    code, out, err = run("letter", inputs / "sign.png", *filled, *rest)
    assert (code, out) == (2, "")
    assert message in err and err.splitlines()[-1].startswith("overpaint: ")
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_picture_and_a_missing_model_or_extra_are_named(
    run, inputs, tmp_path, monkeypatch
):
    (tmp_path / "a.png").write_text("no picture")
    out = ("-o", tmp_path / "out.png")
    code, _, err = run("letter", tmp_path / "a.png", *BOX, "--text", "a", *out)
    assert code == 2 and "`image`: cannot read" in err
    monkeypatch.setattr("overpaint.zoo._WEIGHTS", tmp_path / "zoo")
    code, _, err = run("letter", inputs / "sign.png", *BOX, "--text", "a", *out)
    assert (
        code == 2
        and "not shipped with this version yet: train it with `overpaint train lettering`" in err
    )
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    find = ("--find", "OPEN", "--model", inputs / "model")
    code, _, err = run("letter", inputs / "sign.png", *find, "--text", "a", *out)
    assert code == 2 and "pip install rapidocr" in err
    code, _, err = run("letter", inputs / "sign.png", "--mask", inputs / "sign.png", "--text", "a", "--model",
                       inputs / "model", *out)  # fmt: skip
    assert code == 0, err  # a light picture as a mask is a region too
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "out.png"}
