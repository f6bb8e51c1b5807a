"""Diff-QuickFix with exactly preserved prompts, on a text encoder that is wider than a prompt is long."""

import numpy as np
import pytest
import scipy.linalg
import torch

from overpaint import edit
from overpaint.edit.captions import layer_inputs
from overpaint.edit.weights import find_weight
from overpaint.model import TextToImage

PAIRS = {"van gogh": "painting", "snoopy": "dog"}
PRESERVE = ["monet", ""]
EXACT = {"preserve": PRESERVE, "preserve_weight": "exact"}
SITE = "text.0.self_attn.out_proj"
WIDTH = 192


@pytest.fixture(scope="module")
def wide():
    """`tiny_sd1` with a text encoder of width 192 and two layers; its UNet is not called here."""
    from overpaint.zoo import builders

    pipe = builders.tiny(text_layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipe.text_encoder = builders._text_encoder(pipe.tokenizer, layers=2, width=WIDTH)
    return TextToImage(pipe, name="wide")


def inputs(model, prompts):
    return layer_inputs(model, SITE, model.tokenize(prompts)).flatten(0, 1).double()


@pytest.mark.parametrize(("frames", "count"), [(("",), 151), (("", "photo of ", "a "), 450)])
def test_the_movement_is_the_ridge_solution_in_scipys_null_space(wide, frames, count):
    """Fewer keys than columns are solved by the dual form, more by their sums."""
    change = edit.quickfix(wide, PAIRS, frames=frames, ridge=0.1, **EXACT)
    plain = edit.quickfix(wide, PAIRS, frames=frames, ridge=0.1)
    assert abs(len(change.keys) - count) < 10
    keys, residuals = plain.keys.double().numpy(), plain.movements[0].residuals.double().numpy()
    kept = inputs(wide, PRESERVE).numpy()
    null = scipy.linalg.null_space(kept, rcond=1e-6)
    assert 20 < null.shape[1] < WIDTH - 77
    x = keys @ null
    z = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ residuals).T
    expected = z @ null.T
    assert np.linalg.norm(change.delta.numpy() - expected) < 1e-4 * np.linalg.norm(expected)


def test_preserved_prompts_are_encoded_as_before_and_the_concept_is_not(wide):
    change = edit.quickfix(wide, PAIRS, **EXACT)
    kept, weight = inputs(wide, PRESERVE), find_weight(wide, SITE).parameter.detach().double()
    moved = (kept @ change.delta.T).norm(dim=1) / (kept @ weight.T).norm(dim=1)
    assert (
        float(moved.max()) < 3e-5
    )  # directions below a millionth of the largest are rounding errors of float32
    assert change.report["preserve_drift"] < 1e-5
    assert change.report["empty_prompt_drift"] < 1e-5
    soft = edit.quickfix(wide, PAIRS, preserve=PRESERVE, preserve_weight=1.0)
    assert soft.report["preserve_drift"] > 100 * change.report["preserve_drift"]
    before = wide.encode([*PRESERVE, "van gogh"])
    with change.applied(wide):
        after = wide.encode([*PRESERVE, "van gogh"])
    drift = (after - before).norm(dim=(1, 2)) / before.norm(dim=(1, 2))
    assert float(drift[:2].max()) < 2e-5 and float(drift[2]) > 0.05


def test_concepts_are_added_stacked_removed_and_saved(wide, tmp_path):
    joint = edit.quickfix(wide, PAIRS, **EXACT)
    parts = [edit.quickfix(wide, {old: new}, **EXACT) for old, new in PAIRS.items()]
    assert joint.protocol["preserve_weight"] == "exact"
    for added in (parts[0] + parts[1], parts[1] + parts[0], edit.stack(wide, parts)):
        assert float((added.delta - joint.delta).norm()) < 1e-6 * float(joint.delta.norm())
        assert added.protocol["preserve_weight"] == "exact"
    alone = edit.stack(wide, [joint], without=["snoopy"])
    assert float((alone.delta - parts[0].delta).norm()) < 1e-6 * float(alone.delta.norm())
    joint.save(tmp_path / "c.safetensors")
    loaded = edit.Change.load(tmp_path / "c.safetensors")
    assert loaded.digest == joint.digest
    assert edit.complete(wide, loaded).digest == joint.digest
    assert loaded.compact(rank=8).report["rank"] == 8
    for other in (
        edit.quickfix(wide, {"snoopy": "dog"}, preserve=["monet"], preserve_weight="exact"),
        edit.quickfix(wide, {"snoopy": "dog"}, preserve=["monet"]),
        edit.quickfix(wide, {"snoopy": "dog"}),
    ):
        for add in (lambda o=other: parts[0] + o, lambda o=other: edit.stack(wide, [parts[0], o])):
            with pytest.raises(ValueError, match="these changes differ in preserve"):
                add()


def test_half_precision_preserves_up_to_its_own_rounding(real_vocabulary):
    import overpaint

    half = overpaint.load(real_vocabulary("sd1"), dtype="float16")
    options = {"positions": "last_subject", "preserve_weight": "exact"}
    change = edit.quickfix(half, {"van gogh": "painting"}, preserve=[], **options)
    before = find_weight(half, SITE).parameter.detach().clone()
    with change.applied(half):
        assert find_weight(half, SITE).parameter.dtype == torch.float16
    assert torch.equal(find_weight(half, SITE).parameter, before)


def test_prompts_that_leave_no_direction_are_refused(tiny_sd1, wide):
    message = "leave no direction of {} in which 'van gogh' could be edited: preserve fewer"
    with pytest.raises(ValueError, match=message.format(64)):
        edit.quickfix(tiny_sd1, {"van gogh": "dog"}, preserve=["monet"], preserve_weight="exact")
    many = ["monet", "a cat", "tree house", "a red fish", "an apple on a beach"]
    with pytest.raises(ValueError, match=message.format(WIDTH)):
        edit.quickfix(wide, {"van gogh": "dog"}, preserve=many, preserve_weight="exact")
    with pytest.raises(
        ValueError, match="`preserve_weight` must be 0 or more and finite, got 'all'"
    ):
        edit.quickfix(wide, {"van gogh": "dog"}, preserve_weight="all")
