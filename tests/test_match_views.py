"""Views of a match: colors worked by hand, arrows that point along the flow, color scales, and saved files."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from overpaint.images.charts import DARK, LIGHT
from overpaint.match import Match, flow, views

HEIGHT, WIDTH = 90, 120


def match(x=0.0, y=0.0, std=1.0):
    """Return a match of 120x90 with the same flow everywhere."""
    vectors = torch.tensor([x, y]).view(2, 1, 1).expand(2, HEIGHT, WIDTH).clone()
    inside = flow.inside(vectors[None])[0, 0]
    return Match(vectors, torch.full((HEIGHT, WIDTH), std), torch.zeros(3, HEIGHT, WIDTH), inside)


def target(value=128):
    return np.full((HEIGHT, WIDTH, 3), value, dtype=np.uint8)


def pixels(chart):
    """Return the pixels of a chart as it is saved."""
    with Image.open(io.BytesIO(chart.png())) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def picture(chart):
    """Return the pixels above the legend."""
    return pixels(chart)[: 640 * HEIGHT // WIDTH]


def rgb(color):
    return (np.array(to_rgb(color)) * 255).round().astype(int)


@pytest.mark.parametrize(
    ("vector", "color"),
    [
        ((0, 0), (1, 1, 1)),
        ((4, 0), (1, 0, 0)),  # the ring begins with red, to the right
        ((2, 0), (1, 0.5, 0.5)),
        ((0, 4), (1, 13.5 / 15, 0)),  # a quarter of its 54 steps on, of which 15 lead from red to yellow
        ((-4, 0), (0, 1 - 2 / 11, 1)),  # half way: two steps of eleven from cyan to blue
        ((0, -4), (4.5 / 13, 0, 1)),  # three quarters: 4.5 steps of thirteen from blue to magenta
        ((9, 0), (1, 0, 0)),  # beyond the longest the color stays
    ],
)  # fmt: skip
def test_the_color_of_a_direction(vector, color):
    colors = views.flow_colors(np.array(vector, dtype=np.float32).reshape(2, 1, 1), 4)
    assert colors[0, 0] == pytest.approx(color, abs=1e-5)


def test_the_wheel_view_has_the_colors_of_its_legend():
    """A flow of 10 to the right has the length of its scale, so it is pure red; hatched where it leaves the source."""
    image = pixels(match(x=10).wheel())
    view, legend = image[:480], image[480:]
    assert (view[:, : 640 * 108 // 120] == [255, 0, 0]).all()
    outside = view[:, 640 * 111 // 120 :].reshape(-1, 3)
    assert not (outside == [255, 0, 0]).all(1).any()
    assert len(np.unique(outside, axis=0)) == 2
    disc = legend[views.PAD : -views.PAD, views.PAD : views.PAD + 80]
    assert (abs(disc[40, 76] - [255, 0, 0]) < 40).all()
    assert (disc[40, 40] > 245).all()
    assert (disc[2, 2] == 255).all()  # outside of the round rim


@pytest.mark.parametrize(("x", "y"), [(6, 0), (-6, 0), (0, 6), (0, -6)])
def test_arrows_point_along_the_flow(x, y):
    """They start at the points of a grid, are thicker at their heads, and are mirrored if the flow is."""
    view = picture(match(x, y).arrows(target()))
    drawn = abs(view - np.median(view.reshape(-1, 3), axis=0)).sum(-1) > 60
    profile = drawn.sum(0 if x else 1)
    gap, sign = 640 / 24, np.sign(x or y)
    starts = np.round((np.arange(6, 12) + 0.5) * gap).astype(int)
    tail, head = profile[starts + 4 * sign], profile[starts + round(0.75 * 32) * sign]
    assert tail.min() > 0  # 6 pixels of 120 are 32 of 640, longer than a gap and shorter than two
    assert head.min() > tail.max()
    other = picture(match(-x, -y).arrows(target()))
    mirrored = other[:, ::-1] if x else other[::-1]
    assert abs(mirrored - view).mean() < 1.5 < abs(other - view).mean()


@pytest.mark.parametrize(("length", "text"), [(6, "1 times"), (60, "1/10 of"), (0.5, "10 times")])
def test_long_arrows_are_drawn_shorter_and_short_ones_longer(length, text):
    """45 pixels are 1.7 gaps, the limit: 6 are 32 of the view, 60 are 320, a half is 2.7."""
    vectors = np.full((2, 4, 4), length * 640 / 120 / 2**0.5, dtype=np.float32)
    factor = views._arrow_factor(vectors, np.ones((4, 4), bool), 640 / 24)
    assert views._factor_text(factor) == text


def test_rings_mark_where_the_flow_leaves_the_source():
    """A flow longer than the picture leaves it everywhere: there are rings around the grid's points and no arrows."""
    view = picture(match(x=200).arrows(target()))
    ink = abs(view - rgb(LIGHT.text)).sum(-1) < 60
    rows, columns = np.nonzero(ink)
    gap = 640 / 24
    away = np.hypot((columns + 0.5) % gap - gap / 2, (rows + 0.5) % gap - gap / 2)
    assert len(away) > 24 * 18
    assert away.max() < gap / 6


