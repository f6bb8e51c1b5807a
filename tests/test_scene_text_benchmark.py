"""The arithmetic, the frozen cases and the controls of `benchmarks/quality_scene_text.py`."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lettering_worlds import faces, small_world

from overpaint.scene_text import Config, Lettering
from overpaint.scene_text.instructions import compose
from overpaint.train import lettering, lettering_fonts, lettering_words, photographs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [n for n in sys.modules if n.startswith(("scene_text_", "quality_scene_text"))]:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def materials():
    from scene_text_crops import Materials

    world = small_world()
    photos = {f"photo {i}": photo for i, photo in enumerate(world.photos)}
    return Materials({face.name: face for face in faces()}, photos)


@pytest.fixture
def source(materials):
    from scene_text_cases import Pool

    seen = tuple(materials.faces.values())
    return Pool("validation", seen, seen[1:], {}, tuple(materials.photos))


def cases_of(materials, source, **counts):
    from scene_text_cases import draw_cases

    return draw_cases(materials, source, counts={k.replace("_", " "): n for k, n in counts.items()})


def test_ciede2000_of_known_pairs():
    import scene_text_style as style

    assert style.difference([255, 0, 0], [0, 255, 0]) == pytest.approx(86.61, abs=0.05)
    assert style.difference([0, 0, 0], [255, 255, 255]) == pytest.approx(100, abs=0.01)
    assert style.difference([12, 99, 180], [12, 99, 180]) == 0
    assert style.hue_error([255, 0, 0], [0, 255, 255]) > 120
    assert style.hue_error([255, 0, 0], [230, 20, 20]) < 20
    assert style.is_chromatic([220, 30, 30]) and not style.is_chromatic([128, 128, 128])


def test_letters_have_the_color_they_were_painted_in_and_blank_regions_have_none():
    import scene_text_style as style

    rng = np.random.default_rng(0)
    clean = np.clip(rng.normal((90, 120, 60), 3, (32, 128, 3)), 0, 255).astype(np.uint8)
    mask = np.zeros((32, 128), bool)
    mask[3:29, 20:100] = True
    written = clean.copy()
    written[8:22, 30:36] = written[8:22, 60:66] = (200, 30, 40)
    letters = style.letters(written, clean, mask)
    assert letters.present and np.abs(letters.color - (200, 30, 40)).max() < 1
    assert letters.opacity[10, 32] > 0.95 and letters.opacity[10, 50] < 0.1
    assert not style.letters(clean, clean, mask).present
    black = style.isolated(written, clean, mask)
    assert black[10, 32].max() < 15 and black[10, 50].min() > 220 and black[0, 0].min() == 255


def test_stroke_width_and_slant_of_bars():
    import scene_text_style as style

    for width in (3, 6):
        bars = np.zeros((32, 128), np.float32)
        for x in (20, 50, 80):
            bars[2:30, x : x + width] = 1
        assert style.stroke_width(bars) == pytest.approx(width, rel=0.25)
        assert style.slant(bars) == 0
    leaning = np.zeros((32, 128), np.float32)
    for row in range(2, 30):
        start = 50 - round((row - 16) * np.tan(np.radians(15)))
        leaning[row, start : start + 3] = leaning[row, start + 20 : start + 23] = 1
    assert style.slant(leaning) == pytest.approx(15, abs=3)


def test_background_seam_and_leak_by_hand():
    import scene_text_style as style

    clean = np.full((32, 128, 3), 100, np.uint8)
    mask, cover = np.zeros((32, 128), bool), np.zeros((32, 128), np.float32)
    mask[4:28, 20:100] = True
    cover[10:20, 40:80] = 1
    noisy = clean.copy()
    noisy[mask] = 110
    noisy[10:20, 40:80] = 255  # letters do not count
    assert style.background_psnr(noisy, clean, mask, cover) == pytest.approx(20 * np.log10(25.5), abs=0.01)  # fmt: skip
    assert style.background_psnr(clean, clean, mask, cover) == 60
    assert style.background_psnr(noisy, clean, mask, np.ones_like(cover)) is None
    assert style.seam(clean, clean, mask) == 1 and style.seam(noisy, clean, mask) == pytest.approx(11)  # fmt: skip
    assert style.leak(clean, noisy, mask, cover) == 10
    assert style.outside_equal(noisy, clean, mask)
    noisy[0, 0, 0] += 1
    assert not style.outside_equal(noisy, clean, mask)


def test_scores_wrong_words_and_several_samples_by_hand():
    from scene_text_reading import gap, median, scores, several, wrong_words

    drawn = [SimpleNamespace(case=SimpleNamespace(text=t, font="F")) for t in ("Word", "a", "next")]
    values = scores(["word", "a", ""], drawn, {"F": "F"})
    assert values.exact.tolist() == [0, 1, 0] and values.any_case.tolist() == [1, 1, 0]
    assert values.similarity.tolist() == [1, 1, 0]
    assert values.only([4]).any_case.tolist() == [1, 0]
    words = ["word", "next", "able", "cat"]
    assert wrong_words(words, words) == [0, 0, 0]  # "cat" has no other word of its length
    assert wrong_words(["NEXT", "able", "word", ""], words) == [1, 1, 1]
    other = scores(["x", "a", "next"], drawn, {"F": "F"})
    rates = several([values, other])
    assert [rates[k].mean for k in ("one", "any of 2", "all of 2")] == pytest.approx([2 / 3, 1, 1 / 3])  # fmt: skip
    assert gap(values, other).mean == 0
    assert median([1, 2, 30]).mean == 2 and median([]).n == 0
    never = scores(["", "", ""], drawn, {"F": "F"})
    assert gap(never, never).low < 0 < gap(never, never).high  # never of width 0


def test_instructions_of_the_variants():
    from scene_text_sets import WORDINGS, Case, instruction

    def case(name, other):
        return Case("test", name, 0, "Sky", "Lato", "red", other, "photo", 1)

    assert instruction(case("color", "blue")) == compose("Sky", "Lato", "red")
    assert instruction(case("color", "blue"), variant="other") == compose("Sky", "Lato", "blue")
    assert instruction(case("variation", "-Bold"), variant="other") == compose("Sky", "Lato-Bold", "red")  # fmt: skip
    assert instruction(case("mixing", "Arvo"), variant="other") == "in font: Lato and Arvo"
    assert instruction(case("unseen word, unseen font", "")) == 'Write "Sky" in color: red'
    assert instruction(case("style, seen font", "")) == 'Write "Sky"'
    assert instruction(case("color", "blue"), variant="no word") == "in font: Lato and color: red"
    texts = {instruction(case("wording", str(i)), variant="other") for i in range(30)}
    assert len(texts) == len(WORDINGS) == 30
    assert all('"Sky"' in text and "red" in text for text in texts)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_committed_cases_follow_their_rule(split):
    from scene_text_cases import checked_words, load
    from scene_text_sets import SETS

    cases = load(split)
    families = {row.family: row for row in lettering_fonts.families()}
    held_out = [row.family for row in lettering_fonts.families() if row.split == "held-out"]
    unseen = {f for i, f in enumerate(held_out) if (i % 3 == 2) == (split == "validation")}
    listed = photographs.HELD_OUT if split == "test" else photographs.VALIDATION
    for name, rule in SETS.items():
        group = [case for case in cases if case.set == name]
        assert len(group) == (rule.test if split == "test" else rule.validation)
        for case in group:
            assert lettering_words.is_held_out(case.text) == rule.unseen_words
            assert len(case.text) in rule.lengths and case.photo in listed and case.color
            if len(case.text) > 1:
                number = hashlib.sha256(case.text.lower().encode()).digest()[1]
                assert number % 2 == (split == "test")
            family = case.font.partition("-")[0]
            assert (family in unseen) if rule.fonts == "unseen" else families[family].split == "training"  # fmt: skip
    assert not {case.text.lower() for case in cases} & checked_words()


def test_the_words_of_the_checks_are_those_of_the_recipe():
    import scene_text_cases

    assert scene_text_cases._CHECK_SEED == lettering._CHECK_SEED
    run = SimpleNamespace(recipe=lettering.CPU, unseen=small_world(held_out_words=True))
    words = {sample.text.lower() for sample in lettering.Run.held_out(run, "grey")}  # type: ignore[arg-type]
    assert words <= scene_text_cases.checked_words()


def test_a_changed_list_is_refused(tmp_path):
    from scene_text_cases import PATH, load

    path = tmp_path / "cases.tsv"
    path.write_text(PATH.read_text().replace("\tred\t", "\tblue\t", 1))
    with pytest.raises(ValueError, match="Restore it from git"):
        load("test", path)


def test_cases_are_drawn_the_same_twice_and_regions_hold_the_word(materials, source):
    from scene_text_crops import boxes, crops

    counts = {"unseen word, seen font": 6, "insertion": 4, "twice as wide": 4, "color": 3}
    cases = cases_of(materials, source, **counts)
    assert cases == cases_of(materials, source, **counts) and len(cases) == 17
    drawn = crops(cases, materials)
    for one in drawn:
        assert (one.cover * one.mask).sum() > 0.99 * one.cover.sum()
        is_empty = one.case.set in ("insertion", "twice as wide", "color")
        if one.case.set in ("insertion", "twice as wide"):
            assert np.array_equal(one.input, one.clean) and is_empty
        change = np.abs(one.truth.astype(int) - one.clean).max(2) * ~one.mask
        assert change.max() < 60  # at most a trace of a shadow
    wide = [one for one in drawn if one.case.set == "twice as wide"]
    for one, (left, _, right, _) in zip(wide, boxes(wide), strict=True):
        assert right - left > 1.6 * (one.end - one.start + 4)
    assert all(one.case.other not in ("", one.color) for one in drawn if one.case.set == "color")


def test_a_generator_that_draws_another_color_is_noticed(materials, source):
    from scene_text_crops import crop

    case = cases_of(materials, source, color=1)[0]
    other = "red" if case.color != "red" else "blue"
    with pytest.raises(ValueError, match="was changed after the list was drawn"):
        crop(replace(case, color=other), materials)


def model_of(materials):
    names = list(materials.faces)
    return Lettering.build(
        lettering.styles(Config(channels=(32, 32), groups=8, head_width=16), names)
    )


def test_rendering_with_the_true_font_reads_near_the_ceiling_and_random_weights_near_zero(
    materials, source
):
    pytest.importorskip("rapidocr")
    from scene_text_crops import boxes, crops, images
    from scene_text_methods import CHARACTERS_OFF, OURS, RENDERED, TRUTH, Settings, write
    from scene_text_reading import scores, wrong_words

    from overpaint.scorers.text_reader import TextReader

    drawn = crops(cases_of(materials, source, **{"one font": 12, "insertion": 4}), materials)
    model, reader = model_of(materials), TextReader()
    rates, texts = {}, {}
    for method in (TRUTH, RENDERED, OURS, CHARACTERS_OFF):
        lines = write(model, method, drawn, Settings(steps=1), materials.faces)
        assert all(
            np.array_equal(x[~o.mask], (o.truth if method == TRUTH else o.input)[~o.mask])
            for x, o in zip(lines, drawn, strict=True)
        )
        texts[method] = reader.read_boxes(images(list(lines)), boxes(drawn), margin=1)
        rates[method] = scores(
            texts[method], drawn, {n: n for n in materials.faces}
        ).any_case.mean()
    assert rates[TRUTH] >= 0.8 and rates[RENDERED] >= rates[TRUTH] - 0.2
    assert rates[OURS] <= 0.07 and rates[CHARACTERS_OFF] <= 0.07
    words = [one.case.text for one in drawn]
    assert np.mean(wrong_words(texts[RENDERED], words)) == 0


def test_true_words_are_read_in_upright_and_rotated_regions(materials, source):
    pytest.importorskip("rapidocr")
    from scene_text_crops import crops, images
    from scene_text_methods import Settings
    from scene_text_pictures import ANGLE, edited_lines, true_lines
    from scene_text_run import read_box

    from overpaint.scorers.text_reader import TextReader

    drawn = crops(cases_of(materials, source, rotated=4), materials)
    whole = np.ones(drawn[0].mask.shape, bool)
    boxes = [read_box(one, whole) for one in drawn]
    for angle in (0.0, ANGLE):
        edited = true_lines(drawn, materials, angle)
        assert edited.outside == [True] * 4
        texts = TextReader().read_boxes(images(list(edited.lines)), boxes)
        read = [t.lower() == o.case.text.lower() for t, o in zip(texts, drawn, strict=True)]
        assert sum(read) >= 3, (angle, texts)
    written = edited_lines(model_of(materials), drawn[:1], materials, ANGLE, Settings(steps=1))
    assert written.outside == [True] and not np.array_equal(written.lines[0], edited.lines[0])


def test_the_classifier_of_fonts_tells_two_faces_apart_and_ranks_them(materials):
    from scene_text_networks import render, train_fonts

    known = tuple(materials.faces.values())
    fonts = train_fonts(known, samples=256, batch=16)
    assert fonts.accuracy > 0.9 and fonts.n == 100
    rng = np.random.default_rng(3)
    drawn = np.stack([render(rng, face, materials.line) for face in known for _ in range(4)])
    names = [face.name for face in known for _ in range(4)]
    assert np.mean(np.array(fonts.ranks(drawn, names)) == 0) > 0.8
    features = fonts.embed(drawn)
    assert features.shape[0] == 8 and np.linalg.norm(features, axis=1) == pytest.approx(1)


def test_the_area_under_the_curve_and_two_sets_that_differ():
    from scene_text_networks import area_under_curve, naturalness

    assert area_under_curve(np.array([0.0, 1]), np.array([2.0, 3])) == 1
    assert area_under_curve(np.array([0.0, 1]), np.array([0.0, 1])) == 0.5
    assert area_under_curve(np.array([1.0, 3]), np.array([2.0, 0])) == 0.25
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (24, 16, 32, 3)).astype(np.uint8)
    smooth = np.broadcast_to(rng.integers(0, 256, (24, 1, 1, 3)), real.shape).astype(np.uint8)
    apart = naturalness(real, smooth, epochs=6)
    assert apart.auc.mean > 0.9 and apart.kid > 5 * abs(apart.kid_real)
    assert naturalness(real, real, epochs=1).auc.mean == 0.5


def test_stored_lines_are_not_written_again(tmp_path):
    from scene_text_store import Store

    store = Store(tmp_path)
    lines = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    assert np.array_equal(store.lines("a, b--c", lambda: lines), lines)
    assert np.array_equal(store.lines("a, b--c", lambda: pytest.fail("written again")), lines)
    assert store.values("x", lambda: [1]) == store.values("x", lambda: [2]) == [1]


def test_the_sheet_holds_failures_and_is_large_enough_to_read(tmp_path):
    from PIL import Image
    from scene_text_sheet import chosen, sheet

    rows = chosen(1000)
    assert len(set(rows)) == 100 and rows == chosen(1000) and rows != list(range(100))
    lines = [np.full((32, 128, 3), 90, np.uint8)] * 7
    words = ["word"] * 7
    sheet(lines, words, ["word"] * 7, tmp_path / "right.png", rows=range(7))
    sheet(lines, words, ["ward"] * 7, tmp_path / "wrong.png", rows=range(7))
    right, wrong = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("right", "wrong"))
    assert right.shape == wrong.shape == (2 * (96 + 30) + 10, 5 * 394 + 10, 3)
    redness = [(x[..., 0].astype(int) - x[..., 1]).max() for x in (right, wrong)]
    assert redness[0] < 50 and redness[1] > 150


def test_a_second_run_of_the_test_list_is_refused(tmp_path, materials, source):
    import edit_looks
    from quality_scene_text import begin
    from scene_text_methods import OURS, Settings

    cases = cases_of(materials, source, insertion=1)
    plan = SimpleNamespace(settings=Settings())
    models = {OURS: (None, "weights")}
    run = SimpleNamespace(cases=cases, drawn={"insertion": cases}, models=models, plan=plan)
    path = tmp_path / "quality_scene_text.json"
    looks = begin(run, path, False)
    assert len(looks) == 1 and "unfinished" in path.read_text()
    assert len(begin(run, path, False)) == 1  # a stopped run goes on
    edit_looks.finish(path, looks, {"result": {"x": 1}, "tables": {}, "test": {"concepts": {}}})
    with pytest.raises(SystemExit, match="a test is run once"):
        begin(run, path, False)
    assert len(begin(run, path, True)) == 2


def test_the_model_given_no_characters_gets_no_natural_width(materials, source):
    from scene_text_crops import crops, places

    drawn = crops(cases_of(materials, source, **{"twice as wide": 2, "one font": 1}), materials)
    model = model_of(materials)
    words = [one.case.text for one in drawn]
    place = places(model, drawn, words, words)
    empty = places(model, drawn, ["", "", ""], words)
    tight = [i for i, one in enumerate(drawn) if one.case.set == "one font"][0]
    assert place.start[tight] == pytest.approx(drawn[tight].start)
    widths, whole = place.end - place.start, empty.end - empty.start
    assert bool((widths <= whole + 1e-4).all()) and torch.isfinite(widths).all()


def test_the_section_of_the_results_has_every_table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "docs"))
    import scene_text_sections

    cell = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    missing = {"mean": None, "low": None, "high": None, "n": 0}
    figures = ("word_accuracy_seen", "word_accuracy_unseen", "ceiling", "outside_mask_equal")
    run = {
        "result": dict.fromkeys(figures, 0.5) | {"seconds_edit": 1.234},
        "tables": {
            "words read": [{"method": "the model", "n": 9, "PP-OCR words": cell, "PP-OCR 1 - NED": cell}],
            "color": [{"method": "the model", "CIEDE2000, median": missing, "letters present": ""}],
        },
        "protocol": {
            "guidance": {"spelling": 1.0, "style": 1.0}, "engine_of_figures": "PP-OCR", "cases": {"color": 9},
            "seed": 0, "threads": 2, "commit": "abcdefgh", "steps": 20,
        },
        "test": {"looks": [{}]},
    }  # fmt: skip
    page = scene_text_sections.lettering(run)
    assert "| the model | 9 | 50 % [40, 60] | 0.50 [0.40, 0.60] |" in page
    assert (
        "| the model |  |  |" in page and "Looks at the test list: 1." in page and "1.2 s" in page
    )
    assert scene_text_sections.lettering({"unfinished": "begun"}) == "## Lettering\n\nbegun\n"
