"""Corruption of prompts: positions, noise and its settings."""

import pytest
import torch

from overpaint.probes import Probe
from overpaint.trace import Noise
from overpaint.trace.corruption import corruptions
from overpaint.trace.text_encoder_trace import encode_restored

STYLE = Probe("a", "style", "a cat in openmoji style on a red background", "openmoji style")
CAT = Probe("b", "object", "a cat in noto style", "cat")


def corrupt(model, probe=STYLE, sigma=1.0):
    (corruption,), _ = corruptions(model, [probe], Noise(sigma=sigma))
    return corruption


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        (
            {"sigma": -1.0},
            "`sigma` must be a number from 0 on, or a factor such as '3std', got -1.0",
        ),
        ({"sigma": float("inf")}, "`sigma` must be a number from 0 on, .* got inf"),
        ({"sigma": "std"}, "a factor such as '3std', got 'std'"),
    ],
)
def test_noise_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Noise(**settings)


def test_corruption_changes_the_features_from_the_concept_on(tiny_double):
    corruption = corrupt(tiny_double)
    clean, corrupted = encode_restored(tiny_double.text_encoder, corruption, [])
    start = corruption.span.start
    assert torch.equal(clean[:start], corrupted[:start])
    assert ((clean[start:] - corrupted[start:]).norm(dim=1) > 1e-3).all()


def test_sigma_zero_changes_nothing(tiny_double):
    corruption = corrupt(tiny_double, sigma=0.0)
    clean, corrupted = encode_restored(tiny_double.text_encoder, corruption, [])
    assert torch.equal(clean, corrupted)


def test_the_second_control_puts_the_noise_on_as_many_other_words(tiny_sd1):
    corruption = corrupt(tiny_sd1)
    other = corruption.on_other_words()
    assert (corruption.span.start, corruption.span.end) == (4, 7)
    assert (other.span.start, other.span.end) == (1, 4)
    assert other.noise is corruption.noise
    whole = corrupt(tiny_sd1, Probe("c", "object", "cat", "cat"))
    assert whole.on_other_words() is None


def test_noise_depends_only_on_probe_and_sample(tiny_sd1):
    corruption, scale = corruptions(tiny_sd1, [STYLE, CAT], Noise(2, 0.5))
    again, _ = corruptions(tiny_sd1, [CAT], Noise(1, 0.5))
    assert scale == 0.5
    assert [m.sample for m in corruption] == [0, 1, 0, 1]
    assert torch.equal(corruption[2].noise, again[0].noise)
    assert not torch.equal(corruption[0].noise, corruption[1].noise)
    many, _ = corruptions(tiny_sd1, [STYLE], Noise(40, 0.5))
    assert torch.cat([m.noise for m in many]).std().item() == pytest.approx(0.5, rel=0.03)
    clean = [encode_restored(tiny_sd1.text_encoder, m, [])[0] for m in corruption[:2]]
    assert torch.equal(clean[0], clean[1])


def test_3std_is_three_standard_deviations_of_the_concepts_embeddings(tiny_sd1):
    _, scale = corruptions(tiny_sd1, [STYLE, CAT], Noise())
    ids = [
        tiny_sd1.tokenizer(text, add_special_tokens=False).input_ids
        for text in ("openmoji style", "cat")
    ]
    table = tiny_sd1.text_encoder.get_input_embeddings().weight
    assert scale == pytest.approx(3 * table[torch.tensor(sum(ids, []))].std().item(), rel=1e-6)