def test_confidence_is_bright_where_std_is_small():
    """On the logarithmic scale 100 is twice as far from 1 as 10."""
    std = torch.ones(HEIGHT, WIDTH)
    std[:, 40:80], std[:, 80:] = 10, 100
    view = picture(replace(match(), std=std).confidence(target()))
    thirds = [view[240, at].sum() for at in (100, 320, 540)]
    assert thirds[0] > thirds[1] > thirds[2]
    scale = views.scale(std.numpy())
    assert (scale.vmin, scale.vmax) == (1, 100)
    values = np.array([[0.5, 1, 10, 100, 900]], dtype=np.float32)
    colors = views._std_colors(values, scale, LIGHT)[0]
    assert (colors[0] == colors[1]).all() and (colors[3] == colors[4]).all()
    assert colors[2] == pytest.approx([0.127568, 0.566949, 0.550556], abs=0.02)  # viridis' middle


def test_the_color_bar_has_round_ticks():
    std = torch.logspace(0, 2, HEIGHT * WIDTH).view(HEIGHT, WIDTH)
    figure = replace(match(), std=std).confidence(target()).figure
    figure.canvas.draw()
    (bar,) = figure.axes[1].child_axes
    labels = [tick.get_text() for tick in bar.get_xticklabels() if tick.get_text()]
    assert [label for label in labels if 1 <= float(label) <= 100] == [
        "1",
        "2",
        "5",
        "10",
        "20",
        "50",
        "100",
    ]


def test_a_single_hypothesis_is_shown_grey_without_a_color_bar():
    chart = match(std=0).confidence(target())
    assert (picture(chart) == rgb(LIGHT.control)).all()
    assert chart.figure.axes[1].child_axes == []


def test_the_legend_of_a_narrow_picture_is_wider_than_it():
    tall = replace(
        match(), flow=torch.zeros(2, 60, 20), std=torch.ones(60, 20), inside=torch.ones(60, 20) > 0
    )
    for theme in (LIGHT, DARK):
        view = pixels(tall.wheel(theme=theme))
        assert view.shape == (640 + views.LEGEND, 640, 3)
        assert (view[5, 5] == rgb(theme.background)).all()
        assert (view[300, 320] == 255).all()


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 1), (1, 1), (1.2, 1.5), (37, 40), (81, 100), (0.07, 0.08)]
)
def test_scales_end_in_round_numbers(value, expected):
    assert views._round_up(value) == pytest.approx(expected)


def test_save_writes_the_flow_bit_for_bit(tmp_path):
    result = match(1.25, -3)
    result = replace(result, flow=result.flow + torch.rand(2, HEIGHT, WIDTH))
    paths = result.save(tmp_path / "new", target())
    assert {p.name for p in (tmp_path / "new").iterdir()} == {p.name for p in paths.values()}
    assert flow.read_flo(paths["flo"])[0].equal(result.flow)
    assert (np.load(paths["npy"]) == result.flow.numpy()).all()
    assert (np.load(paths["std"]) == 1).all()
    with Image.open(paths["warped"]) as warped:
        assert warped.size == (WIDTH, HEIGHT)
    with Image.open(paths["arrows"]) as view:
        assert (np.asarray(view)[..., :3] == pixels(result.arrows(target()))).all()


def test_a_target_of_another_size_raises(tmp_path):
    with pytest.raises(ValueError, match="`target` is 30x20 pixels, the flow 120x90: give the"):
        match().save(tmp_path, np.zeros((20, 30)))
    assert list(tmp_path.iterdir()) == []
