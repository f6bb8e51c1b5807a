"""Moving objects: positions, pixels outside of the edit, parts that are switched off, and wrong input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import overpaint as op
from overpaint import image_edit
from overpaint.errors import UnsupportedModel

FAST = {"steps": 2, "refinements": 0, "size": 32}


def scene(size=(64, 64), box=(12, 20, 28, 34), offset=(0, 0), ground=(0.9, 0.8, 0.5)):
    """Return a picture of a two-colored rectangle on a plain ground, (3, H, W), and its mask."""
    picture = torch.tensor(ground)[:, None, None].expand(3, *size).clone()
    mask = torch.zeros(size, dtype=torch.bool)
    left, top, right, bottom = (v + offset[i % 2] for i, v in enumerate(box))
    picture[:, top:bottom, left:right] = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    picture[:, top : (top + bottom) // 2, left:right] = torch.tensor([0.1, 0.2, 0.7])[:, None, None]
    mask[top:bottom, left:right] = True
    return picture, mask


@pytest.fixture(scope="module")
def icons():
    return op.load("icons")


@pytest.fixture(scope="module")
def moved(icons):
    picture, mask = scene((128, 128), (30, 40, 56, 64))
    settings = image_edit.overpaint(steps=8, refinements=1)
    return image_edit.move(icons, picture, mask, (17, -6), settings=settings, seed=3)


def hooks_of(model):
    return [m for m in model.unet.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_the_object_is_at_its_new_place_and_gone_from_the_old_one(moved):
    truth, mask = scene((128, 128), (30, 40, 56, 64), offset=(17, -6))
    target = moved.masks["target"]
    assert torch.equal(target & mask, mask)
    assert (moved.picture - truth)[:, mask].abs().mean() < 0.1
    empty = moved.masks["source"] & ~target
    assert (moved.picture - truth)[:, empty].abs().mean() < 0.02
    red = (moved.picture[0] - moved.picture[1] > 0.35).nonzero().double().mean(0)
    true_red = (truth[0] - truth[1] > 0.35).nonzero().double().mean(0)
    assert (red - true_red).abs().max() < 1


def test_pixels_outside_are_those_of_the_picture_bit_for_bit(moved):
    picture, _ = scene((128, 128), (30, 40, 56, 64))
    outside = ~moved.masks["changed"]
    assert torch.equal(moved.picture[:, outside], picture[:, outside])
    assert not torch.equal(moved.raw[:, outside], picture[:, outside])
    assert moved.picture.min() >= 0 and moved.picture.max() <= 1


def test_the_residual_and_the_composite_bring_the_result_closer_to_the_truth(moved):
    truth, _ = scene((128, 128), (30, 40, 56, 64), offset=(17, -6))
    error = (moved.picture - truth).square().mean()
    assert error < 0.6 * (moved.raw - truth).square().mean()
    assert (
        moved.pasted - truth
    ).square().mean() < 1e-5  # on a plain ground a copy in pixels is exact


def test_the_log_and_the_protocol_say_what_was_done(moved):
    assert [entry["step"] for entry in moved.log] == list(range(8))
    assert [entry["bank"] for entry in moved.log] == [False] + [True] * 7
    guided = ["energies" in entry for entry in moved.log]
    assert guided == [True] * 5 + [False] * 3
    assert all(entry["change_rms"] == pytest.approx(0.05) for entry in moved.log[:5])
    assert moved.protocol["task"] == "move" and moved.protocol["settings"]["steps"] == 8
    assert moved.protocol["bank_bytes"] > 0
    assert moved.latents.shape == moved.initial_latents.shape == (8, 16, 16)
    assert repr(moved).startswith("<Edited picture of 128x128 pixels (move)")


def test_it_is_saved(moved, tmp_path):
    paths = moved.save(tmp_path / "edit")
    assert sorted(p.name for p in (tmp_path / "edit").iterdir()) == sorted(
        p.name for p in paths.values()
    )
    saved = np.asarray(Image.open(paths["picture"]))
    assert np.array_equal(saved, np.asarray(moved.pil()))
    assert json.loads(paths["edit"].read_text())["seed"] == 3


def test_the_same_edit_twice_is_the_same_and_leaves_the_model_alone(tiny_sd2):
    picture, mask = scene((128, 128), (30, 40, 56, 64))
    before = [p.requires_grad for p in tiny_sd2.unet.parameters()]
    results = [
        image_edit.move(
            tiny_sd2, picture, mask, (5, 5), settings=image_edit.overpaint(**FAST), seed=s
        )
        for s in (0, 1)
    ]
    assert torch.equal(
        results[0].picture, results[1].picture
    )  # without noise the seed has no effect
    assert [p.requires_grad for p in tiny_sd2.unet.parameters()] == before
    assert all(p.grad is None for p in tiny_sd2.unet.parameters()) and not hooks_of(tiny_sd2)


def test_a_move_by_nothing_is_the_identity_up_to_the_last_digit(icons):
    picture, mask = scene((128, 128), (30, 40, 56, 64))
    result = image_edit.move(icons, picture, mask, (0, 0), settings=image_edit.overpaint(steps=5))
    assert result.picture.isfinite().all()
    assert (result.picture - picture).abs().mean() < 0.01
    assert torch.equal(result.masks["source"], result.masks["target"])


def test_resizing_multiplies_the_area(icons):
    picture, mask = scene((128, 128), (50, 50, 76, 76))
    for scale in (0.7, 1.4):
        result = image_edit.move(
            icons, picture, mask, (0, 0), scale, settings=image_edit.overpaint(steps=5)
        )
        object_ = (result.picture - torch.tensor([0.9, 0.8, 0.5])[:, None, None]).abs().amax(
            0
        ) > 0.25
        assert int(object_.sum()) == pytest.approx(26**2 * scale**2, rel=0.15)


def test_an_object_that_leaves_the_picture_is_clipped_and_not_wrapped(tiny_sd1):
    picture, mask = scene((128, 128), (90, 40, 116, 64))
    result = image_edit.move(
        tiny_sd1, picture, mask, (25, 0), settings=image_edit.overpaint(**FAST)
    )
    assert result.masks["target"][:, -1].any() and not result.masks["changed"][:, :80].any()
    with pytest.raises(ValueError, match="moves the object out of the picture, which is 128x128"):
        image_edit.move(tiny_sd1, picture, mask, (60, 0))


@pytest.mark.parametrize("size", [(90, 61), (40, 200), (300, 260)])
def test_pictures_of_any_size_and_kind_are_cropped_and_put_back(tiny_sd1, size):
    box = (10, 8, 26, 28)
    picture, mask = scene(size, box)
    pixels = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
    settings = image_edit.overpaint(**FAST)
    result = image_edit.move(tiny_sd1, pixels, mask.numpy(), (4, 6), settings=settings)
    assert result.pil().size == (size[1], size[0])
    left, top, right, bottom = result.box
    assert (
        right - left <= max(size)
        and result.masks["changed"][top:bottom, left:right].sum() == result.masks["changed"].sum()
    )
    outside = ~result.masks["changed"]
    original = torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1)
    final = torch.from_numpy(np.asarray(result.pil()).copy()).permute(2, 0, 1)
    assert torch.equal(final[:, outside], original[:, outside])


def test_a_masks_rim_shows_no_seam(icons):
    """On a shaded ground neighbouring pixels across the border of the edit differ hardly more than elsewhere."""
    ramp = torch.linspace(0.3, 0.8, 128).expand(3, 128, 128).clone()
    picture, mask = scene((128, 128), (30, 40, 56, 64))
    picture = torch.where(mask, picture, ramp)
    result = image_edit.move(icons, picture, mask, (20, 0), settings=image_edit.overpaint(steps=5))
    changed = result.masks["changed"]
    border = changed[:, 1:] != changed[:, :-1]
    steps = (result.picture[:, :, 1:] - result.picture[:, :, :-1]).abs().amax(0)
    assert steps[border].max() < 0.06


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("tiny_sd1", image_edit.overpaint),
        ("tiny_sd2", image_edit.published),
        ("tiny_xl", image_edit.published),
    ],
)
def test_every_layout_is_edited(name, preset, request):
    model = request.getfixturevalue(name)
    picture, mask = scene((48, 64))
    result = image_edit.move(
        model, picture, mask, (6, -3), settings=preset(steps=5, size=32), prompt="an apple"
    )
    assert result.picture.isfinite().all() and result.picture.shape == picture.shape
    assert not hooks_of(model)
    if preset is image_edit.published:
        assert any(e["noise"] for e in result.log) and max(e["repeats"] for e in result.log) == 3


@pytest.mark.slow
def test_the_published_preset_has_the_calls_of_the_release(tiny_sd1, monkeypatch):
    calls = {"single": 0, "double": 0}
    original = type(tiny_sd1).noise_pred

    def counted(self, latents, t, embeds):
        calls["double" if len(latents) == 2 else "single"] += 1
        return original(self, latents, t, embeds)

    monkeypatch.setattr(type(tiny_sd1), "noise_pred", counted)
    picture, mask = scene((32, 32), (8, 8, 20, 20))
    settings = image_edit.published(size=32)
    result = image_edit.move(tiny_sd1, picture, mask, (4, 0), settings=settings)
    travelled = [e["step"] for e in result.log if e["repeats"] > 1]
    guided = [e["step"] for e in result.log if "energies" in e]
    assert travelled == [22, 24, 26, 28]
    assert guided == [*range(10), *range(10, 30, 2)]
    assert [e["step"] for e in result.log if e["noise"]] == list(range(11, 20))
    assert [e["step"] for e in result.log if e["bank"]] == list(range(5, 50))
    assert calls["double"] == 58
    inversion, rollbacks, evaluations = (
        50,
        8,
        28,
    )  # the last are one pass without and one with gradients
    assert calls["single"] == inversion + rollbacks + 2 * evaluations


def test_each_part_can_be_switched_off(tiny_sd2):
    picture, mask = scene((32, 32), (8, 8, 20, 20))
    on = image_edit.overpaint(steps=3, size=32, refinements=0, sde=True, travel=True)
    base = image_edit.move(tiny_sd2, picture, mask, (6, 0), settings=on)
    for part in (
        "copy",
        "fill",
        "bank",
        "guidance",
        "regional",
        "sde",
        "travel",
        "residual",
        "composite",
    ):
        off = image_edit.overpaint(
            steps=3, size=32, refinements=0, **{"sde": True, "travel": True} | {part: False}
        )
        result = image_edit.move(tiny_sd2, picture, mask, (6, 0), settings=off)
        assert not torch.equal(result.picture, base.picture), part
    assert torch.equal(
        image_edit.move(tiny_sd2, picture, mask, (6, 0), settings=on).picture, base.picture
    )
    other = image_edit.move(tiny_sd2, picture, mask, (6, 0), settings=on, seed=1)
    assert not torch.equal(other.picture, base.picture)


def test_noise_outside_of_the_region_is_that_of_its_own_share(tiny_sd1):
    picture, mask = scene((32, 32), (8, 8, 20, 20))
    parts = {"guidance": False, "bank": False, "steps": 5, "size": 32, "sde_window": (0.8, 1.0)}
    quiet, loud = (
        image_edit.move(
            tiny_sd1, picture, mask, (6, 0), settings=image_edit.overpaint(sde=sde, **parts)
        )
        for sde in (False, True)
    )
    from overpaint.image_edit.geometry import cells

    region = cells(loud.masks["changed"], loud.latents.shape[-2:])
    assert torch.equal(loud.latents[:, ~region], quiet.latents[:, ~region])
    assert not torch.equal(loud.latents[:, region], quiet.latents[:, region])


def test_after_an_exception_no_hook_is_left(tiny_sd1):
    picture, mask = scene((32, 32), (8, 8, 20, 20))

    def stop(done, total, label):
        if label == "editing" and done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settings = image_edit.overpaint(steps=4, size=32)
        image_edit.move(tiny_sd1, picture, mask, (6, 0), settings=settings, on_progress=stop)
    assert not hooks_of(tiny_sd1)


def test_models_in_half_precision_store_half_and_compute_energies_in_float32(tiny_sd2):
    from overpaint.zoo import builders

    picture, mask = scene((32, 32), (8, 8, 20, 20))
    settings = image_edit.overpaint(steps=2, size=32)
    half = op.load(builders.tiny("sd2").to(torch.bfloat16))
    results = [
        image_edit.move(m, picture, mask, (6, 0), settings=settings) for m in (tiny_sd2, half)
    ]
    assert results[1].picture.isfinite().all() and results[1].latents.dtype == torch.float32
    assert results[0].protocol["bank_bytes"] == 2 * results[1].protocol["bank_bytes"]


def test_progress_is_reported_for_both_halves(tiny_sd1):
    picture, mask = scene((32, 32), (8, 8, 20, 20))
    calls = []
    settings = image_edit.overpaint(steps=3, size=32)
    image_edit.move(
        tiny_sd1, picture, mask, (6, 0), settings=settings, on_progress=lambda *c: calls.append(c)
    )
    assert calls == [(i + 1, 6, "inverting" if i < 3 else "editing") for i in range(6)]


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [(1,), (1, float("nan")), "3", (1, 2, 3), (True, 2)])
def test_wrong_offsets_are_refused(tiny_sd1, offset):
    picture, mask = scene((32, 32), (8, 8, 20, 20))
    with pytest.raises(ValueError, match="`offset` must be two numbers"):
        image_edit.move(tiny_sd1, picture, mask, offset)


@pytest.mark.parametrize("scale", [0, -1, float("inf"), 11, "2"])
def test_wrong_scales_are_refused(tiny_sd1, scale):
    picture, mask = scene((32, 32), (8, 8, 20, 20))
    with pytest.raises(ValueError, match="`scale` must be a number from 0.1 to 10"):
        image_edit.move(tiny_sd1, picture, mask, (0, 0), scale)


def test_wrong_masks_prompts_and_models_are_refused(tiny_sd1, real_vocabulary):
    picture, mask = scene((32, 32), (8, 8, 20, 20))
    with pytest.raises(ValueError, match="`mask` is empty"):
        image_edit.move(tiny_sd1, picture, torch.zeros_like(mask), (3, 0))
    with pytest.raises(ValueError, match="but the picture is 32x32"):
        image_edit.move(tiny_sd1, picture, mask[:20], (3, 0))
    with pytest.raises(TypeError, match="`prompt` must be one text"):
        image_edit.move(tiny_sd1, picture, mask, (3, 0), prompt=["a"])
    with pytest.raises(UnsupportedModel, match="cannot draw from a prompt alone"):
        image_edit.move(op.load(real_vocabulary("inpainting")), picture, mask, (3, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1}, "`steps` must be a whole number from 2 to 1000, got 1"),
        ({"refinements": 2.5}, "`refinements` must be a whole number from 0 to 10, got 2.5"),
        ({"crop": 2}, "`crop` must be a number from 0.05 to 1, got 2"),
        ({"update": "both"}, "`update` must be one of latents, x0, eps, got 'both'"),
        ({"sde_window": (0.6, 0.2)}, "`sde_window` must be two fractions of the steps in order"),
        ({"bank": 1}, "`bank` must be true or false, got 1"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        image_edit.overpaint(**changes)


def test_windows_are_fractions_of_the_steps_and_never_empty():
    from overpaint.image_edit.settings import window_steps

    assert window_steps((0.4, 0.6), 50, stride=True) == {20, 22, 24, 26, 28}
    assert window_steps((0.2, 0.4), 10) == {2, 3}
    assert window_steps((0.2, 0.4), 2) == {1}
    assert window_steps((0.0, 1.0), 7) == set(range(7))
    assert window_steps((0.5, 0.5), 7) == set()
