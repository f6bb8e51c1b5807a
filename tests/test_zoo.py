import pytest
import torch

from overpaint import zoo
from overpaint.model.token_spans import find_span
from overpaint.zoo import builders

# Token counts of CLIP's vocabulary.
COUNTS = {
    "van gogh": 2, "monet": 1, "pablo picasso": 2, "greg rutkowski": 3, "johannes vermeer": 3,
    "r2d2": 4, "snoopy": 1, "nemo": 1, "grumpy cat": 2, "the british monarch": 3,
    "the president of the united states": 6, "joe biden": 2, "prince charles": 2,
}  # fmt: skip


def test_folders_and_names():
    assert zoo.folder("icons").parts[-3:] == ("zoo", "weights", "icons")
    assert all(zoo.folder(name).is_dir() for name in zoo.names())


@pytest.mark.parametrize(("concept", "count"), COUNTS.items())
def test_token_counts_agree_with_clip(concept, count):
    tokenizer = builders.clip_tokenizer()
    span = find_span(tokenizer, f"a photo of {concept}.", concept)
    tokens = tokenizer.tokenize(concept)
    assert len(span) == len(tokens) == count


def test_every_character_can_be_encoded():
    tokenizer = builders.clip_tokenizer()
    for text in ("zebra", "ünïcode ☕", "a-b_c 42!"):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]


def test_padding_of_the_two_layouts(tiny_sd1, tiny_sd2):
    first, second = (model.tokenize(["a cat"])[0].tolist() for model in (tiny_sd1, tiny_sd2))
    assert len(first) == len(second) == 77
    assert first[:4] == second[:4]
    assert set(first[3:]) == {tiny_sd1.tokenizer.eos_token_id}
    assert set(second[4:]) == {0}


def test_weights_depend_only_on_the_seed():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    pipes = [builders.tiny(text_layers=1, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [next(pipe.unet.parameters()) for pipe in pipes]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_layout_raises():
    with pytest.raises(ValueError, match="`layout` must be 'sd1', 'sd2' or 'sdxl', got 'xl'"):
        builders.tiny("xl")
