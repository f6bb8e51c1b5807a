"""Regions, the warp to the fixed line and back, and pixels outside of a region, which stay bit for bit."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from overpaint.scene_text import Config, Lettering, rewrite
from overpaint.scene_text.geometry import blend, line_box, read_region, rectify, restore
from overpaint.scene_text.line import Line

LINE = Line(width=64)


@pytest.fixture(scope="module")
def model():
    built = Lettering.build(replace(Config.smoke(), fonts=("Roboto", "Lato-Bold")))
    torch.nn.init.normal_(
        built.network.unet.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    return built


@pytest.fixture(scope="module")
def picture():
    noise = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, (91, 133), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def turned(angle):
    """Return the corners of a box of 60x24 around (66, 45), turned by an angle in degrees."""
    turn = math.radians(angle)
    axes = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return np.array([[-30, -12], [30, -12], [30, 12], [-30, 12]]) @ axes + np.array([66, 45])


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("angle", [-30, 0, 15, 40])
def test_corners_are_put_in_the_order_of_the_reader(angle, shift):
    corners = turned(angle)
    for given in (np.roll(corners, shift, 0), np.roll(corners[::-1], shift, 0)):
        region = read_region(given, (91, 133))
        assert np.allclose(region.corners, corners) and region.size == pytest.approx((60, 24))


def test_boxes_polygons_and_masks_agree():
    box = read_region((10, 20, 40, 16), (91, 133))
    assert int(box.mask.sum()) == 40 * 16 and box.mask[20:36, 10:50].all()
    mask = torch.zeros(91, 133, dtype=torch.bool)
    mask[20:36, 10:50] = True
    from_mask = read_region(mask, (91, 133))
    assert torch.equal(from_mask.mask, mask) and np.allclose(from_mask.corners, box.corners)
    hexagon = [(10, 28), (20, 20), (40, 20), (50, 28), (40, 36), (20, 36)]
    inside = read_region(hexagon, (91, 133))
    assert (
        inside.mask[28, 15] and not inside.mask[21, 11] and np.allclose(inside.corners, box.corners)
    )
    half = read_region((-10, 20, 40, 16), (91, 133))
    assert int(half.mask.sum()) == 30 * 16 and half.corners[0, 0] == -10


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((10, 20, 0, 5), "must have a positive size, got 0x5"),
        ((500, 20, 10, 5), "outside of the picture of 133x91 pixels or empty"),
        (torch.zeros(91, 133, dtype=torch.bool), "`region` is an empty mask"),
        (torch.ones(90, 133, dtype=torch.bool), "must have the picture's size 133x91, got 133x90"),
        ((1, 2, 3), r"must be a box of 4 numbers.*got shape \(3,\)"),
        ((1, 2, math.nan, 4), "must hold finite numbers"),
        (["a", "b", "c", "d"], "must hold finite numbers"),
    ],
)
def test_regions_that_hold_no_line_are_refused(region, message, model, picture):
    with pytest.raises(ValueError, match=message):
        rewrite(picture, region, "red", model=model)


@pytest.mark.parametrize("angle", [0, 15, -30])
def test_a_line_returns_to_its_place(picture, angle):
    """A line that the network leaves as it is changes the picture by the warps alone: little on a smooth picture."""
    region = read_region(turned(angle), (91, 133))
    box = line_box(LINE, region.size)
    line = rectify(picture, region, LINE, box)
    assert line.shape == (1, 3, 32, 64)
    back = restore(line, region, LINE, box, (91, 133))
    error = (back - picture).abs()[:, region.mask]
    assert error.mean() < 0.02 and error.max() < 0.15


def test_the_line_shows_the_region_upright():
    """Left half of a turned region white, right half black."""
    corners = turned(25)
    canvas = torch.zeros(3, 91, 133)
    upper, lower = (corners[0] + corners[1]) / 2, (corners[2] + corners[3]) / 2
    left = read_region(np.stack([corners[0], upper, lower, corners[3]]), (91, 133))
    canvas[:, left.mask] = 1.0
    region = read_region(corners, (91, 133))
    box = line_box(LINE, region.size)
    line = rectify(canvas, region, LINE, box)[0, 0, LINE.top + 2 : LINE.bottom - 2]
    middle = (box[0] + box[1]) / 2
    assert line[:, round(box[0]) + 3 : int(middle) - 3].min() > 0.9
    assert line[:, int(middle) + 4 : round(box[1]) - 3].max() < 0.1


def test_wide_regions_are_squeezed_and_narrow_ones_widened_for_long_words():
    assert line_box(Line(), (60, 24)) == pytest.approx((31.5, 96.5))
    assert line_box(Line(), (1000, 24)) == pytest.approx((6, 122))
    assert line_box(Line(), (24, 24), natural=90) == pytest.approx((19, 109))


def test_blending_leaves_the_outside_and_grows_inside():
    image, other = torch.zeros(3, 20, 20), torch.ones(3, 20, 20)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[5:, 5:15] = True
    mixed = blend(image, other, mask, 3.0)[0]
    assert not mixed[~mask].any() and mixed[12, 10] == 1
    assert 0 < mixed[12, 5] < mixed[12, 6] < mixed[12, 7] < 1
    assert mixed[19, 10] == 1  # the border of the picture has no feather
    assert torch.equal(blend(image, other, mask, 0)[0], mask.float())


@pytest.mark.parametrize(
    "region",
    [
        (10, 20, 60, 24),
        (-10, 70, 60, 40),
        (0, 0, 133, 90),
        turned(15),
        turned(-30)[:3],
        (5, 5, 120, 6),
    ],
)
def test_pixels_outside_of_the_region_stay_bit_for_bit(model, picture, region):
    result = rewrite(picture, region, "red", model=model, steps=2)
    mask = read_region(region, (91, 133)).mask
    assert torch.equal(result[:, ~mask], picture[:, ~mask])
    assert not torch.equal(result[:, mask], picture[:, mask]) and torch.isfinite(result).all()
    assert result.min() >= 0 and result.max() <= 1


def test_half_precision_pictures_keep_their_type_and_outside(model, picture):
    half = picture.half()
    result = rewrite(half, (10, 20, 60, 24), "red", model=model, steps=1)
    assert result.dtype == torch.half and torch.equal(result[:, :20], half[:, :20])


def test_the_seed_the_word_and_the_style_decide(model, picture):
    def run(text="red", **options):
        return rewrite(picture, (10, 20, 60, 24), text, model=model, steps=2, **options)

    first = run()
    assert torch.equal(first, run()) and not torch.equal(first, run(seed=1))
    assert not torch.equal(first, run("der"))
    assert not torch.equal(first, run(color="red"))
    assert torch.equal(run(font="lato-bold"), run(font="Lato-Bold.ttf"))
    assert torch.equal(
        run(font="Roboto", color="red"),
        run(instruction='Write "red" in font: Roboto and color: red'),
    )


def test_moving_picture_and_region_together_moves_the_result(model, picture):
    large = F.pad(picture[None], (8, 8, 8, 8), mode="reflect")[0]
    first = rewrite(large, (30, 30, 60, 24), "red", model=model, steps=2)
    moved = rewrite(
        torch.roll(large, (8, 8), (1, 2)), (38, 38, 60, 24), "red", model=model, steps=2
    )
    assert torch.allclose(moved[:, 38:62, 38:98], first[:, 30:54, 30:90], atol=1e-4)


def test_unknown_fonts_are_answered_with_near_names_and_variants_are_allowed(model, picture):
    with pytest.raises(
        ValueError, match="unknown font 'Robbto': choose one of the model's fonts, such as Roboto"
    ):
        rewrite(picture, (10, 20, 60, 24), "red", model=model, font="Robbto")
    rewrite(picture, (10, 20, 60, 24), "red", model=model, font="Roboto-Italic", steps=1)
    rewrite(picture, (10, 20, 60, 24), "red", model=model, font="Roboto and lato-bold", steps=1)


def test_bad_input_is_refused_before_sampling(model, picture):
    box = (10, 20, 60, 24)
    with pytest.raises(ValueError, match="at least one visible character"):
        rewrite(picture, box, " ", model=model)
    with pytest.raises(ValueError, match="may have 8 characters"):
        rewrite(picture, box, "wizards!!", model=model)
    with pytest.raises(ValueError, match=r"`image` must have shape \(3, H, W\)"):
        rewrite(picture[:2], box, "red", model=model)
    with pytest.raises(ValueError, match="`instruction` replaces `font` and `color`"):
        rewrite(picture, box, "red", model=model, instruction="red", color="red")
    with pytest.raises(ValueError, match="no lettering model at 'nowhere'"):
        rewrite(picture, box, "red", model="nowhere")
