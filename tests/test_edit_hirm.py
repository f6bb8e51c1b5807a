"""HiRM: the loss by hand, the first update from finite differences, and the states that come closer."""

import math

import pytest
import torch

from overpaint import edit
from overpaint.edit.captions import align_captions
from overpaint.edit.methods import hirm
from overpaint.edit.weights import find_weight
from overpaint.errors import UnknownSite
from overpaint.model.hooks import record_inputs

GOGH = {"van gogh": "painting"}
SITES = [f"0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["0.mlp.fc2"]


def last_states(model, ids, encoder=0):
    """Return the input of the final layer norm, which is the last layer's output; of the penultimate layer in SDXL."""
    tower = model.text_encoders[encoder]
    layers = [m for m in tower.modules() if hasattr(m, "self_attn")]
    norm = next(m for name, m in tower.named_modules() if name.endswith("final_layer_norm"))
    module = norm if len(model.text_encoders) == 1 else layers[-1].layer_norm1
    with torch.no_grad(), record_inputs(module) as inputs:
        tower(ids)
    return inputs[0]


def loss_by_hand(model, pairs, *, encoder=0):
    """Return the mean over tokens of the squared distance of states, with tokens aligned one by one."""
    total, count = 0.0, 0
    for pair in align_captions(
        model, pairs, ("",), "subject_to_end", encoder=("text", "text2")[encoder]
    ):
        old = last_states(model, pair.old.ids[None], encoder)[0].double()
        new = last_states(model, pair.new.ids[None], encoder)[0].double()
        places = dict(pair.positions)
        for place in range(len(old)):
            total += float((old[place] - new[places.get(place, place)]).square().sum())
            count += 1
    return total / count


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_the_loss_is_that_of_the_state_the_unet_reads(request, name):
    model = request.getfixturevalue(name)
    pairs = {"van gogh": "painting", "snoopy": ""}
    for encoder in range(len(model.text_encoders)):
        part = ("text", "text2")[encoder]
        change = edit.hirm(model, pairs, steps=1, encoder=part)
        expected = loss_by_hand(model, pairs, encoder=encoder)
        assert change.report["loss_before"] == pytest.approx(expected, rel=1e-5)
        assert list(change.sites) == [f"{part}.{site}" for site in SITES]


def test_the_first_update_follows_the_sign_of_finite_differences(tiny_shallow):
    """Adam's first step is the learning rate against the sign of each coordinate's gradient."""
    change = edit.hirm(tiny_shallow, GOGH, steps=1, lr=1e-4)
    planned = align_captions(tiny_shallow, GOGH, ("",), "subject_to_end")[0]
    news = last_states(tiny_shallow, planned.new.ids[None])[0]
    places = dict(planned.positions)
    target = torch.stack([news[places.get(p, p)] for p in range(len(news))])

    def loss():
        return float(
            (last_states(tiny_shallow, planned.old.ids[None])[0] - target).square().sum(1).mean()
        )

    count = 0
    for movement in change.movements:
        weight = find_weight(tiny_shallow, movement.site).parameter
        for row, column in ((0, 0), (3, 5), (17, 40)):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight[row, column] += sign * 1e-2
                    sides.append(loss())
                    weight[row, column] -= sign * 1e-2
            slope = (sides[0] - sides[1]) / 2e-2
            if abs(slope) > 1e-3:  # the states are float32
                count += 1
                step = float(movement.delta[row, column])
                assert step == pytest.approx(-math.copysign(1e-4, slope), rel=0.05)
    assert count >= 6


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_xl"])
def test_the_old_concept_is_encoded_more_like_the_new_one(request, name):
    model = request.getfixturevalue(name)
    progress = []
    change = edit.hirm(
        model, GOGH, steps=15, lr=1e-3, on_progress=lambda *call: progress.append(call)
    )
    count = len(model.text_encoders)
    assert progress == [(i + 1, 15 * count, "training") for i in range(15 * count)]
    old, new = model.encode(["van gogh"]), model.encode(["painting"])
    with change.applied(model):
        now = model.encode(["van gogh"])
    shift = (slice(None), slice(2, 3))  # the last token; "painting" is a token shorter
    target = new[:, 1:2]
    assert float((now[shift] - target).norm()) < 0.9 * float((old[shift] - target).norm())
    assert change.report["loss_after"] < 0.8 * change.report["loss_before"]


def test_a_random_direction_is_drawn_by_the_seed(tiny_sd1):
    first, again, other = (
        edit.hirm(tiny_sd1, GOGH, towards="random", steps=2, seed=seed) for seed in (3, 3, 4)
    )
    assert first.digest == again.digest != other.digest
    assert (
        first.protocol["scale"] == 500 and edit.hirm(tiny_sd1, GOGH, steps=1).protocol["scale"] == 1
    )
    # far from all states, the loss is about the squared length of the target
    assert first.report["loss_before"] == pytest.approx(500**2, rel=0.1)
    near = edit.hirm(tiny_sd1, GOGH, towards="random", scale=5.0, steps=2)
    assert near.report["loss_before"] < 0.01 * first.report["loss_before"]


def test_batches_of_captions_give_the_change_of_one_batch(tiny_sd1, monkeypatch):
    pairs, frames = {"van gogh": "painting", "snoopy": "dog"}, ("", "a photo of ", "art by ")
    options = {"frames": frames, "steps": 3, "lr": 1e-3}
    sizes = []
    states = hirm._Tower.states

    def counted(self, ids, tuned):
        sizes.append(len(ids))
        return states(self, ids, tuned)

    monkeypatch.setattr(hirm._Tower, "states", counted)
    whole = edit.hirm(tiny_sd1, pairs, **options)
    assert max(sizes) == 6
    monkeypatch.setattr(hirm, "_BATCH", 4)
    sizes.clear()
    parts = edit.hirm(tiny_sd1, pairs, **options)
    assert max(sizes) == 4 and len(sizes) == 2 * (
        2 + 3 + 1 + 1
    )  # before, new, updates, last loss, after
    assert parts.report["loss_after"] == pytest.approx(whole.report["loss_after"], rel=1e-5)
    for a, b in zip(parts.movements, whole.movements, strict=True):
        assert float((a.delta - b.delta).norm()) < 1e-3 * float(b.delta.norm())


def test_a_layer_that_the_unet_does_not_read_is_refused(tiny_xl):
    with pytest.raises(
        ValueError, match="no gradient reaches layer 1 of 'text': the UNet reads .* edit one of"
    ):
        edit.hirm(tiny_xl, GOGH, layer=1, encoder="text", steps=1)


def test_half_precision_is_trained_in_float32(copied):
    whole = edit.hirm(copied, GOGH, steps=2, lr=1e-3)
    copied.pipe.to(torch.float16)
    half = edit.hirm(copied, GOGH, steps=2, lr=1e-3)
    for a, b in zip(half.movements, whole.movements, strict=True):
        assert float((a.delta - b.delta).norm()) < 0.2 * float(b.delta.norm())
    with half.applied(copied):
        assert find_weight(copied, half.sites[0]).parameter.dtype == torch.float16


def test_a_training_that_diverges_and_bad_arguments_are_refused(copied):
    with pytest.raises(ValueError, match="the training diverged at update [0-9]+: lower `lr`"):
        edit.hirm(copied, GOGH, lr=1e30, steps=5)
    damaged = find_weight(copied, "text.3.self_attn.q_proj").parameter
    with torch.no_grad():
        damaged[0, 0] = math.nan
    with pytest.raises(ValueError, match="the training diverged at update 0: lower `lr`"):
        edit.hirm(copied, GOGH)
    for name, value, message in (
        ("steps", 0, "`steps` must be positive, got 0"),
        ("lr", 0.0, "`lr` must be positive, got 0.0"),
        ("scale", -1.0, "`scale` must be positive and finite, got -1.0"),
        ("towards", "nothing", "`towards` must be 'replacement' or 'random', got 'nothing'"),
        ("seed", -1, "`seed` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            edit.hirm(copied, GOGH, **{name: value})
    with pytest.raises(UnknownSite, match="`layer` must be 0 to 11 in 'text', got 12. Name one"):
        edit.hirm(copied, GOGH, layer=12)
    with pytest.raises(UnknownSite, match="unknown text encoder 'text2'"):
        edit.hirm(copied, GOGH, encoder="text2")
