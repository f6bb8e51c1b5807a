"""Where a word stands in a region, regions that are far too wide for it, samples, and refusals before any sampling."""

import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lettering_worlds import FOLDER
from PIL import Image, ImageDraw, ImageFont

from overpaint.errors import MissingExtra
from overpaint.scene_text import Config, Lettering, find_text, rewrite, rewrite_samples
from overpaint.scene_text.filling import fill
from overpaint.scene_text.pasting import paste, save_png
from overpaint.scene_text.planning import WIDEST, make_plan
from overpaint.scene_text.rewriting import _best
from overpaint.scene_text.sheet import draw_sheet

SIZE = (80, 400)
needs_ocr = pytest.mark.skipif(
    find_spec("rapidocr") is None or find_spec("rapidfuzz") is None,
    reason="the extra `ocr` is not installed",
)


@pytest.fixture(scope="module")
def model():
    config = replace(
        Config.smoke(), fonts=("Roboto", "Lato-Bold", "Courgette"), colors=("red", "dark red")
    )
    built = Lettering.build(config)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(built.network.unet.conv_out.weight, std=0.1, generator=generator)
    return built


@pytest.fixture(scope="module")
def picture():
    """A smooth slope of light; old letters, black bars, in the middle rows."""
    slope = torch.linspace(0.4, 0.9, SIZE[1]).expand(3, *SIZE).clone()
    slope[:, 32:48, 20:380:12] = 0.0
    return slope


def natural(model, text):
    line = model.config.line
    with torch.no_grad():
        texts = model.network.texts([text], [f'Write "{text}"'])
        return float(model.network.natural_width(texts)) * (line.baseline - line.capital)


def test_letters_are_spread_by_a_quarter_at_most_and_stand_in_the_middle(model):
    line, width = model.config.line, natural(model, "a")
    fitting = make_plan(SIZE, (100, 30, (width + 4) / 26 * 20, 20), "a", model)
    assert fitting.stretch == pytest.approx(1, abs=0.01) and not fitting.is_divided
    wide = make_plan(SIZE, (100, 30, 2 * width / 26 * 20, 20), "a", model)
    assert wide.stretch == pytest.approx(WIDEST) and not wide.is_divided
    assert wide.end - wide.start == pytest.approx(WIDEST * width)
    assert wide.start + wide.end == pytest.approx(line.width)
    narrow = make_plan(SIZE, (100, 30, width / 2 / 26 * 40, 40), "a", model)
    assert narrow.relative_width == pytest.approx(0.5) and 0.35 < narrow.stretch < 0.5


def test_of_a_far_too_wide_region_only_the_middle_is_written_and_the_rest_is_filled(model, picture):
    """No second word: beside its window the result is the filled picture, whatever word and seed."""
    region = (10, 28, 380, 24)
    plan = make_plan(SIZE, region, "ab", model)
    assert plan.is_divided and plan.stretch == pytest.approx(WIDEST)
    assert plan.window.size[0] < 0.4 * plan.area.size[0]
    centre = plan.window.corners.mean(0)
    assert centre == pytest.approx(plan.area.corners.mean(0))
    first = rewrite(picture, region, "ab", model=model, steps=1)
    second = rewrite(picture, region, "cd", model=model, steps=1, seed=5)
    assert torch.equal(plan.window.mask, make_plan(SIZE, region, "cd", model).window.mask)
    beside = plan.area.mask & ~plan.window.mask
    assert int(beside.sum()) > 4000
    assert torch.equal(first[:, beside], second[:, beside])
    assert not torch.equal(first[:, plan.window.mask], second[:, plan.window.mask])
    inner = beside.clone()
    inner[:32], inner[48:] = False, False  # without the feather
    slope = torch.linspace(0.4, 0.9, SIZE[1]).expand(3, *SIZE)
    assert (first - slope).abs()[:, inner].max() < 0.1  # the old letters are gone
    assert (picture - slope).abs()[:, inner].max() > 0.4


def test_a_divided_turned_region_changes_only_its_own_pixels(model):
    noise = torch.rand(3, 200, 300, generator=torch.Generator().manual_seed(1))
    turn = np.deg2rad(20)
    axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    corners = np.array([[-120, -10], [120, -10], [120, 10], [-120, 10]]) @ axes + [150, 100]
    plan = make_plan((200, 300), corners, "ab", model)
    assert plan.is_divided and bool((plan.window.mask <= plan.area.mask).all())
    across = plan.window.corners[1] - plan.window.corners[0]
    assert np.rad2deg(np.arctan2(across[1], across[0])) == pytest.approx(20, abs=0.01)
    result = rewrite(noise, corners, "ab", model=model, steps=1)
    assert torch.equal(result[:, ~plan.area.mask], noise[:, ~plan.area.mask])
    assert not torch.equal(result[:, plan.area.mask], noise[:, plan.area.mask])


