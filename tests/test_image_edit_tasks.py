"""Pasting, dragging, landmarks and appearance: results in both presets, the warp of points, and wrong input."""

import numpy as np
import pytest
import torch

from overpaint import image_edit
from overpaint.image_edit import sampler
from overpaint.image_edit.geometry import pixel_centres
from overpaint.image_edit.points import around, displacements, warp

PIXELS = image_edit.overpaint(diffusion=False)
YELLOW, RED, BLUE = (
    torch.tensor(c)[:, None, None] for c in ((0.9, 0.8, 0.5), (0.8, 0.1, 0.1), (0.1, 0.2, 0.8))
)


def scene(size=(48, 64), box=(12, 14, 30, 32), color=RED, ground=YELLOW):
    """Return a picture of a square with a dark stripe, and its mask."""
    picture = ground.expand(3, *size).clone()
    left, top, right, bottom = box
    picture[:, top:bottom, left:right] = color
    picture[:, top:bottom, left : left + 4] = color * 0.5
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return picture, mask


def settings(preset, **changes):
    return preset(**{"steps": 3, "size": 32} | changes)


# --- every task with every layout and preset --------------------------------------------------------------------------


def edits(model, preset):
    picture, mask = scene()
    other, other_mask = scene((70, 40), (8, 20, 28, 44), BLUE)
    options = {"settings": settings(preset)}
    yield image_edit.paste(model, picture, other, other_mask, (45, 20), 0.6, **options)
    yield image_edit.drag(model, picture, [(21, 23), (27, 25)], **options)
    yield image_edit.drag(model, picture, [(21, 23), (27, 25)], mask=mask, **options)
    yield image_edit.landmarks(
        model, picture, [(20, 20), (25, 26)], [(22, 20), (25, 29)], **options
    )
    yield image_edit.appearance(model, picture, mask, other, other_mask, **options)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("tiny_sd1", image_edit.published),
        ("tiny_sd2", image_edit.overpaint),
        ("tiny_xl", image_edit.overpaint),
    ],
)
def test_every_task_runs_and_leaves_the_stored_tensors_alone(name, preset, request, monkeypatch):
    model = request.getfixturevalue(name)
    picture, _ = scene()
    unchanged = []
    denoise = sampler._denoise

    def compared(state, latents, trajectory):
        stored = [t for step in state.bank.projections.values() for pair in step for t in pair]
        stored += list(trajectory.latents)
        before = [t.clone() for t in stored]
        result = denoise(state, latents, trajectory)
        unchanged.append(all(torch.equal(a, b) for a, b in zip(before, stored, strict=True)))
        return result

    monkeypatch.setattr(sampler, "_denoise", compared)
    for result in edits(model, preset):
        task = result.protocol["task"]
        assert result.picture.isfinite().all() and result.picture.shape == picture.shape, task
        assert any("energies" in entry for entry in result.log), task
        if preset is image_edit.overpaint:
            outside = ~result.masks["changed"]
            assert torch.equal(result.picture[:, outside], picture[:, outside]), task
    assert unchanged == [True] * 5
    assert not any(m._forward_hooks for m in model.unet.modules())


# --- pixels, without a model's drawing --------------------------------------------------------------------------------


def test_pasting_puts_the_object_at_the_position_with_its_size(tiny_sd1):
    picture, _ = scene((60, 80))
    other, mask = scene((70, 40), (8, 20, 28, 44), BLUE, ground=torch.full((3, 1, 1), 0.4))
    result = image_edit.paste(tiny_sd1, picture, other, mask, (55.5, 31.5), settings=PIXELS)
    inside = result.picture[
        :, 21:43, 47:65
    ]  # without the corners, where edit and ground mix a little
    assert torch.equal(inside, other[:, 21:43, 9:27])
    assert result.masks["target"].sum() > mask.sum() and result.log == () and result.latents is None
    small = image_edit.paste(tiny_sd1, picture, other, mask, (55, 31), 0.5, settings=PIXELS)
    blue = (small.picture[2] > small.picture[0] + 0.2).nonzero().double()
    assert len(blue) == pytest.approx(20 * 24 / 4, rel=0.25)
    assert blue.mean(0).tolist() == pytest.approx([31, 55], abs=1)


def test_a_pasted_object_at_the_border_is_clipped(tiny_sd1):
    picture, _ = scene((60, 80))
    other, mask = scene((70, 40), (8, 20, 28, 44), BLUE)
    result = image_edit.paste(tiny_sd1, picture, other, mask, (78, 30), settings=PIXELS)
    assert result.masks["target"][:, -1].any() and not result.masks["changed"][:, :60].any()
    with pytest.raises(ValueError, match="`position` .* moves the object out of the picture"):
        image_edit.paste(tiny_sd1, picture, other, mask, (200, 30), settings=PIXELS)


