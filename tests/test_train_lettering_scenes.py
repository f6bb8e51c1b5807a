"""The data of `lettering`: words, fonts, colors, and drawn lines whose labels are true."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from lettering_worlds import FOLDER, small_world

from overpaint.scorers.text_reader import TextReader
from overpaint.train import lettering_fonts, lettering_words, photographs
from overpaint.train.lettering_batches import boxes, images, reading
from overpaint.train.lettering_colors import contrast, luminance, palette
from overpaint.train.lettering_glyphs import Style, Word, draw_word, paint
from overpaint.train.lettering_scenes import STAGES, draw, photograph_names


@pytest.fixture(scope="module")
def world():
    return small_world()


def test_a_word_is_held_out_in_every_case_and_about_a_tenth_are():
    assert lettering_words.is_held_out("Wizards") == lettering_words.is_held_out("WIZARDS")
    share = np.mean([lettering_words.is_held_out(f"w{i}") for i in range(5000)])
    assert 0.08 < share < 0.12


def test_no_held_out_word_is_drawn_in_training_and_only_those_in_tests():
    rng = np.random.default_rng(0)
    seen = {lettering_words.draw(rng) for _ in range(2000)}
    unseen = {lettering_words.draw(rng, held_out=True) for _ in range(300)}
    assert not any(lettering_words.is_held_out(word) for word in seen)
    assert all(lettering_words.is_held_out(word) for word in unseen)
    assert any(character.isdigit() for word in seen for character in word)
    plain = [lettering_words.draw(rng, is_plain=True) for _ in range(200)]
    assert all(word.isalpha() and word == word.lower() and 2 <= len(word) <= 8 for word in plain)


def test_the_table_of_fonts_has_a_hundred_families_with_pins_and_licences():
    families = lettering_fonts.families()
    assert len(families) >= 100 and len({f.family for f in families}) == len(families)
    assert all(len(f.sha256) == 64 and f.licence and "400-normal" in f.styles for f in families)
    by_category = {f.category: 0 for f in families}
    for family in families:
        by_category[family.category] += family.split == "held-out"
    assert all(by_category.values()), "a category without a held-out family"
    assert [f.split for f in families if f.package == "roboto"] == ["training"]


def test_an_archive_with_another_hash_and_a_missing_one_raise(tmp_path: Path):
    entry = next(f for f in lettering_fonts.families() if f.package == "roboto")
    with pytest.raises(FileNotFoundError, match="no archive .*overpaint train lettering"):
        lettering_fonts.load(tmp_path, ["roboto"])
    (tmp_path / entry.archive).write_bytes(b"something else")
    with pytest.raises(ValueError, match="has SHA-256 .* expected .*: delete the file"):
        lettering_fonts.fetch(tmp_path, ["roboto"])


def test_a_face_with_long_ascenders_is_drawn_smaller():
    face = lettering_fonts.make_face("A", "A", (FOLDER / "STIXSizFiveSymReg.ttf").read_bytes())
    usual = lettering_fonts.make_face("B", "B", (FOLDER / "DejaVuSans.ttf").read_bytes())
    assert usual.shrink == 1 and 30 < usual.capital < 40 and face.shrink <= 1


def test_photographs_are_split_and_hold_no_text():
    training, held_out = photograph_names("training"), photograph_names("held-out")
    assert len(training) > 40 and not set(training) & set(held_out)
    assert set(training) <= set(photographs.TRAINING)
    assert not [name for name in training + held_out if "text" in name or "page" in name]


def test_luminance_and_contrast_are_those_of_the_standard():
    black, white = luminance(np.array([[0, 0, 0], [255, 255, 255]]))
    assert contrast(black, white) == pytest.approx(21)
    assert luminance(np.array([255, 0, 0])) == pytest.approx(0.2126)
    assert len(palette().names) > 900 and palette().basic.sum() == 12


def test_a_sample_depends_on_seed_and_index_alone(world):
    for stage in STAGES.values():
        first, second = draw(world, stage, 3, 5), draw(world, stage, 3, 5)
        assert np.array_equal(first.image, second.image) and np.array_equal(first.mask, second.mask)
        assert first.instruction == second.instruction and np.array_equal(first.edges, second.edges)
    digests = {
        hashlib.sha256(draw(world, STAGES["photographs"], *key).image.tobytes()).digest()
        for key in ((0, 0), (0, 1), (1, 0))
    }
    assert len(digests) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_the_mask_covers_the_letters_and_nothing_else_changes(world, stage):
    for index in range(40):
        sample = draw(world, STAGES[stage], 0, index)
        assert sample.cover[sample.mask].sum() >= 0.995 * sample.cover.sum(), sample.text
        changed = np.abs(sample.image.astype(int) - sample.clean).max(-1) > 40
        assert (changed & ~sample.mask).sum() <= 0.02 * changed.sum() + 2, sample.text
        assert len(sample.edges) == len(sample.text) + 1 and (np.diff(sample.edges) > 0).all()


def test_letters_lie_between_their_edges(world):
    sample = draw(world, STAGES["single"], 0, 0, text="lHi")
    columns = sample.cover.sum(0)
    for left, right in zip(sample.edges, sample.edges[1:], strict=False):
        middle = columns[round(left) : round(right)]
        assert middle.max() > 5 and columns[round(left)] < 0.6 * middle.max()
    rows = np.flatnonzero(draw(world, STAGES["single"], 0, 0, text="HHH").cover.max(1) > 0.5)
    assert abs(rows[0] - sample.capital) < 1 and abs(rows[-1] + 1 - sample.baseline) < 1


def test_the_drawn_color_is_the_named_one_black_included(world):
    values = dict(zip(palette().names, palette().values, strict=True))
    for index in range(30):
        sample = draw(world, STAGES["fonts"], 1, index)
        core = sample.cover > 0.99
        if core.sum() > 5:
            drawn = sample.image[core].mean(0)
            assert np.abs(drawn - values[sample.color]).max() <= 3, sample.color
    face = world.faces[0]
    word = draw_word(
        Word.lay_out(face, "black", capital=15), world.line, x=10, baseline=22, stretch=1, bend=np.eye(3)
    )  # fmt: skip
    ground = np.full((32, 128, 3), 200, np.uint8)
    assert paint(ground, [word], Style(np.zeros(3, np.float32))).min() == 0
    shaded = paint(ground, [word], Style(np.zeros(3, np.float32), shadow=0.8, offset=(1, 1)))
    assert shaded.mean() < paint(ground, [word], Style(np.zeros(3, np.float32))).mean()


def test_instructions_name_font_and_color_each_in_half_of_the_samples(world):
    outcomes = np.zeros((2, 2))
    for index in range(600):
        sample = draw(world, STAGES["fonts"], 2, index)
        rest = sample.instruction.replace(f'"{sample.text}"', "")
        outcomes[int(sample.font in rest), int(sample.color in rest)] += 1
        assert f'"{sample.text}"' in sample.instruction
    assert (np.abs(outcomes / 600 - 0.25) < 0.06).all(), outcomes


def test_half_of_the_samples_have_a_second_word(world):
    with_second = 0
    for index in range(200):
        sample = draw(world, STAGES["fonts"], 4, index)
        values = np.array(palette().values[palette().names.index(sample.color)])
        outside = np.abs(sample.image[~sample.mask].astype(float) - values).max(-1) < 3
        with_second += outside.sum() > 15
    assert 0.3 < with_second / 200 < 0.75


def test_the_letters_can_be_read(world):
    pytest.importorskip("rapidocr")
    samples = [draw(world, STAGES["single"], 5, i) for i in range(24)]
    reader = TextReader()
    texts = reader.read_boxes(images(samples), boxes(samples), margin=2)
    assert reading(texts, [s.text for s in samples])["words_any_case"] > 0.85
