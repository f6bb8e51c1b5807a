"""Copies of a model that share its weights."""

import overpaint as op
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.model import hooks
from overpaint.studio.model_copy import copy_model


def test_a_copy_shares_every_weight_that_the_change_does_not_move(tiny_sd1, quickfix_change):
    change = quickfix_change
    before = fingerprint(find_weight(tiny_sd1, change.site).parameter)
    model_copy = copy_model(tiny_sd1, change)
    pairs = [
        (a, b)
        for name in ("text_encoder", "unet", "vae")
        for a, b in zip(
            getattr(tiny_sd1, name).parameters(),
            getattr(model_copy, name).parameters(),
            strict=True,
        )
    ]
    moved = [b for a, b in pairs if a.data_ptr() != b.data_ptr()]
    assert len(moved) == 1
    assert moved[0].shape == change.delta.shape
    assert fingerprint(find_weight(tiny_sd1, change.site).parameter) == before
    assert change.is_applied(model_copy) and not change.is_applied(tiny_sd1)
    with change.applied(tiny_sd1):
        expected = tiny_sd1.encode(["a cat in blob style"])
    assert model_copy.encode(["a cat in blob style"]).equal(expected)


def test_hooks_on_a_copy_do_not_run_when_the_original_draws(tiny_sd1):
    model_copy = copy_model(tiny_sd1, all_parts=True)
    with hooks.record(
        [model_copy.text_encoder, model_copy.unet, model_copy.vae.decoder]
    ) as outputs:
        tiny_sd1.generate("a cat", steps=1)
    assert outputs == [[], [], []]
    assert model_copy.generate("a cat", steps=1).images.equal(
        tiny_sd1.generate("a cat", steps=1).images
    )


def test_an_edit_of_the_unet_does_not_change_the_original_unet(tiny_sd1):
    change = op.edit.uce(tiny_sd1, {"blob style": "noto style"})
    before = tiny_sd1.generate("a cat in blob style", steps=1).images
    model_copy = copy_model(tiny_sd1, change)
    assert not model_copy.generate("a cat in blob style", steps=1).images.equal(before)
    assert tiny_sd1.generate("a cat in blob style", steps=1).images.equal(before)