def test_a_warp_moves_the_points_and_nothing_outside_of_the_region():
    starts, ends = (
        torch.tensor([[30.0, 25.0], [50.0, 40.0]]).double(),
        torch.tensor([[38.0, 22.0], [50.0, 47.0]]).double(),
    )
    region = around(starts, ends, (64, 80))
    picture = torch.stack([pixel_centres(64, 80)[..., 0], pixel_centres(64, 80)[..., 1]])[None]
    warped, field = warp(picture, starts, ends, region)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        assert warped[0, :, int(end[1]), int(end[0])].tolist() == pytest.approx(start, abs=0.01)
    assert torch.equal(warped[..., ~region], picture[..., ~region])
    across = (warped[0, 0, :, 1:] - warped[0, 0, :, :-1])[:, 5:-5]
    assert across.min() > 0  # nothing folds over
    assert not displacements(starts, starts, region).any()


def test_a_dragged_edge_is_at_its_end(tiny_sd1):
    picture, _ = scene((128, 128), (30, 30, 90, 90))
    result = image_edit.drag(tiny_sd1, picture, [(90, 60), (98, 60)], settings=PIXELS)
    row = (result.picture[1, 60] < 0.45).nonzero().flatten()
    before = (picture[1, 60] < 0.45).nonzero().flatten()
    assert int(row.max() - before.max()) == pytest.approx(8, abs=1)


def test_appearance_takes_the_color_and_keeps_the_shape(tiny_sd1):
    picture, mask = scene()
    other, shown = scene((70, 40), (8, 20, 28, 44), BLUE)
    result = image_edit.appearance(tiny_sd1, picture, mask, other, shown, settings=PIXELS)
    inside = torch.nn.functional.max_pool2d((~mask).float()[None], 7, 1, 3)[0] == 0
    before, after = picture[:, inside].mean(1), result.picture[:, inside].mean(1)
    wanted = other[:, shown].mean(1)
    assert (after - wanted).norm() < 0.3 * (before - wanted).norm()
    assert torch.equal(result.picture[:, ~mask], picture[:, ~mask])


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(1, 2), (3, 4), (5, 6)], "a start and an end for each drag, got 3 points"),
        ([], "alternating start and end, got"),
        ([(1, 2, 3)], "alternating start and end"),
        ("1,2", "alternating start and end"),
        ([(1, 2), (3, float("nan"))], "alternating start and end"),
        (
            [(1, 2), (64, 4)],
            r"holds \(64.0, 4.0\), which is outside of the picture of 64x48 pixels",
        ),
        ([(-1, 2), (6, 4)], r"holds \(-1.0, 2.0\), which is outside"),
    ],
)
def test_wrong_points_are_refused(tiny_sd1, points, message):
    picture, _ = scene()
    with pytest.raises(ValueError, match=message):
        image_edit.drag(tiny_sd1, picture, points)


def test_points_may_be_pairs_or_arrays(tiny_sd1):
    picture, _ = scene()
    flat = [(21, 23), (27, 25)]
    results = [
        image_edit.drag(tiny_sd1, picture, points, settings=PIXELS).picture
        for points in (flat, [tuple(flat)], np.array(flat), torch.tensor(flat))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_dragging_by_nothing_is_the_identity(tiny_sd1):
    picture, _ = scene()
    result = image_edit.drag(tiny_sd1, picture, [(21, 23), (21, 23)], settings=PIXELS)
    assert torch.equal(result.picture, picture)
    drawn = image_edit.drag(
        tiny_sd1, picture, [(21, 23), (21, 23)], settings=settings(image_edit.published)
    )
    assert drawn.picture.isfinite().all()


def test_wrong_landmarks_are_refused(tiny_sd1):
    picture, _ = scene()
    one = [(20, 20), (25, 26)]
    with pytest.raises(
        ValueError, match="`target` holds no landmarks, as where no face was detected"
    ):
        image_edit.landmarks(tiny_sd1, picture, one, [])
    with pytest.raises(
        ValueError, match="`source` holds the landmarks of 2 faces: give those of one"
    ):
        image_edit.landmarks(tiny_sd1, picture, [one, one], one)
    with pytest.raises(ValueError, match="2 landmarks in `source` and 1 in `target`"):
        image_edit.landmarks(tiny_sd1, picture, one, one[:1])
    with pytest.raises(ValueError, match="`source` holds .* outside of the picture"):
        image_edit.landmarks(tiny_sd1, picture, [(20, 20), (25, 260)], one)


def test_one_reference_alone_is_taken(tiny_sd1):
    picture, mask = scene()
    with pytest.raises(
        ValueError, match="`reference` must be one picture, got 2: edit once for each"
    ):
        image_edit.paste(tiny_sd1, picture, [picture, picture], mask, (20, 20))
    with pytest.raises(ValueError, match="`reference` must be one picture, got 3"):
        image_edit.appearance(tiny_sd1, picture, mask, picture.expand(3, -1, -1, -1), mask)
    with pytest.raises(ValueError, match="`reference_mask` is empty"):
        image_edit.appearance(tiny_sd1, picture, mask, picture, mask & False)
