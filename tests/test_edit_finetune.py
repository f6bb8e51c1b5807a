"""Fine-tuning on the tiny pipelines: the loss falls, the model is not modified, and bad arguments are refused."""

import copy
import math

import pytest
import torch

from overpaint import edit
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.model import TextToImage

GOGH = {"van gogh": "painting"}
QUICK = {"frames": ("",), "pictures": 1, "picture_steps": 1, "batch_size": 2, "layers": (0, 8)}


def bytes_of(model):
    return {name: fingerprint(p) for name, p in model.unet.named_parameters()}


def predicted(model, text):
    latents = model.initial_latents([5, 6])
    t = torch.tensor([300, 700])
    with torch.no_grad():
        return model.noise_pred(latents, t, model.encode([text, text]))


def test_the_old_concept_is_denoised_more_like_the_new_one(tiny_sd1):
    before = bytes_of(tiny_sd1)
    change = edit.finetune(tiny_sd1, GOGH, steps=8, lr=5e-4, **{**QUICK, "layers": None})
    assert bytes_of(tiny_sd1) == before
    new, old = predicted(tiny_sd1, "painting"), predicted(tiny_sd1, "van gogh")
    with change.applied(tiny_sd1):
        now = predicted(tiny_sd1, "van gogh")
    assert float((now - new).norm()) < 0.8 * float((old - new).norm())
    assert change.report["loss_after"] < change.report["loss_before"]


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_only_the_named_weights_move_and_they_are_restored(request, name):
    model = request.getfixturevalue(name)
    change = edit.finetune(model, GOGH, steps=1, preserve=["a dog"], **QUICK)
    assert change.sites == tuple(f"unet.cross_attn.{i}.to_{kv}" for i in (0, 8) for kv in "kv")
    before = bytes_of(model)
    with change.applied(model):
        after = bytes_of(model)
        assert sum(before[n] != after[n] for n in before) == 4
    assert bytes_of(model) == before


def test_the_first_update_of_adam_and_of_diffgrad(tiny_sd1):
    """Adam's first step is the learning rate in each coordinate, diffGrad's at least half of it and less than all."""
    steps = {}
    for kind in ("adam", "diffgrad"):
        change = edit.finetune(tiny_sd1, GOGH, steps=1, lr=1e-3, optimizer=kind, **QUICK)
        assert change.protocol["optimizer"] == kind
        steps[kind] = change.movements[1].delta
    assert torch.equal(steps["adam"].sign(), steps["diffgrad"].sign())
    ratio = (steps["diffgrad"] / steps["adam"])[steps["adam"].abs() > 9e-4]
    assert len(ratio) > 100 and float(ratio.min()) > 0.499 and float(ratio.max()) < 0.51


def test_equal_seeds_give_equal_changes_of_full_rank(tiny_sd1):
    first, again, other = (
        edit.finetune(tiny_sd1, GOGH, steps=2, seed=seed, **QUICK) for seed in (3, 3, 4)
    )
    assert first.digest == again.digest != other.digest
    for movement in first.movements:
        out, width = find_weight(tiny_sd1, movement.site).parameter.shape
        assert (movement.left.shape, movement.right.shape) == (
            ((out, out), (out, width)) if out <= width else ((out, width), (width, width))
        )


def test_progress_is_reported_and_sums_are_refused(tiny_sd1):
    progress = []
    change = edit.finetune(
        tiny_sd1, GOGH, steps=2, on_progress=lambda *call: progress.append(call), **QUICK
    )
    assert progress == [(1, 2, "fine-tuning"), (2, 2, "fine-tuning")]
    with pytest.raises(ValueError, match="only changes that were solved can be added"):
        change + change
    assert torch.equal((0.5 * change).movements[0].delta, change.movements[0].delta / 2)


def test_training_that_diverges_stops_and_the_model_is_not_modified(tiny_sd1):
    model = TextToImage(copy.deepcopy(tiny_sd1.pipe), name="copied")
    before = bytes_of(model)
    with pytest.raises(ValueError, match="training diverged at update .: lower `lr`"):
        edit.finetune(model, GOGH, steps=5, lr=1e30, **QUICK)
    assert bytes_of(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be positive, got 0. Leave it out"),
        ({"lr": math.nan}, "`lr` must be positive, got nan"),
        ({"pictures": 0}, "`pictures` must be positive"),
        ({"optimizer": "sgd"}, "`optimizer` must be 'adam' or 'diffgrad', got 'sgd'. Leave"),
    ],
)
def test_options_out_of_range_are_refused(tiny_sd1, options, message):
    with pytest.raises(ValueError, match=message):
        edit.finetune(tiny_sd1, GOGH, **options)


def test_texts_in_place_of_lists_are_refused(tiny_sd1):
    with pytest.raises(
        TypeError, match=r"`preserve` must be a list of texts, got .* write \['...'\]"
    ):
        edit.finetune(tiny_sd1, GOGH, preserve="a dog")
    with pytest.raises(ValueError, match="'van gogh' equals its target"):
        edit.finetune(tiny_sd1, {"van gogh": "Van Gogh"})
