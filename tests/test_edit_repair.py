"""The second step on the MLP: least squares of explicit forward passes, and operations on changes of two weights."""

import pytest
import torch

from overpaint import edit
from overpaint.edit import Change, stack, vocabulary
from overpaint.edit.caption_sums import background_captions, extended_pair, preserved_captions
from overpaint.edit.captions import align_captions
from overpaint.edit.weights import find_weight, text_layers

SMALL = {
    "collateral": False,
    "contexts": 32,
    "background": 160,
    "vocabulary": ["monet", "snoopy", "van dyck"],
}
GOGH, SNOOPY = {"van gogh": "painting"}, {"r2d2": "robot"}
SITES = ("text.0.self_attn.out_proj", "text.0.mlp.fc2")


@pytest.fixture(scope="module")
def change(tiny_shallow):
    return edit.auto(tiny_shallow, GOGH, **SMALL)


@pytest.fixture(scope="module")
def other(tiny_shallow):
    return edit.auto(tiny_shallow, SNOOPY, **SMALL)


def layer_pass(model, ids):
    """Return the inputs of layer 0's `fc2` and the outputs of the layer, from a whole forward pass with plain hooks."""
    block, seen = text_layers(model)[0], {}
    hooks = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, args: seen.update(keys=args[0])),
        block.register_forward_hook(
            lambda _, args, out: seen.update(out=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        model.text_encoder(ids)
    for hook in hooks:
        hook.remove()
    return seen["keys"].double(), seen["out"].double()


def first_alone(change):
    return Change(change.movements[:1], change.protocol, change.report)


def frames_of(model):
    others = sorted({*SMALL["vocabulary"], "painting"})
    words = vocabulary.fillers(model.tokenizer, without=["van gogh", "painting"])
    return tuple(
        vocabulary.frames(words, size=n, seed=i, among=others) for i, n in enumerate((32, 64))
    )


def positioned(model, frames):
    """Return the pairs of captions in `frames`, with their token ids (P, L) of old and new captions."""
    pairs = [
        extended_pair(pair, "van gogh", SMALL["vocabulary"])
        for pair in align_captions(model, GOGH, frames, "subject_to_end")
    ]
    return pairs, *(torch.stack([getattr(p, side).ids for p in pairs]) for side in ("old", "new"))


def test_the_second_step_is_the_least_squares_fit_of_explicit_passes(tiny_shallow, change):
    frames, fresh = frames_of(tiny_shallow)
    pairs, old_ids, new_ids = positioned(tiny_shallow, frames)
    terms = change.protocol["terms"]
    groups = preserved_captions(background_captions(tiny_shallow, terms[0]), terms, fresh)
    other_ids = [tiny_shallow.tokenize(captions) for captions, _ in groups]
    _, targets = layer_pass(tiny_shallow, new_ids)
    before = [layer_pass(tiny_shallow, ids)[1] for ids in other_ids]
    with first_alone(change).applied(tiny_shallow):
        old_keys, outputs = layer_pass(tiny_shallow, old_ids)
        after = [layer_pass(tiny_shallow, ids) for ids in other_ids]
    keys, residuals = [], []
    for i, pair in enumerate(pairs):
        for a, b in pair.positions:
            keys.append(old_keys[i, a] / 32**0.5)
            residuals.append((targets[i, b] - outputs[i, a]) / 32**0.5)
    for (captions, weight), old, (key, new) in zip(groups, before, after, strict=True):
        share = (weight / len(captions)) ** 0.5
        keys += list(key.flatten(0, 1) * share)
        residuals += list((old - new).flatten(0, 1) * share)
    k, r = torch.stack(keys), torch.stack(residuals)
    system = k.T @ k + change.ridge * torch.eye(k.shape[1])
    expected = torch.linalg.solve(system, k.T @ r).T
    delta = change.movements[1].delta
    assert (delta - expected).norm() <= 1e-3 * expected.norm()  # captions are read in float32


def test_the_report_equals_the_outputs_of_the_edited_layer(tiny_shallow, change):
    _, fresh = frames_of(tiny_shallow)
    pairs, old_ids, new_ids = positioned(tiny_shallow, fresh)
    term = {**change.protocol["terms"][0], "background": 256, "seed": 1}
    other_ids = tiny_shallow.tokenize(background_captions(tiny_shallow, term))
    (_, old), (_, new), (_, before) = (
        layer_pass(tiny_shallow, ids) for ids in (old_ids, new_ids, other_ids)
    )
    with change.applied(tiny_shallow):
        (_, edited), (_, after) = (layer_pass(tiny_shallow, ids) for ids in (old_ids, other_ids))
    missed = target = 0.0
    for i, pair in enumerate(pairs):
        a, b = (list(places) for places in zip(*pair.positions, strict=True))
        missed += float((new[i, b] - edited[i, a]).square().sum())
        target += float((new[i, b] - old[i, a]).square().sum())
    drift = float((after - before).square().sum()) / len(other_ids)
    assert change.report["layer_missed"] == pytest.approx(missed / target, rel=1e-3)
    assert change.report["layer_drift"] == pytest.approx(drift / (target / 64), rel=1e-3)


def test_the_second_step_misses_less_at_the_cost_of_little_drift(change):
    report = change.report
    gain = report["layer_missed_before_repair"] - report["layer_missed"]
    assert gain > 0.05
    assert report["layer_drift"] - report["layer_drift_before_repair"] < gain / 10


def test_both_weights_are_restored_bit_for_bit(tiny_shallow, change):
    before = [find_weight(tiny_shallow, site).parameter.detach().clone() for site in SITES]
    with change.applied(tiny_shallow):
        assert not any(
            torch.equal(find_weight(tiny_shallow, s).parameter, w)
            for s, w in zip(SITES, before, strict=True)
        )
    assert all(
        torch.equal(find_weight(tiny_shallow, s).parameter, w)
        for s, w in zip(SITES, before, strict=True)
    )


def test_sums_need_the_model(tiny_shallow, change, other):
    for refused in (
        lambda: change + other,
        lambda: stack(tiny_shallow, [change, other]).without("r2d2"),
    ):
        with pytest.raises(ValueError, match=r"depend on all its concepts.*edit\.stack\(model"):
            refused()
    both = stack(tiny_shallow, [change, other])
    assert both.digest == stack(tiny_shallow, [other, change]).digest
    assert both.pairs == GOGH | SNOOPY
    again = stack(tiny_shallow, [both], without=["r2d2"])
    assert again.digest == change.digest
    with pytest.raises(ValueError, match="only concept"):
        stack(tiny_shallow, [change], without=["van gogh"])


def test_half_a_change_moves_both_weights_half_as_far(change):
    half = change * 0.5
    for a, b in zip(half.movements, change.movements, strict=True):
        assert torch.allclose(a.delta, b.delta / 2)


def test_a_saved_change_is_completed_and_compacted_in_the_metric_of_its_keys(
    tiny_shallow, change, tmp_path
):
    change.save(tmp_path / "c.safetensors")
    loaded = Change.load(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"edit\.complete\(model"):
        loaded.compact()
    whole = edit.complete(tiny_shallow, loaded)
    for a, b in zip(whole.movements, change.movements, strict=True):
        assert a.gram is not None and b.gram is not None
        assert torch.allclose(a.gram, b.gram)
    cut, gram = whole.compact(rank=2, dtype=torch.float64).movements[1], change.movements[1].gram
    delta = change.movements[1].delta
    left, sizes, right = torch.linalg.svd(delta)
    plain = (left[:, :2] * sizes[:2]) @ right[:2]

    def error(moved):
        return float(((moved - delta) @ gram * (moved - delta)).sum())

    assert error(cut.delta) < error(plain)


def test_an_encoder_without_fc1_is_refused(tiny_shallow):
    block = text_layers(tiny_shallow)[0]
    fc1 = block.mlp.fc1
    del block.mlp.fc1
    try:
        with pytest.raises((ValueError, AttributeError, TypeError), match=r"fc1"):
            edit.auto(tiny_shallow, GOGH, **SMALL)
    finally:
        block.mlp.fc1 = fc1
