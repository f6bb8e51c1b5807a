"""The data of `lettering`: words, fonts, colors, and drawn lines whose labels are true."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lettering_worlds import FOLDER, small_world

from overpaint.scorers.text_reader import TextReader
from overpaint.train import lettering_fonts, lettering_words, photographs
from overpaint.train.lettering_batches import boxes, images, reading
from overpaint.train.lettering_colors import contrast, luminance, palette
from overpaint.train.lettering_glyphs import Style, Word, draw_word, paint
from overpaint.train.lettering_scenes import (
    STAGES,
    draw,
    draw_named,
    faces_of,
    photograph_names,
)


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
    assert any(" " in word for word in seen) and all(word == word.strip() for word in seen)
    plain = [lettering_words.draw(rng, is_plain=True) for _ in range(200)]
    assert all(word.isalpha() and word == word.lower() and 2 <= len(word) <= 8 for word in plain)


def test_about_half_of_the_strings_are_words():
    """A model that sees only words learns to complete them; the prototype that spells saw as many random strings."""
    rng = np.random.default_rng(0)
    for is_plain in (False, True):
        drawn = [lettering_words.draw(rng, is_plain=is_plain) for _ in range(1000)]
        known = [text in lettering_words.words(len(text), held_out=False) for text in drawn]
        assert 0.42 < np.mean(known) < 0.62


def test_the_measured_words_are_held_out_and_of_each_length():
    rng = np.random.default_rng(0)
    for length in range(2, 9):
        drawn = [lettering_words.draw_measured(rng, length) for _ in range(20)]
        assert all(len(word) == length and lettering_words.is_held_out(word) for word in drawn)
        seen = lettering_words.draw_measured(rng, length, held_out=False)
        assert len(seen) == length and not lettering_words.is_held_out(seen)


def test_held_out_faces_are_in_no_world_of_training(world):
    held_out = replace(world.faces[1], split="held-out")
    every = (world.faces[0], held_out)
    for split in ("training", "held-out"):
        assert faces_of(every, split) == (world.faces[0],)
    assert faces_of(every, "held-out fonts") == (held_out,)
    with pytest.raises(ValueError, match="has no face 'Roboto-Bold' of this stage: take the faces"):
        draw(replace(world, faces=(held_out,)), STAGES["grey"], 0, 0)


def test_the_first_hundred_labels_are_those_of_the_first_version(world):
    """Words, instructions, fonts and colors of seed 0; pixels also depend on the versions of FreeType and OpenCV."""
    digest = hashlib.sha256()
    for index in range(100):
        sample = draw(world, STAGES["photographs"], 0, index)
        digest.update(f"{sample.text} {sample.instruction} {sample.font} {sample.color}\n".encode())
    assert digest.hexdigest()[:16] == "7bf76c64d536c627"


def test_lines_are_drawn_faster_than_they_are_learned(world):
    """The recipe draws beside the training step, which takes about 30 lines a second of one core."""
    draw(world, STAGES["photographs"], 0, 0)
    start = time.process_time()
    for index in range(50):
        draw(world, STAGES["photographs"], 0, index)
    assert 50 / (time.process_time() - start) > 100


def test_the_place_of_a_shrunk_face_is_the_one_that_was_asked_for(world):
    """A caller gives height and width of a line without knowing which fonts are drawn smaller."""
    small = replace(world.faces[0], shrink=0.8)
    for face in (world.faces[0], small):
        word = Word.lay_out(face, "HHH", capital=15)
        placed = draw_word(word, world.line, x=10, baseline=22, stretch=1, bend=np.eye(3))
        assert placed.capital == pytest.approx(7) and placed.baseline == pytest.approx(22)
        rows = np.flatnonzero(placed.cover.max(1) > 0.5)
        assert rows[0] == pytest.approx(22 - 15 * face.shrink, abs=1)


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
    names = [name.lower() for name in training + held_out]
    assert not [name for name in names if "text" in name or "page" in name]


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


def test_grey_letters_contrast_with_their_plain_background(world):
    for index in range(20):
        sample = draw(world, STAGES["grey"], 0, index)
        core, ground = sample.image[sample.cover > 0.99], sample.clean.reshape(-1, 3)
        assert (sample.image == sample.image[..., :1]).all() and (ground == ground[0]).all()
        assert abs(core.mean() - ground.mean()) >= 74


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


def test_font_and_color_are_each_named_in_half_of_10000_draws():
    outcomes = np.zeros((2, 2))
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        with_font, with_color = draw_named(rng)
        outcomes[int(with_font), int(with_color)] += 1
    assert (np.abs(outcomes / 10_000 - 0.25) < 0.02).all(), outcomes


def test_instructions_name_what_was_drawn(world):
    outcomes = np.zeros((2, 2))
    for index in range(200):
        sample = draw(world, STAGES["fonts"], 2, index)
        rest = sample.instruction.replace(f'"{sample.text}"', "")
        outcomes[int(sample.font in rest), int(sample.color in rest)] += 1
        assert f'"{sample.text}"' in sample.instruction
    assert (np.abs(outcomes / 200 - 0.25) < 0.12).all(), outcomes
    both = draw(world, STAGES["fonts"], 2, 0, names_style=True)
    assert both.font in both.instruction and both.color in both.instruction


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
