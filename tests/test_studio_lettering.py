"""The lettering tab of the studio: its task, its limits, and the page with a box that is drawn by mouse."""

import io
import sys
from dataclasses import replace
from importlib.util import find_spec

import browser
import numpy as np
import pytest
import torch
from PIL import Image

from overpaint.scene_text import Config, Lettering, rewrite
from overpaint.studio import Studio, handlers, lettering
from overpaint.studio.lettering import LetterSettings
from overpaint.studio.scheduler import ProgressUpdate

needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="the extra `studio` is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small lettering model with random weights and a photograph of noise, on disk."""
    place = tmp_path_factory.mktemp("lettering")
    model = Lettering.build(replace(Config.smoke(), fonts=("Roboto", "Courgette")))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.network.unet.conv_out.weight, std=0.1, generator=generator)
    model.save(place / "model")
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(60, 255, (12, 18, 3), dtype=np.uint8))
    small.resize((900, 600), Image.Resampling.BICUBIC).save(place / "photo.png")
    return place


@pytest.fixture
def letter_studio(tiny_folder, folder, tmp_path):
    return Studio([str(tiny_folder)], tmp_path / "downloads", lettering=str(folder / "model"))


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


def test_the_result_is_that_of_the_function_and_the_file_holds_the_whole_picture(
    letter_studio, folder, result_of, monkeypatch
):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    key = letter_studio.open_session()
    picture = letter_studio.open_picture(key, folder / "photo.png")
    assert picture.size == (900, 600) and letter_studio.session(key).picture is picture
    settings = LetterSettings((300, 200, 240, 80), "red", "courgette", "red", seed=4, samples=2)
    events = list(letter_studio.letter(key, settings))
    assert any(isinstance(e, ProgressUpdate) and e.label == "writing" for e in events)
    result = result_of(events)
    expected = rewrite(
        folder / "photo.png", settings.region, "red", font="courgette", color="red", seed=4, model=folder / "model"
    )  # fmt: skip
    path = letter_studio.save_lettered(key, result)
    assert path.name == "red-lettering.png" and path.parent.name == key
    assert (pixels(path) == (expected * 255).round().byte().permute(1, 2, 0).numpy()).all()
    changed = (pixels(path) != pixels(folder / "photo.png")).any(-1)
    rows, columns = changed.nonzero()
    assert rows.min() >= 200 and rows.max() < 280 and columns.min() >= 300 and columns.max() < 540
    assert result.before.size == result.after.size == (800, 533)
    assert [one.title for one in result.samples] == ["Seed 4 (chosen)", "Seed 5"]
    assert "not ranked" in result.ranking
    letter_studio.choose_model(key, letter_studio.models[0])
    assert letter_studio.session(key).picture is picture
    letter_studio.close_session(key)
    assert not path.exists()


def statuses(updates):
    return " ".join(str(update.get("status", "")) for update in updates)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("10, 10, 50", "a", "", "", 0, 1), "must be four numbers x, y, width, height"),
        (("", "a", "", "", 0, 1), "must be four numbers"),
        (("10,10,90,40", "", "", "", 0, 1), "at least one visible character"),
        (("10,10,90,40", "a" * 9, "", "", 0, 1), "may have 8 characters"),
        (("10,10,90,40", "ï", "", "", 0, 1), "replace them"),
        (("10,10,90,40", "a", "Comic", "", 0, 1), "Unknown font"),
        (("10,10,90,40", "a", "", "mud", 0, 1), "Unknown color"),
        (("1000,10,90,40", "a", "", "", 0, 1), "outside of the picture of 900x600"),
        (("0,0,900,600", "a", "", "", 0, 1), "covers the whole picture"),
        (("10,10,90,40", "a", "", "", -1, 1), "must be an integer from 0"),
        (("10,10,90,40", "a", "", "", None, 1), "The seed must be a number"),
        (("10,10,90,40", "a", "", "", 0, 5), "samples must be 1 to 4, got 5"),
        (("10,10,90,40", ["a"], "", "", 0, 1), "The text must be a text"),
    ],
)
def test_bad_values_are_shown_in_the_page(letter_studio, folder, values, message):
    key = letter_studio.open_session()
    letter_studio.open_picture(key, folder / "photo.png")
    updates = list(handlers.letter(letter_studio, key, *values))
    assert message in statuses(updates) and 'role="alert"' in statuses(updates)
    assert not any("letter_result" in update for update in updates)


