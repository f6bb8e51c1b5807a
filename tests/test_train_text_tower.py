"""The tokenizer of `icons`, the texts of its text tower, and the three losses."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import icon_worlds
import language_packages
import layouts
import numpy as np
import pytest
import tiny_icons
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F

from overpaint.train import captions, icon_world, language, networks, text_tower
from overpaint.train.icon_scenes import Scenes
from overpaint.zoo import builders


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        yield language_packages.write(tmp_path_factory.mktemp("packages"), patch)


@pytest.fixture(scope="module")
def tokens(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return text_tower.tokenizer(packages, tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.fixture(scope="module")
def clip() -> Any:
    """Return CLIP's tokenizer, with all 48,894 merges."""
    return layouts.tokenizer()


def texts_to_read() -> list[str]:
    rng, scenes = np.random.default_rng(0), Scenes(icon_worlds.Recorded())
    drawn = [scenes.small(rng).caption for _ in range(200)]
    names = [*icon_world.subjects(), *captions.more_objects(), *icon_world.STYLES]
    return [*drawn, *names, *(s for others in captions.synonyms().values() for s in others)]


def test_words_are_split_as_in_clip_where_its_tokens_are_among_the_first(
    tokens: Any, clip: Any
) -> None:
    words = sorted({word for text in texts_to_read() for word in re.findall("[a-z]+", text)})
    same = 0
    for word in words:
        theirs, ours = (t(word, add_special_tokens=False).input_ids for t in (clip, tokens))
        if max(theirs) < 512 + networks.MERGES:
            assert ours == theirs, word
            same += 1
        else:
            assert len(ours) > len(theirs), word
    assert 0.7 * len(words) < same < len(words)


def test_a_quarter_of_the_worlds_names_has_a_word_of_several_tokens(tokens: Any) -> None:
    names = [*icon_world.subjects(), *icon_world.STYLES, *icon_world.COLORS]
    split = [n for n in names if len(tokens(n).input_ids) - 2 > len(n.split())]
    assert (len(split), len(names)) == (37, 144)


def test_the_tokenizer_is_clips_with_16_000_merges(tokens: Any, clip: Any) -> None:
    assert len(tokens) == 16_000 + 512 + 2
    theirs = {word: i for word, i in clip.get_vocab().items() if i < 16_512}
    special = {"<|startoftext|>": 16_512, "<|endoftext|>": 16_513}
    assert tokens.get_vocab() == theirs | special
    assert tokens("cat").input_ids == [16_512, theirs["cat</w>"], 16_513]
    assert tokens.model_max_length == networks.TOKENS


def test_a_saved_tokenizer_is_loaded_without_packages(
    tokens: Any, packages: Path, tmp_path: Path
) -> None:
    tokens.save_pretrained(tmp_path / "tokenizer")
    again = text_tower.tokenizer(tmp_path / "absent", tmp_path / "tokenizer")
    assert again("a plain owl").input_ids == tokens("a plain owl").input_ids


def without_spaces(text: str) -> str:
    return "".join(text.lower().split())


def test_captions_come_back_from_their_tokens(tokens: Any) -> None:
    for text in [*texts_to_read(), "the café in Zürich - 3 £ 🦊", "ship's, (twice); 1,000!"]:
        ids = tokens(text, add_special_tokens=False).input_ids
        assert without_spaces(tokens.decode(ids)) == without_spaces(text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    text=st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), max_size=40)
)
def test_every_text_comes_back_from_its_tokens(tokens: Any, text: str) -> None:
    ids = tokens(text, add_special_tokens=False).input_ids
    assert without_spaces(tokens.decode(ids)) == without_spaces(text)


def test_the_text_encoder_has_12_megabytes() -> None:
    with torch.device("meta"):
        tower = networks.build_clip(networks.CPU, networks.MERGES + 514).text_model
    size = 2 * sum(p.numel() for p in tower.parameters())  # in half precision
    assert 11e6 < size < 12.5e6


def test_byte_letters_are_those_of_clip() -> None:
    letters = builders.byte_letters()
    assert len(letters) == 256 and set(letters) == set(ByteLevel.alphabet())
    numbers = {"!": 0, "a": 64, "~": 93, "a</w>": 320, "dog</w>": 1929, "cat</w>": 2368}  # CLIP's
    vocabulary, _ = layouts.vocabulary()
    assert {token: vocabulary[token] for token in numbers} == numbers


