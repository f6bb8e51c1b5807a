"""The verdict on a match: bounds, what takes the place of the spread, and photographs that do and do not match."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matchers import texture
from torch.nn import functional as F

from overpaint import match, zoo
from overpaint.match import verdict as verdicts
from overpaint.train import photographs, warps

SHIPPED = (zoo.folder("matcher") / "config.json").is_file()
needs_matcher = pytest.mark.skipif(not SHIPPED, reason="the matcher's weights are not there")


@pytest.fixture(scope="module")
def matcher():
    return match.Matcher.load()


def with_std(std, **fields):
    """Return a match with this uncertainty, of a source of 100x50 pixels."""
    height, width = std.shape
    inside = torch.ones(height, width, dtype=torch.bool)
    flow, warped = torch.zeros(2, height, width), torch.zeros(3, height, width)
    fields = {"protocol": {"source": (50, 100)}} | fields
    return match.Match(flow, std, warped, inside, **fields)


def with_share(share):
    """Return a match of which this share of a hundred pixels is just sure, the others just not."""
    std = torch.full((10, 10), verdicts.SURE * 100 * 1.01)
    std.view(-1)[: round(100 * share)] = verdicts.SURE * 100 * 0.99
    return with_std(std)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1, "matched"), (verdicts.MATCHED, "matched"), (verdicts.MATCHED - 0.01, "partly matched"),
        (verdicts.PARTLY, "partly matched"), (verdicts.PARTLY - 0.01, "not matched"), (0, "not matched"),
    ],
)  # fmt: skip
def test_the_verdict_depends_on_the_share_of_sure_pixels(share, expected):
    result = with_share(share)
    assert result.sure == pytest.approx(share)
    assert result.verdict == expected


def test_the_bound_is_relative_to_the_longer_side_of_the_source():
    result = with_share(0.5)
    larger = replace(result, std=3 * result.std, protocol={"source": (300, 150)})
    assert larger.sure == pytest.approx(0.5)
    assert replace(result, protocol={"source": (50, 98)}).sure == 0
    assert replace(result, protocol={"source": (50, 103)}).sure == 1


def test_the_there_and_back_distance_takes_the_place_of_a_spread_that_is_zero():
    none = with_std(torch.zeros(10, 10))
    assert (none.sure, none.verdict) == (None, "unknown")
    distance = with_share(0.3).std
    assert replace(none, consistency=distance).sure == pytest.approx(0.3)
    assert replace(with_share(1), consistency=distance).sure == 1


def test_a_verdict_is_described_with_its_share():
    assert verdicts.describe(0.934) == "matched: sure at 93 % of the picture"
    assert verdicts.describe(0.0) == "not matched: sure at 0 % of the picture"
    assert verdicts.describe(None) == "unknown: a single hypothesis has no spread"


@pytest.mark.parametrize(
    ("std", "line"),
    [(0.5, "Matched: sure at 100 % of the picture"), (9, "Not matched: sure at 0 % of the picture"),
     (0, "Unknown: a single hypothesis has no spread")],
)  # fmt: skip
def test_the_confidence_view_says_the_verdict_first(std, line):
    chart = with_std(torch.full((50, 100), float(std))).confidence(np.zeros((50, 100, 3)))
    assert chart.figure.axes[1].texts[0].get_text() == line


def test_a_picture_of_one_color_is_not_matched():
    small = match.Matcher.build(match.Config.smoke(), seed=1)
    result = match.dense(texture(60, 80), torch.zeros(3, 60, 80), matcher=small, samples=1)
    assert (result.sure, result.verdict) == (0, "not matched")


def changed(picture, kind):
    """Return a picture, (3, H, W), after a change that leaves nothing for the matcher to find."""
    if kind == "turned by 180 degrees":
        return picture.flip(1, 2)
    return picture.flip(2) if kind == "mirrored" else 1 - picture


@pytest.fixture(scope="module")
def astronaut():
    """A photograph that is held out of training, 192x192."""
    return photographs.read("skimage/astronaut.png", Path(), side=192).float() / 255


@needs_matcher
def test_a_shifted_photograph_is_matched(matcher, astronaut):
    a, b = astronaut[:, :160, :160], astronaut[:, 20:180, 12:172]
    spread = match.dense(a, b, matcher=matcher, samples=3)
    assert spread.verdict == "matched"
    assert spread.flow[:, 20:120, 20:120].flatten(1).median(1).values.tolist() == pytest.approx(
        [12, 20], abs=0.5
    )
    back = match.dense(a, b, matcher=matcher, samples=1, cycle=True)
    assert back.verdict == "matched"


@needs_matcher
@pytest.mark.parametrize("kind", ["turned by 180 degrees", "mirrored", "inverted"])
def test_a_photograph_that_the_matcher_cannot_match_is_not_matched(matcher, astronaut, kind):
    picture = astronaut[:, 20:180, 12:172]
    result = match.dense(picture, changed(picture, kind), matcher=matcher, samples=3)
    assert result.verdict == "not matched"


# Photographs that the bounds were not chosen on; they come with packages.
HELD_OUT = tuple(n for n in photographs.HELD_OUT if not n.startswith("opencv-doc"))
SAME = ("shifted", "zoomed in", "zoomed out", "warped")
OTHER = ("turned by 180 degrees", "mirrored", "inverted", "unrelated")


def photograph(index):
    """Return a photograph, (3, H, W) in [0, 1], with a shorter side of 400 pixels."""
    photo = photographs.read(HELD_OUT[index % len(HELD_OUT)], Path(), side=400)[None].float() / 255
    size = [round(n * 400 / min(photo.shape[2:])) for n in photo.shape[2:]]
    return F.interpolate(photo, size, mode="bilinear").clamp(0, 1)[0]


def pair(kind, index):
    """Return two pictures (3, 256, 256) of a kind."""
    rng = np.random.default_rng((index, (*SAME, *OTHER).index(kind)))
    photo = photograph(index)
    if kind == "warped":
        warped = warps.pair(photo, int(rng.integers(1 << 30)), "plain")
        return warped.source[0], warped.target[0]
    top, left = (int(rng.integers(50, n - 305)) for n in photo.shape[1:])
    picture = photo[:, top : top + 256, left : left + 256]
    if kind == "shifted":
        y, x = (
            at + 45 * int(sign)
            for at, sign in zip((top, left), rng.choice([-1, 1], 2), strict=True)
        )
        return picture, photo[:, y : y + 256, x : x + 256]
    if kind.startswith("zoomed"):
        edge = int(rng.integers(25, 50)) * (1 if kind == "zoomed in" else -1)
        part = photo[:, top + edge : top + 256 - edge, left + edge : left + 256 - edge]
        size = (256, 256)
        return picture, F.interpolate(part[None], size, mode="bilinear", antialias=True)[0].clamp(
            0, 1
        )
    if kind == "unrelated":
        return photograph(index + 1)[:, :256, :256], picture
    return picture, changed(picture, kind)


@pytest.mark.slow
@needs_matcher
def test_verdicts_on_photographs_that_the_bounds_were_not_chosen_on(matcher):
    """The figures of docs/guides/match.md: ten pairs of each kind, with eight hypotheses."""
    counts = {}
    for kind in (*SAME, *OTHER):
        results = [match.dense(*pair(kind, index), matcher=matcher) for index in range(10)]
        named = [result.verdict for result in results]
        counts[kind] = [named.count(v) for v in ("matched", "partly matched", "not matched")]
        print(kind, counts[kind], sorted(round(result.sure, 2) for result in results), flush=True)
    assert all(counts[kind][2] == 0 for kind in SAME)
    assert sum(counts[kind][0] for kind in SAME) >= 30
    assert all(counts[kind][2] == 10 for kind in OTHER)