def test_no_picture_no_model_and_ended_sessions_are_named(
    tiny_folder, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("overpaint.zoo._WEIGHTS", tmp_path / "zoo")
    studio = Studio([str(tiny_folder)], tmp_path / "downloads")
    key = studio.open_session()
    values = ("10,10,90,40", "a", "", "", 0, 1)
    assert "No picture is open" in statuses(handlers.letter(studio, key, *values))
    studio.open_picture(key, folder / "photo.png")
    assert "not shipped with this version yet" in statuses(handlers.letter(studio, key, *values))
    assert "this session has ended" in statuses(handlers.letter(studio, "x", *values)).lower()
    assert lettering.names("lettering") == ((), ())
    assert lettering.names(str(folder / "model")) == (("Roboto", "Courgette"), ("red",))
    with pytest.raises(ValueError, match="no lettering model at .*config.json is missing"):
        lettering.names(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no configuration of a lettering model"):
        lettering.names(str(tmp_path))


def test_pictures_are_checked_before_they_are_decoded(letter_studio, tmp_path, monkeypatch):
    key = letter_studio.open_session()
    Image.new("L", (5000, 4000)).save(tmp_path / "large.png")
    with pytest.raises(
        ValueError, match="'large.png' has more than 16 megapixels and was not decoded"
    ):
        letter_studio.open_picture(key, tmp_path / "large.png")
    (tmp_path / "text.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(ValueError, match="'text.png' cannot be read as a picture"):
        letter_studio.open_picture(key, tmp_path / "text.png")
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(data, "PNG")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:900])
    with pytest.raises(ValueError, match="'cut.png' cannot be read as a picture"):
        letter_studio.open_picture(key, tmp_path / "cut.png")
    Image.new("RGBA", (64, 48), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert letter_studio.open_picture(key, tmp_path / "clear.png").getpixel((0, 0)) == (255,) * 3
    monkeypatch.setattr("overpaint.studio.app.MAX_BYTES_OF_PICTURES", 64 * 48 * 3)
    letter_studio.open_picture(key, tmp_path / "clear.png")  # replaces that of the session
    with pytest.raises(ValueError, match="pictures of all visitors take more memory"):
        letter_studio.open_picture(letter_studio.open_session(), tmp_path / "clear.png")


def test_a_drawn_box_becomes_text_and_anything_else_is_refused():
    assert handlers.mark("10,20,30,40") == {"letter_region": "10, 20, 30, 40"}
    for box in ("", "1,2,3", "1,2,3,<b>", "1e9,1,1,1", {"a": 1}):
        assert "must be four numbers" in handlers.mark(box)["status"]


@needs_gradio
@pytest.mark.parametrize("width", [1280, 390])
def test_a_box_is_drawn_by_mouse_and_the_word_is_written(
    chromium, tiny_folder, folder, free_port, tmp_path, width
):
    from test_studio_page import open_tab, press, screenshot, wait_for_pictures

    from overpaint.studio.server import open_studio

    with (
        open_studio([str(tiny_folder)], port=free_port(), lettering=str(folder / "model")) as (_, address),
        browser.visit(chromium, address, width=width, dark=width < 400, accept_downloads=True) as opened,
    ):  # fmt: skip
        page = opened.page
        page.get_by_text("No edits yet").wait_for()  # before it, no session may upload
        open_tab(page, "Letter")
        page.set_input_files("[role=tabpanel] input[type=file]", folder / "photo.png")
        page.locator("#op-letter-picture img").wait_for()
        frame = page.locator("#op-letter-picture .op-draw")
        frame.scroll_into_view_if_needed()
        box = page.locator("#op-letter-picture img").bounding_box()
        scale = 900 / box["width"]
        page.mouse.move(box["x"] + 300 / scale, box["y"] + 200 / scale)
        page.mouse.down()
        page.mouse.move(box["x"] + 400 / scale, box["y"] + 240 / scale)
        page.mouse.move(box["x"] + 540 / scale, box["y"] + 280 / scale)
        page.mouse.up()
        page.wait_for_function(
            "document.querySelector('#op-region input, #op-region textarea').value"
        )
        region = page.locator("#op-region").locator("input, textarea").input_value()
        numbers = [float(part) for part in region.split(",")]
        assert np.allclose(numbers, [300, 200, 240, 80], atol=2 * scale)
        shown = page.locator("#op-letter-picture .op-box").bounding_box()
        assert abs(shown["x"] - box["x"] - 300 / scale) < 4
        assert abs(shown["width"] - 240 / scale) < 8
        field = page.locator("#op-region").locator("input, textarea")
        field.fill("300, 200, 240, 80")  # typed, as by keyboard
        page.get_by_label("Word", exact=True).fill("red")
        page.get_by_label("Samples").first.fill("2")
        press(page, "Write")
        wait_for_pictures(page, "#op-lettered", 4)
        assert "“red”" in page.inner_text("#op-lettered")
        screenshot(page, f"letter-{width}")
        with page.expect_download() as download:
            press(page, "Save picture")
        download.value.save_as(tmp_path / "saved.png")
        changed = (pixels(tmp_path / "saved.png") != pixels(folder / "photo.png")).any(-1)
        rows, columns = changed.nonzero()
        assert rows.min() >= 200 and rows.max() < 280
        assert columns.min() >= 300 and columns.max() < 540
        field.fill("1, 2")
        page.wait_for_function("document.querySelector('#op-letter-picture .op-box').hidden")
        press(page, "Write")
        alert = page.locator("#op-status [role=alert]")
        alert.wait_for()
        assert "must be four numbers" in alert.inner_text()
        browser.check_whole(opened)
        assert opened.requests == []
