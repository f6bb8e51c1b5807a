"""The repair by the MLP: the least squares of explicit forward passes, and what the change of two weights allows."""

import pytest
import torch

from overpaint import edit
from overpaint.edit import Change, stack, vocabulary
from overpaint.edit.caption_sums import background_captions, placed, spared
from overpaint.edit.captions import plan
from overpaint.edit.weights import text_layers, find_weight

SMALL = {
    "tokens": False,
    "contexts": 32,
    "background": 160,
    "vocabulary": ["monet", "snoopy", "van dyck"],
}
GOGH, SNOOPY = {"van gogh": "painting"}, {"r2d2": "robot"}
SITES = ("text.0.self_attn.out_proj", "text.0.mlp.fc2")


@pytest.fixture(scope="module")
def change(tiny_double):
    return edit.auto(tiny_double, GOGH, **SMALL)


@pytest.fixture(scope="module")
def other(tiny_double):
    return edit.auto(tiny_double, SNOOPY, **SMALL)


def whole_passes(model, ids):
    """Return what `fc2` of layer 0 reads and what the layer gives, from a whole forward pass with hooks of our own."""
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


def test_the_repair_is_the_least_squares_fit_of_whole_passes(tiny_double, change):
    frames, fresh = frames_of(tiny_double)
    keys, wanted = [], []
    for found in plan(tiny_double, GOGH, frames, "subject_to_end"):
        p = placed(found, "van gogh", SMALL["vocabulary"])
        _, target = whole_passes(tiny_double, p.new.ids[None])
        with first_alone(change).applied(tiny_double):
            key, now = whole_passes(tiny_double, p.old.ids[None])
        for a, b in p.positions:
            keys.append(key[0, a] / 32**0.5)
            wanted.append((target[0, b] - now[0, a]) / 32**0.5)
    for captions, weight in spared(tiny_double, change.protocol["terms"], fresh):
        share = (weight / len(captions)) ** 0.5
        ids = tiny_double.tokenize(captions)
        _, before = whole_passes(tiny_double, ids)
        with first_alone(change).applied(tiny_double):
            key, now = whole_passes(tiny_double, ids)
        keys += list(key.flatten(0, 1) * share)
        wanted += list((before - now).flatten(0, 1) * share)
    k, r = torch.stack(keys), torch.stack(wanted)
    system = k.T @ k + change.ridge * torch.eye(k.shape[1])
    delta = torch.linalg.solve(system, k.T @ r).T
    made = change.movements[1].delta
    assert (made - delta).norm() <= 1e-3 * delta.norm()  # read in float32


def test_it_reports_what_the_whole_edit_does_to_the_layer(tiny_double, change):
    _, fresh = frames_of(tiny_double)
    missed = asked = drift = 0.0
    for found in plan(tiny_double, GOGH, fresh, "subject_to_end"):
        p = placed(found, "van gogh", SMALL["vocabulary"])
        (_, old), (_, new) = (whole_passes(tiny_double, c.ids[None]) for c in (p.old, p.new))
        with change.applied(tiny_double):
            _, now = whole_passes(tiny_double, p.old.ids[None])
        missed += sum(float((new[0, b] - now[0, a]).square().sum()) for a, b in p.positions)
        asked += sum(float((new[0, b] - old[0, a]).square().sum()) for a, b in p.positions)
    term = {**change.protocol["terms"][0], "background": 256, "seed": 1}
    ids = tiny_double.tokenize(background_captions(tiny_double, term))
    _, before = whole_passes(tiny_double, ids)
    with change.applied(tiny_double):
        _, after = whole_passes(tiny_double, ids)
    drift = float((after - before).square().sum()) / len(ids)
    assert change.report["layer_missed"] == pytest.approx(missed / asked, rel=1e-3)
    assert change.report["layer_drift"] == pytest.approx(drift / (asked / 64), rel=1e-3)


def test_it_misses_less_and_pays_with_little_drift(change):
    told = change.report
    gained = told["layer_missed_before_repair"] - told["layer_missed"]
    assert gained > 0.05
    assert told["layer_drift"] - told["layer_drift_before_repair"] < gained / 10


def test_both_weights_return_bit_for_bit(tiny_double, change):
    before = [find_weight(tiny_double, site).parameter.detach().clone() for site in SITES]
    with change.applied(tiny_double):
        assert not any(
            torch.equal(find_weight(tiny_double, s).parameter, w)
            for s, w in zip(SITES, before, strict=True)
        )
    assert all(
        torch.equal(find_weight(tiny_double, s).parameter, w)
        for s, w in zip(SITES, before, strict=True)
    )


def test_it_is_added_and_taken_apart_through_the_model_only(tiny_double, change, other):
    for refused in (
        lambda: change + other,
        lambda: stack(tiny_double, [change, other]).without("r2d2"),
    ):
        with pytest.raises(ValueError, match=r"depends on all its concepts.*edit\.stack\(model"):
            refused()
    both = stack(tiny_double, [change, other])
    assert both.digest == stack(tiny_double, [other, change]).digest
    assert both.pairs == GOGH | SNOOPY
    again = stack(tiny_double, [both], without=["r2d2"])
    assert again.digest == change.digest
    with pytest.raises(ValueError, match="only concept"):
        stack(tiny_double, [change], without=["van gogh"])


def test_half_a_change_moves_both_weights_half_as_far(change):
    half = change * 0.5
    for a, b in zip(half.movements, change.movements, strict=True):
        assert torch.allclose(a.delta, b.delta / 2)


def test_a_saved_one_is_completed_and_cut_in_its_own_metric(tiny_double, change, tmp_path):
    change.save(tmp_path / "c.safetensors")
    loaded = Change.load(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"complete\(model\)"):
        loaded.compact()
    whole = edit.complete(tiny_double, loaded)
    for a, b in zip(whole.movements, change.movements, strict=True):
        assert a.gram is not None and b.gram is not None
        assert torch.allclose(a.gram, b.gram)
    cut, gram = whole.compact(rank=2, dtype=torch.float64).movements[1], change.movements[1].gram
    delta = change.movements[1].delta
    left, sizes, right = torch.linalg.svd(delta)
    plain = (left[:, :2] * sizes[:2]) @ right[:2]

    def harm(moved):
        return float(((moved - delta) @ gram * (moved - delta)).sum())

    assert harm(cut.delta) < harm(plain)


def test_an_encoder_without_such_an_mlp_is_refused(tiny_double):
    block = text_layers(tiny_double)[0]
    kept = block.mlp.fc1
    del block.mlp.fc1
    try:
        with pytest.raises((ValueError, AttributeError, TypeError), match=r"fc1"):
            edit.auto(tiny_double, GOGH, **SMALL)
    finally:
        block.mlp.fc1 = kept