@pytest.fixture(scope="module")
def small(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Return a tokenizer of few merges and the texts."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        tiny_icons.shorten(patch)
        few = text_tower.tokenizer(packages, folder / "tokenizer")
        data = text_tower.texts(packages, folder, few, 32)
        stamp = (folder / "text-vectors.safetensors").stat().st_mtime_ns
        again = text_tower.texts(packages, folder, few, 32)
        assert (folder / "text-vectors.safetensors").stat().st_mtime_ns == stamp
        assert torch.equal(again.line_vectors, data.line_vectors)
        yield few, data


def test_captions_are_about_no_held_out_synonym(small: tuple[Any, Any]) -> None:
    _, data = small
    reserved = set(captions.unseen_synonyms())
    assert not reserved & set(data.nouns)
    # A held-out synonym is read only as a noun of WordNet, like any other.
    named = {
        word.replace("_", " ") for names, _ in language_packages.KINDS.values() for word in names
    }
    read = (
        {*language_packages.NOUNS}
        | named
        | {w for t in language_packages.SENTENCES.values() for w in t}
    )
    assert reserved & set(data.lines) == reserved & read
    own = {*icon_world.OBJECTS, *captions.more_objects()}
    own |= {s for others in captions.synonyms().values() for s in others} - reserved
    own |= {"poodle", "toy poodle", "domestic dog", "tabby"}
    assert set(data.nouns[: data.own]) == own and data.own == len(own)
    assert set(data.nouns[data.own :]) <= set(language_packages.NOUNS) | named
    assert len(set(data.nouns)) == len(data.nouns)


def test_each_text_has_its_vector(small: tuple[Any, Any], packages: Path, tmp_path: Path) -> None:
    _, data = small
    teacher = language.Teacher(packages, tmp_path)
    chosen = [0, len(data.lines) // 2, len(data.lines) - 1]
    expected = teacher.encode([data.lines[i] for i in chosen])
    assert torch.allclose(data.line_vectors[chosen], expected, atol=0.02)
    assert len(data.noun_vectors) == len(data.nouns) and len(data.line_vectors) == len(data.lines)
    assert torch.allclose(data.noun_vectors.norm(dim=1), torch.ones(len(data.nouns)), atol=1e-5)
    raw = teacher.encode(list(data.nouns))
    centred = F.normalize(raw - raw.mean(0), dim=1)
    assert F.cosine_similarity(centred, data.noun_vectors).min() > 0.9


def test_the_rows_of_whole_words_are_the_teachers_and_get_no_gradient(
    small: tuple[Any, Any],
) -> None:
    few, data = small
    vocabulary = few.get_vocab()
    known = data.rows.abs().sum(1) > 0
    assert known[vocabulary["the</w>"]] and not known[vocabulary["th"]]
    assert data.rows[known].std() == pytest.approx(0.03, rel=0.1)
    torch.manual_seed(0)
    model = text_tower.network(tiny_icons.TINY, few, data)
    weight = model["clip"].text_model.get_input_embeddings().weight.detach()
    assert torch.equal(weight[known], data.rows[known])
    assert not torch.allclose(weight[~known], torch.zeros(1))
    rng, scenes = np.random.default_rng(0), Scenes(icon_worlds.build())
    text_tower.draw_loss(model, few, scenes, data, rng, 4).backward()
    gradient = model["clip"].text_model.get_input_embeddings().weight.grad
    assert gradient[known].abs().max() == 0 and gradient[~known].abs().max() > 0


def test_the_loss_trains_the_tower_and_all_heads_and_is_repeatable(small: tuple[Any, Any]) -> None:
    few, data = small
    torch.manual_seed(0)
    model = text_tower.network(tiny_icons.TINY, few, data)
    scenes = Scenes(icon_worlds.build())
    first, second = (
        text_tower.draw_loss(model, few, scenes, data, np.random.default_rng(1), 3)
        for _ in range(2)
    )
    assert first.item() == second.item()
    first.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in without if "position" not in n] == []


def test_the_loss_falls_when_a_tiny_tower_is_trained(small: tuple[Any, Any]) -> None:
    few, data = small
    torch.manual_seed(0)
    model = text_tower.network(tiny_icons.TINY, few, data)
    scenes = Scenes(icon_worlds.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = text_tower.draw_loss(model, few, scenes, data, np.random.default_rng(1), 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_distance_is_smallest_at_the_target() -> None:
    target = torch.eye(3)
    best = text_tower._distance(target, target)
    # By hand: no distance; the choice among three cosines 1, 0, 0 at temperature 0.07.
    expected = 0.25 * np.log(1 + 2 * np.exp(-1 / 0.07))
    assert best.item() == pytest.approx(expected, abs=1e-6)
    assert text_tower._distance(target.roll(1, 0), target) > best + 4


def test_equal_targets_share_the_choice() -> None:
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # By hand: rows 0 and 1 put half on each twin, ln 2 each; row 2 is certain.
    expected = 0.25 * 2 / 3 * np.log(2)
    assert text_tower._distance(target, target).item() == pytest.approx(expected, abs=1e-5)


def test_equal_captions_share_the_contrastive_target() -> None:
    logits = torch.tensor([[20.0, 20.0, 0.0], [20.0, 20.0, 0.0], [0.0, 0.0, 20.0]])
    # By hand: rows 0 and 1 put half on each twin, ln 2 each; row 2 is certain.
    expected = 2 / 3 * np.log(2)
    loss = text_tower.contrast(logits, ["a", "a", "b"]).item()
    assert loss == pytest.approx(expected, abs=1e-5)


def test_pixels_are_between_minus_1_and_1() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[1, 2] = (255, 0, 51)
    tensor = text_tower.as_pixels([icon_world.Picture(pixels, "", "", "", "")])
    assert tensor.shape == (1, 3, 64, 64)
    assert tensor[0, :, 1, 2].tolist() == pytest.approx([1, -1, -0.6])