def test_filling_continues_the_surroundings_and_changes_nothing_else():
    image = torch.full((3, 40, 60), 0.25)
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:20, 20:40] = True
    image[:, mask] = 1.0
    filled = fill(image, mask)
    assert torch.equal(filled[:, ~mask], image[:, ~mask])
    assert (filled[:, mask] - 0.25).abs().max() < 0.01


@pytest.mark.parametrize(
    ("region", "text", "options", "message"),
    [
        ((0, 0, 400, 80), "a", {}, "`region` covers the whole picture"),
        ((-5, -5, 999, 999), "a", {}, "`region` covers the whole picture"),
        ((500, 20, 10, 10), "a", {}, "outside of the picture of 400x80 pixels or empty"),
        ((10, 20, 90, 4), "a", {}, "`region` has 90x4 pixels, and letters need at least 6x6"),
        ((0, 30, 400, 6.5), "a", {}, r"`region` is \d+ times as wide as 'a' at its height, and at most 16"),
        ((10, 2, 8, 76), "red", {}, "`region` is too narrow: the letters of 'red' would have 6% of"),
        ((10, 20, 60, 24), "", {}, "at least one visible character"),
        ((10, 20, 60, 24), "naïve", {}, "with 'ï': replace them"),
        ((10, 20, 60, 24), "wizards!!", {}, "may have 8 characters"),
        ((10, 20, 60, 24), "a", {"font": "Corgette"}, "unknown font 'Corgette': choose .* such as Courgette"),
        ((10, 20, 60, 24), "a", {"font": "Roboto-Banana"}, "unknown font 'Roboto-Banana'.* such as Roboto"),
        ((10, 20, 60, 24), "a", {"font": "Roboto and Loto"}, "unknown font 'Loto'"),
        ((10, 20, 60, 24), "a", {"font": " "}, "`font` is empty: leave it out"),
        ((10, 20, 60, 24), "a", {"color": "darkred"}, "unknown color 'darkred': choose .* such as dark red"),
        (
            (10, 20, 60, 24), "a", {"font": "Roboto and Courgette", "color": "red"},
            "a mix of two fonts has no color, got 'red'",
        ),
        ((10, 20, 60, 24), "a", {"instruction": "x" * 50}, "has 50 tokens, and the model reads 40"),
        ((10, 20, 60, 24), "a", {"instruction": "a", "font": "Roboto"}, "`instruction` replaces"),
        ((10, 20, 60, 24), "a", {"steps": 0}, "`steps` must be 1 to 1000, got 0"),
        ((10, 20, 60, 24), "a", {"samples": 65}, "`samples` must be 1 to 64, got 65"),
        ((10, 20, 60, 24), "a", {"seed": -1}, "`seed` must be an integer from 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_sampling(model, picture, region, text, options, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        rewrite(
            picture,
            region,
            text,
            model=model,
            on_progress=lambda *call: steps.append(call),
            **options,
        )
    assert steps == []


def test_a_list_of_texts_is_refused(model, picture):
    with pytest.raises(TypeError, match="`text` must be one text, got .*one region after another"):
        rewrite(picture, (10, 20, 60, 24), ["a", "b"], model=model)


def test_without_weights_the_error_says_how_to_train(picture, monkeypatch, tmp_path):
    monkeypatch.setattr("overpaint.zoo._WEIGHTS", tmp_path)
    with pytest.raises(
        ValueError, match="not shipped with this version yet: train it with `overpaint"
    ):
        rewrite(picture, (10, 20, 60, 24), "a")


def test_the_model_works_as_soon_as_its_files_lie_in_the_zoo(model, picture, monkeypatch, tmp_path):
    monkeypatch.setattr("overpaint.zoo._WEIGHTS", tmp_path)
    model.save(tmp_path / "lettering")
    region = (10, 20, 60, 24)
    named = rewrite(picture, region, "a", steps=1)
    assert torch.equal(
        named, rewrite(picture, region, "a", steps=1, model=Lettering.load(tmp_path / "lettering"))
    )


def test_paths_pil_pictures_arrays_and_tensors_give_the_same_picture(model, picture, tmp_path):
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    forms = (
        tmp_path / "a.png",
        Image.fromarray(pixels),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
    )
    results = [rewrite(form, (10, 20, 60, 24), "a", model=model, steps=1) for form in forms]
    assert all(torch.equal(result, results[0]) for result in results)
    with pytest.raises(ValueError, match="`image`: there is no file"):
        rewrite(tmp_path / "none.png", (10, 20, 60, 24), "a", model=model)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="`image`: cannot read"):
        rewrite(tmp_path / "text.png", (10, 20, 60, 24), "a", model=model)


def test_each_sample_is_the_one_of_its_seed_and_progress_counts_all_steps(
    model, picture, monkeypatch
):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    calls = []
    result = rewrite_samples(
        picture, (10, 20, 60, 24), "a", model=model, steps=2, samples=3, seed=7, on_progress=lambda *c: calls.append(c)
    )  # fmt: skip
    assert result.seeds == (7, 8, 9) and result.readings == () and result.chosen == 0
    assert "3 samples, seed 7 not ranked" in repr(result)
    assert calls == [(n, 6, "writing") for n in range(1, 7)]
    for index, seed in enumerate(result.seeds):
        alone = rewrite(picture, (10, 20, 60, 24), "a", model=model, steps=2, seed=seed)
        assert torch.equal(result.sample(index), alone)
    assert torch.equal(result.picture, result.sample(0))
    assert not torch.equal(result.sample(0), result.sample(1))


def test_the_nearest_reading_is_chosen_then_the_case_then_the_first():
    assert _best(("wizord", "wizard", "wizard"), "wizard") == 1
    assert _best(("xxxx", "WIZARD", ""), "wizard") == 1
    assert _best((), "wizard") == 0
    assert _best(("hithere", "hi"), "hi there") == 0


@needs_ocr
def test_samples_are_ranked_by_the_text_reader(model, picture):
    result = rewrite_samples(picture, (10, 20, 60, 24), "a", model=model, steps=1, samples=2)
    assert len(result.readings) == 2 and result.reader.startswith("rapidocr ")
    assert result.chosen == _best(result.readings, "a")


def signs():
    """Return a picture with HELLO at two places and HALLO at a third."""
    canvas = Image.new("RGB", (420, 160), "white")
    font = ImageFont.truetype(FOLDER / "DejaVuSans-Bold.ttf", 30)
    for place, word in (((20, 10), "HELLO"), ((240, 100), "HELLO"), ((20, 100), "HALLO")):
        ImageDraw.Draw(canvas).text(place, word, fill="black", font=font)
    return canvas


@needs_ocr
def test_a_text_is_found_in_a_picture_the_best_first(model):
    matches = find_text(signs(), "hello")
    assert [m.text for m in matches] == ["HELLO", "HELLO", "HALLO"]
    assert [m.similarity for m in matches] == pytest.approx([1, 1, 0.8])
    x, y, width, height = matches[0].box
    assert abs(x - 20) < 12 and abs(y - 12) < 14 and 100 < width < 150 and 20 < height < 60
    result = rewrite(signs(), matches[2].corners, "a", model=model, steps=1)
    before = torch.from_numpy(np.array(signs())).permute(2, 0, 1) / 255
    rows, columns = (result != before).any(0).nonzero(as_tuple=True)
    assert rows.min() > 80 and columns.max() < 200
    with pytest.raises(
        ValueError, match="no text like 'zebra' is read in the picture, only: 'HELLO'"
    ):
        find_text(signs(), "zebra")


def test_finding_needs_the_extra_and_a_text(monkeypatch):
    with pytest.raises(ValueError, match="the text to find is empty"):
        find_text(signs(), "  ")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingExtra, match="needs rapid"):
        find_text(signs(), "hello")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
