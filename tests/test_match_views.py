"""What a match looks like: colors by hand, arrows that point, a scale that tells, files that hold it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from overpaint.images.charts import DARK, LIGHT
from overpaint.match import Match, flow, legend, views

HEIGHT, WIDTH = 90, 120


def match(x=0.0, y=0.0, std=1.0):
    """A match of 120x90 that is the same everywhere."""
    field = torch.tensor([x, y]).view(2, 1, 1).expand(2, HEIGHT, WIDTH).clone()
    inside = flow.inside(field[None])[0, 0]
    return Match(field, torch.full((HEIGHT, WIDTH), std), torch.zeros(3, HEIGHT, WIDTH), inside)


def target(value=128):
    return np.full((HEIGHT, WIDTH, 3), value, dtype=np.uint8)


def pixels(image):
    return np.asarray(image, dtype=int)


def shown(image):
    """The part above the strip."""
    return pixels(image)[: 640 * HEIGHT // WIDTH]


@pytest.mark.parametrize(
    ("vector", "color"),
    [
        ((0, 0), (1, 1, 1)),
        ((4, 0), (1, 0, 0)),  # the ring begins with red, to the right
        ((2, 0), (1, 0.5, 0.5)),
        ((0, 4), (1, 13.5 / 15, 0)),  # a quarter of its 54 steps on, of which 15 lead from red to yellow
        ((-4, 0), (0, 1 - 2 / 11, 1)),  # half way: two steps of eleven from cyan to blue
        ((0, -4), (4.5 / 13, 0, 1)),  # three quarters: 4.5 steps of thirteen from blue to magenta
        ((9, 0), (1, 0, 0)),  # beyond the longest there is nothing stronger
    ],
)  # fmt: skip
def test_a_direction_has_its_color(vector, color):
    found = views.colors(np.array(vector, dtype=np.float32).reshape(2, 1, 1), 4)
    assert found[0, 0] == pytest.approx(color, abs=1e-5)


def test_the_wheel_view_shows_what_its_disc_says():
    """A flow of 10 to the right is as long as its scale says, and red; hatched only where it leaves the picture."""
    view = shown(views.wheel(match(x=10)))
    assert (view[:, : 640 * 108 // 120] == [255, 0, 0]).all()
    outside = view[:, 640 * 111 // 120 :].reshape(-1, 3)
    assert not (outside == [255, 0, 0]).all(1).any()
    assert len(np.unique(outside, axis=0)) == 2
    strip = pixels(views.wheel(match(x=10)))[480:]
    disc = strip[legend.PAD : -legend.PAD, legend.PAD : legend.PAD + 80]
    assert (abs(disc[40, 78] - [255, 0, 0]) < 40).all()
    assert (disc[40, 40] > 245).all()


@pytest.mark.parametrize(("x", "y"), [(6, 0), (-6, 0), (0, 6), (0, -6)])
def test_arrows_point_where_the_place_lies(x, y):
    """They begin at the places of a grid, are thicker at their heads, and are mirrored where the flow is."""
    view = shown(views.arrows(match(x, y), target()))
    drawn = abs(view - np.median(view.reshape(-1, 3), axis=0)).sum(-1) > 60
    profile = drawn.sum(0 if x else 1)
    gap, sign = 640 / 24, np.sign(x or y)
    starts = np.round((np.arange(6, 12) + 0.5) * gap).astype(int)
    tail, head = profile[starts + 4 * sign], profile[starts + round(0.8 * 32) * sign]
    assert tail.min() > 0  # 6 pixels of 120 are 32 of 640, longer than a gap and shorter than two
    assert head.min() > tail.max()
    other = shown(views.arrows(match(-x, -y), target()))
    turned = other[:, ::-1] if x else other[::-1]
    assert abs(turned - view).mean() < 1.5 < abs(other - view).mean()


@pytest.mark.parametrize(("moved", "words"), [(6, "1 times"), (60, "1/10 of"), (0.5, "10 times")])
def test_long_arrows_are_drawn_shorter_and_short_ones_longer(moved, words):
    """45 pixels are 1.7 gaps, the most: 6 are 32 of the view, 60 are 320, a half is 2.7."""
    field = np.full((2, 4, 4), moved * 640 / 120 / 2**0.5, dtype=np.float32)
    assert views._times(views._factor(field, np.ones((4, 4), bool), 640 / 24)) == words


def test_where_the_other_picture_ends_there_are_rings():
    """A flow of all of the width leaves it everywhere: no arrow is as large as a ring."""
    far = shown(views.arrows(match(x=200), target()))
    ink = abs(far - ImageColor.getrgb(LIGHT.text)).sum(-1) < 60
    rows, columns = np.nonzero(ink)
    gap = 640 / 24
    away = np.hypot((columns + 0.5) % gap - gap / 2, (rows + 0.5) % gap - gap / 2)
    assert len(away) > 24 * 18
    assert away.max() < gap / 6


def test_confidence_is_bright_where_the_hypotheses_agree():
    """A hundred times the spread is twice as far on the scale as ten times."""
    spread = torch.ones(HEIGHT, WIDTH)
    spread[:, 40:80], spread[:, 80:] = 10, 100
    view = shown(views.confidence(replace(match(), std=spread), target()))
    thirds = [view[240, at].sum() for at in (100, 320, 540)]
    assert thirds[0] > thirds[1] > thirds[2]
    scale = legend.Scale.of(spread.numpy())
    assert (scale.low, scale.high) == (1, 100)
    assert scale.ticks() == [1, 2, 5, 10, 20, 50, 100]
    found = scale.colors(np.array([0.5, 1, 10, 100, 900], dtype=np.float32), LIGHT)
    assert (found[0] == found[1]).all() and (found[3] == found[4]).all()
    assert found[2] == pytest.approx([0.127568, 0.566949, 0.550556], abs=0.02)  # viridis' middle


def test_one_hypothesis_is_not_shown_as_certain():
    view = shown(views.confidence(match(std=0), target()))
    assert (view == ImageColor.getrgb(LIGHT.control)).all()


def test_a_view_of_a_narrow_picture_has_room_for_its_words_on_either_paper():
    tall = replace(
        match(), flow=torch.zeros(2, 60, 20), std=torch.ones(60, 20), inside=torch.ones(60, 20) > 0
    )
    for theme in (LIGHT, DARK):
        view = views.wheel(tall, theme=theme)
        assert view.size == (640, 640 + 116)
        assert view.getpixel((5, 5)) == ImageColor.getrgb(theme.background)
        assert view.getpixel((320, 300)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 1), (1, 1), (1.2, 1.5), (37, 40), (81, 100), (0.07, 0.08)]
)
def test_scales_end_in_round_numbers(value, expected):
    assert legend.nice(value) == pytest.approx(expected)


def test_saving_keeps_the_flow_bit_for_bit(tmp_path):
    found = match(1.25, -3)
    found = replace(found, flow=found.flow + torch.rand(2, HEIGHT, WIDTH))
    written = views.save(found, target(), tmp_path / "new")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {p.name for p in written.values()}
    assert flow.read_flo(written["flo"])[0].equal(found.flow)
    assert (np.load(written["npy"]) == found.flow.numpy()).all()
    assert (np.load(written["std"]) == 1).all()
    with Image.open(written["warped"]) as warped:
        assert warped.size == (WIDTH, HEIGHT)
    assert Image.open(written["arrows"]).tobytes() == views.arrows(found, target()).tobytes()


def test_a_picture_that_was_not_matched_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`target` is 30x20 pixels, the flow 120x90: give the"):
        views.save(match(), np.zeros((20, 30)), tmp_path)
    assert list(tmp_path.iterdir()) == []
