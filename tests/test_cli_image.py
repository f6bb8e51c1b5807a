"""`overpaint image`: files are those of the function, wrong options are one line, and a dry run writes nothing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import overpaint as op
from overpaint import image_edit

BOX = ("--box", "12,14,18,18")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of two pictures and their masks."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size, color in (("a", (64, 48), "red"), ("b", (40, 70), "blue")):
        canvas = Image.new("RGB", size, "wheat")
        canvas.paste(color, (12, 14, 30, 32))
        canvas.save(folder / f"{name}.png")
        mask = Image.new("L", size)
        mask.paste(255, (12, 14, 30, 32))
        mask.save(folder / f"{name}-mask.png")
    return folder


def test_a_move_writes_what_the_function_returns(run, pictures, tiny_folder, tmp_path):
    code, out, err = run(
        "image", "move", pictures / "a.png", *BOX, "--offset", "9,-3", "--steps", 3, "--size", 64, "--model",
        tiny_folder, "-o", tmp_path / "e", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["task"] == "move" and facts["working_size"] == "64x64"
    mask = np.asarray(Image.open(pictures / "a-mask.png"))
    settings = image_edit.overpaint(steps=3, size=64)
    result = image_edit.move(
        op.load(tiny_folder), pictures / "a.png", mask, (9, -3), settings=settings
    )
    assert np.array_equal(np.asarray(Image.open(facts["picture"])), np.asarray(result.pil()))
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "edit.json", "mask.png", "pasted.png", "picture.png", "raw.png",
    ]  # fmt: skip
    code, _, err = run(
        "image", "move", pictures / "a.png", *BOX, "--offset", "9,-3", "--model", tiny_folder, "-o", tmp_path / "e",
    )  # fmt: skip
    assert code == 2 and "exists already" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("move", "{a}", "--mask", "{a_mask}", "--offset", "9,-3", "--scale", "0.8"),
        ("drag", "{a}", "--points", "20,20 26,22"),
        ("drag", "{a}", "--points", "20,20 26,22", "--box", "5,5,40,40"),
        ("landmarks", "{a}", "--points", "20,20 26,22 30,10 31,12"),
        (
            "paste",
            "{a}",
            "--from",
            "{b}",
            "--from-box",
            "12,14,18,18",
            "--position",
            "40,20",
        ),
        ("appearance", "{a}", *BOX, "--from", "{b}", "--from-mask", "{b_mask}"),
    ],
)
def test_a_dry_run_of_each_task_prints_the_crop_and_writes_nothing(
    run, pictures, tiny_folder, tmp_path, arguments
):
    names = {
        "a": pictures / "a.png", "b": pictures / "b.png", "a_mask": pictures / "a-mask.png",
        "b_mask": pictures / "b-mask.png",
    }  # fmt: skip
    words = [word.format(**names) for word in arguments]
    code, out, err = run(
        "image", *words, "--model", tiny_folder, "-o", tmp_path / "e", "--dry-run", "--size", 64
    )
    assert (code, err) == (0, "")
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["task"] == words[0] and 0 < float(lines["changed"]) < 1
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stretch", "{a}"), "unknown task 'stretch': choose one of move, drag, landmarks, paste, appearance."),
        (("move", "{a}", *BOX), "move needs --offset: give it."),
        (("move", "{a}", "--offset", "1,2"), "move needs the object: give --mask or --box."),
        (("move", "{a}", *BOX, "--mask", "{a}", "--offset", "1,2"), "--mask and --box name the same region"),
        (("move", "{a}", *BOX, "--offset", "1,2", "--points", "1,2 3,4"), "--points has no effect on move: leave it"),
        (("move", "{a}", *BOX, "--offset", "12"), "'12' is not x,y: give 2 numbers"),
        (("move", "{a}", *BOX, "--offset", "1,2", "--scale", "0"), "0.0 is out of range: give 0.1 to 10"),
        (("move", "{a}", *BOX, "--offset", "1,2", "--preset", "best"), "unknown preset 'best'"),
        (("move", "{a}", "--box", "90,14,18,18", "--offset", "1,2"), "holds no pixel of a picture of 64x48"),
        (("move", "{none}", *BOX, "--offset", "1,2"), "there is no file"),
        (("move", "{a}", "--mask", "{b}", "--offset", "1,2"), "`mask` is 40x70 pixels, but the picture is 64x48"),
        (("move", "{a}", *BOX, "--offset", "99,2"), "moves the object out of the picture"),
        (("drag", "{a}", "--points", "1,2 3,4 5,6"), "holds 3 points: give a start and an end"),
        (("drag", "{a}", "--points", "1,2 300,4"), "which is outside of the picture of 64x48"),
        (("paste", "{a}", "--from", "{b}", "--position", "1,2"), "give --from-mask or --from-box"),
        (("paste", "{a}", "--from-box", "1,2,3,4", "--position", "1,2"), "paste needs --from: give it."),
        (("appearance", "{a}", *BOX, "--from", "{b}", "--from-box", "1,2,9,9", "--position", "1,2"),
         "--position has no effect on appearance"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    run, pictures, tiny_folder, tmp_path, arguments, message
):
    names = {"a": pictures / "a.png", "b": pictures / "b.png", "none": tmp_path / "none.png"}
    words = [word.format(**names) for word in arguments]
    code, out, err = run("image", *words, "--model", tiny_folder, "-o", tmp_path / "e", "--dry-run")
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_mask_that_is_empty_is_named(run, pictures, tiny_folder, tmp_path):
    Image.fromarray(torch.zeros(48, 64, dtype=torch.uint8).numpy()).save(tmp_path / "empty.png")
    code, _, err = run(
        "image", "move", pictures / "a.png", "--mask", tmp_path / "empty.png", "--offset", "3,3", "--model",
        tiny_folder, "--dry-run",
    )  # fmt: skip
    assert code == 2 and "`mask` is empty: mark the pixels of the object" in err