def test_pasting_keeps_all_other_pixels_of_any_mode(model, picture, tmp_path, mode):
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    original = Image.fromarray(pixels).convert(mode)
    if original.mode in ("RGBA", "LA"):
        alpha = Image.fromarray(np.tile(np.arange(400) % 256, (80, 1)).astype(np.uint8))
        original.putalpha(alpha)
    original.info["icc_profile"] = b"profile"
    region = (11, 21, 61, 23)
    result = rewrite_samples(original, region, "a", model=model, steps=1, samples=1)
    path = save_png(paste(original, result), tmp_path / "out.png")
    saved = Image.open(path)
    kept = "RGBA" if "A" in mode else "RGB"
    assert saved.mode == kept and saved.info["icc_profile"] == b"profile"
    before, after = np.array(original.convert(kept)), np.array(saved)
    inside = result.plan.area.mask.numpy()
    assert (before[~inside] == after[~inside]).all() and (before[inside] != after[inside]).any()
    assert kept == "RGB" or (after[inside, 3] == 255).all()


def test_the_sheet_shows_the_original_and_every_sample(model, picture):
    result = rewrite_samples(picture, (10, 20, 60, 24), "a", model=model, steps=1, samples=1)
    result = replace(
        result, crops=result.crops.repeat(5, 1, 1, 1), seeds=(0, 1, 2, 3, 4), readings=("a", "", "b", "c", "d" * 99)
    )  # fmt: skip
    sheet = draw_sheet(result)
    assert sheet.mode == "RGB" and sheet.width > sheet.height
    marked = (np.array(sheet) == (180, 67, 47)).all(-1)
    assert (
        marked.any() and not marked[:, : sheet.width // 8].any()
    )  # a frame around the first sample
