"""Masks, crops, shifts and scalings, cells and the filling of holes."""

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint.image_edit.fill import fill
from overpaint.image_edit.geometry import (
    Frame,
    Move,
    bounds,
    box_mask,
    cells,
    centroid,
    choose_frame,
    dilate,
    feathered,
    load_mask,
    moved_cells,
)


def rectangle(size, box):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


NOISE = torch.rand(1, 3, 24, 31, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offset", [(3, -2), (0, 0), (-7, 5), (30, 0)])
def test_whole_offsets_copy_pixels_exactly_and_never_wrap(offset):
    moved, inside = Move(offset).apply(NOISE)
    dx, dy = offset
    for y in range(24):
        for x in range(31):
            has_source = 0 <= y - dy < 24 and 0 <= x - dx < 31
            assert inside[y, x] == has_source
            expected = NOISE[0, :, y - dy, x - dx] if has_source else torch.zeros(3)
            assert torch.equal(moved[0, :, y, x], expected)


def test_an_offset_beyond_the_picture_leaves_nothing():
    moved, inside = Move((40, 0)).apply(NOISE)
    assert not inside.any() and not moved.any()


def test_half_a_pixel_is_the_mean_of_two():
    moved, inside = Move((0.5, 0.0)).apply(NOISE)
    assert torch.allclose(moved[0, :, 5, 6], (NOISE[0, :, 5, 5] + NOISE[0, :, 5, 6]) / 2, atol=1e-6)
    assert inside[:, 1:].all()


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
def test_scaling_keeps_the_centre_and_multiplies_the_area(scale):
    mask = rectangle((80, 90), (30, 30, 46, 46))
    move = Move((10, -6), scale, centroid(mask))
    target = move.apply(mask[None, None].float())[0][0, 0] > 0.5
    assert int(target.sum()) == pytest.approx(int(mask.sum()) * scale**2, rel=0.1)
    x, y = centroid(mask)
    assert centroid(target) == pytest.approx((x + 10, y - 6), abs=0.5)
    assert move.box(bounds(mask), (80, 90)) == pytest.approx(bounds(target), abs=1)


def test_reducing_averages_the_area():
    stripes = torch.zeros(1, 1, 32, 32)
    stripes[..., ::2] = 1
    small, inside = Move((0, 0), 0.5, (15.5, 15.5)).apply(stripes)
    assert (small[0, 0][inside] - 0.5).abs().max() < 0.26


def test_transposed_inputs_give_transposed_targets():
    mask = rectangle((48, 64), (5, 9, 20, 18))
    for grid in ((12, 16), (6, 8)):
        one, source = moved_cells(cells(mask, grid), Move((2.0, 1.0)))
        other, _ = moved_cells(cells(mask.T, grid[::-1]), Move((1.0, 2.0)))
        target = torch.zeros(grid, dtype=torch.bool)
        turned = torch.zeros(grid[::-1], dtype=torch.bool)
        target.view(-1)[one], turned.view(-1)[other] = True, True
        assert torch.equal(target, turned.T) and len(one) == len(source)


def test_cells_that_leave_the_grid_are_dropped():
    object_ = rectangle((6, 6), (3, 2, 6, 4))
    target, source = moved_cells(object_, Move((2.0, 0.0)))
    assert sorted(target.tolist()) == [2 * 6 + 5, 3 * 6 + 5]
    assert sorted(source.tolist()) == [2 * 6 + 3, 3 * 6 + 3]


@pytest.mark.parametrize("offset", range(-9, 10))
def test_moves_in_cells_have_no_bias_to_a_side(offset):
    mask = rectangle((64, 64), (24, 24, 40, 40))
    move, back = (Move((v / 4, 0.0), 1.0, (7.5, 7.5)) for v in (offset, -offset))
    there = moved_cells(cells(mask, (16, 16)), move)[0] % 16
    mirrored = 15 - moved_cells(cells(mask, (16, 16)), back)[0] % 16
    assert there.double().mean().item() == pytest.approx(7.5 + offset / 4, abs=0.501)
    assert abs(there.double().mean().item() - mirrored.double().mean().item()) <= 1


def test_small_objects_keep_a_cell():
    mask = rectangle((64, 64), (33, 17, 35, 19))
    chosen = cells(mask, (8, 8))
    assert chosen.nonzero().tolist() == [[2, 4]]
    assert not cells(torch.zeros(64, 64, dtype=torch.bool), (8, 8)).any()


def test_growing_and_feathering():
    mask = rectangle((20, 20), (8, 8, 12, 12))
    grown = dilate(mask, 2)
    assert grown[8, 6] and not grown[6, 6] and bounds(grown) == (6, 6, 14, 14)
    assert dilate(mask, 0) is mask
    weights = feathered(grown, 2)
    assert not weights[~grown].any() and (weights[mask] > 0.7).all()
    assert torch.equal(feathered(mask, 0), mask.float())
    assert (
        feathered(torch.ones(9, 9, dtype=torch.bool), 2).min() == 1
    )  # the picture's border is no seam


# --- crops ------------------------------------------------------------------------------------------------------------


def test_the_object_fills_half_of_the_crop_and_the_region_lies_inside():
    frame = choose_frame(
        (600, 900), (400, 300, 480, 380), object_side=80, size=512, unit=64, share=0.5
    )
    assert (frame.width, frame.height) == (160, 160) and frame.size == (512, 512)
    assert frame.left <= 400 and frame.left + frame.width >= 480
    wide = choose_frame(
        (600, 900), (100, 300, 480, 380), object_side=80, size=512, unit=64, share=0.5
    )
    assert wide.left < 100 and wide.left + wide.width > 480


def test_crops_stay_inside_of_the_picture():
    frame = choose_frame(
        (100, 300), (0, 60, 40, 100), object_side=40, size=128, unit=16, share=0.25
    )
    assert (frame.left, frame.top, frame.width, frame.height) == (0, 0, 160, 100)
    assert frame.size == (80, 128)
    whole = choose_frame(
        (100, 300), (0, 60, 40, 100), object_side=40, size=128, unit=16, share=None
    )
    assert (whole.left, whole.top, whole.width, whole.height) == (0, 0, 300, 100)


def test_entering_and_leaving_without_resizing_is_exact():
    frame = Frame(4, 3, 16, 16, (16, 16))
    crop = frame.crop(NOISE)
    assert torch.equal(frame.leave(frame.enter(crop)), crop)
    assert torch.equal(crop, NOISE[..., 3:19, 4:20])


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_of_every_kind_are_read_alike(tmp_path):
    mask = rectangle((24, 31), (5, 6, 12, 20))
    pixels = mask.numpy()
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    kinds = [
        mask, mask.float(), mask[None], mask.to(torch.uint8), pixels, pixels.astype(np.uint8) * 255, pixels * 0.9,
        pixels.astype(np.int64), Image.fromarray(pixels), tmp_path / "mask.png", str(tmp_path / "mask.png"),
    ]  # fmt: skip
    for kind in kinds:
        assert torch.equal(load_mask(kind, (24, 31)), mask), type(kind)


def test_bad_masks_are_refused_by_name():
    with pytest.raises(ValueError, match="`mask` is empty: mark the pixels"):
        load_mask(torch.zeros(24, 31, dtype=torch.bool), (24, 31))
    for wrong in (torch.ones(31, 24), np.ones((12, 31), bool), Image.new("1", (24, 31), 1)):
        with pytest.raises(ValueError, match="but the picture is 31x24: give one of the same size"):
            load_mask(wrong, (24, 31), "mask")
    with pytest.raises(TypeError, match="`mask` must be a path"):
        load_mask(3, (24, 31))


def test_boxes():
    assert torch.equal(box_mask((5, 6, 7, 14), (24, 31)), rectangle((24, 31), (5, 6, 12, 20)))
    assert torch.equal(box_mask((-4, 6, 7, 100), (24, 31)), rectangle((24, 31), (0, 6, 3, 24)))
    with pytest.raises(ValueError, match="holds no pixel of a picture of 31x24"):
        box_mask((40, 6, 7, 14), (24, 31))
    with pytest.raises(ValueError, match="must be four numbers x, y, width, height"):
        box_mask((40, 6, 7), (24, 31))


# --- holes ------------------------------------------------------------------------------------------------------------


def test_a_hole_in_a_plain_or_shaded_ground_is_filled_with_it():
    hole = rectangle((40, 40), (12, 14, 24, 27))
    ramp = torch.linspace(0.2, 0.8, 40).expand(1, 3, 40, 40).contiguous()
    for ground in (torch.full((1, 3, 40, 40), 0.6), ramp):
        picture = torch.where(hole, torch.rand(1, 3, 40, 40), ground)
        filled = fill(picture, hole)
        assert torch.equal(filled[..., ~hole], picture[..., ~hole])
        assert (filled - ground).abs().max() < 1e-4
    assert torch.equal(fill(NOISE, torch.ones(24, 31, dtype=torch.bool)), NOISE)


def test_a_filled_hole_stays_within_the_colors_around_it_also_at_the_border_of_the_picture():
    hole = rectangle((24, 31), (0, 0, 14, 11))
    filled = fill(NOISE, hole)
    around = dilate(hole, 2) & ~hole
    low, high = NOISE[0][:, around].amin(1), NOISE[0][:, around].amax(1)
    assert (filled[0][:, hole].amin(1) >= low - 1e-6).all()
    assert (filled[0][:, hole].amax(1) <= high + 1e-6).all()


def test_large_holes_are_filled_too():
    picture = torch.full((1, 3, 300, 300), 0.4)
    hole = rectangle((300, 300), (20, 20, 280, 280))
    picture[..., hole] = 1
    assert (fill(picture, hole) - 0.4).abs().max() < 0.01
