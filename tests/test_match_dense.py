"""Matching two pictures: what comes out, of anything that goes in, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from overpaint import match, zoo
from overpaint.errors import UnsupportedModel
from overpaint.images import read as reading
from overpaint.match import backbone
from overpaint.match import flow as fields
from overpaint.match.denoiser import Denoiser

STAGES = ("coarse", "fine")
SHIPPED = (zoo.folder("matcher") / "config.json").is_file()


def build():
    matcher = match.Matcher.build(match.Config.smoke(), seed=1)
    matcher.backbone.load_state_dict(backbone.load().state_dict())
    return matcher


@pytest.fixture(scope="module")
def matcher():
    """The shipped features, untrained denoisers: it answers with the most alike places."""
    return build()


@pytest.fixture(scope="module")
def rough():
    """With weights in the last layers, so that hypotheses differ."""
    matcher = build()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for part in (matcher.coarse, matcher.fine):
            part.unet.conv_out.weight.normal_(0, 0.05)
    return matcher


def texture(h, w, seed=0):
    """A picture (3, h, w) of blobs of a few sizes."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        F.interpolate(
            torch.rand(1, 3, h // s + 2, w // s + 2, generator=generator), (h, w), mode="bicubic"
        )
        for s in (4, 16)
    ]
    return torch.stack(parts).mean(0)[0].clamp(0, 1)


def middle(flow):
    """The median vector, away from the border."""
    return flow[:, 24:-24, 24:-24].flatten(1).median(1).values.tolist()


def test_a_picture_lies_where_it_is(matcher):
    image = texture(128, 128)
    found = match.dense(image, image, matcher=matcher, samples=2)
    assert found.flow.abs().max() < 1e-4
    assert (found.warped - image).abs().max() < 1e-3
    assert found.inside[1:-1, 1:-1].all()
    assert found.std.max() == 0
    assert found.consistency is None


def test_the_flow_is_on_b_and_points_into_a(matcher):
    whole = texture(160, 160)
    a, b = whole[:, :128, :128], whole[:, 8:136, 16:144]  # b shows at p what a has at p + (16, 8)
    found = match.dense(a, b, matcher=matcher, samples=1, cycle=True)
    assert middle(found.flow) == pytest.approx([16, 8], abs=0.5)
    assert (found.warped - b)[:, 32:-48, 32:-48].abs().mean() < 0.02
    assert found.consistency is not None
    assert found.consistency[32:-48, 32:-48].median() < 1


def test_sizes_may_differ_and_each_picture_counts_its_own_pixels(matcher):
    a = texture(128, 128)
    b = F.interpolate(a[None], (64, 96), mode="bilinear", antialias=True)[0]
    found = match.dense(a, b, matcher=matcher, samples=1, refine=False)
    assert found.flow.shape == (2, 64, 96)
    assert found.std.shape == found.inside.shape == (64, 96)
    assert found.warped.shape == (3, 64, 96)
    places = fields.to_mapping(found.flow[None])
    grid = fields.pixel_grid(64, 96)
    wanted = torch.stack([(grid[0, 0] + 0.5) * 128 / 96 - 0.5, (grid[0, 1] + 0.5) * 2 - 0.5])
    assert (places[0] - wanted).norm(dim=0).median() < 1e-3
    assert found.protocol["source"] == (128, 128)
    assert found.protocol["target"] == (64, 96)


@pytest.mark.parametrize("size", [(37, 53), (640, 800), (8, 300)])
def test_any_size_gives_a_flow_of_that_size(matcher, size):
    found = match.dense(texture(100, 90), texture(*size), matcher=matcher, samples=1, steps=1)
    assert found.flow.shape == (2, *size)
    assert torch.isfinite(found.flow).all()


def test_one_picture_in_any_form_gives_one_flow(matcher, tmp_path):
    image = texture(48, 40)
    rows = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(rows).save(tmp_path / "a.png")
    forms = [
        tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(rows), rows,
        rows.astype(np.float64) / 255, torch.from_numpy(rows).permute(2, 0, 1),
        torch.from_numpy(rows).permute(2, 0, 1)[None] / 255,
    ]  # fmt: skip
    read = [reading.picture(form, "image") for form in forms]
    assert all((other - read[0]).abs().max() < 1e-6 for other in read)
    assert read[0].shape == (1, 3, 48, 40)
    flows = [match.dense(f, image, matcher=matcher, samples=1, steps=1).flow for f in forms[:4]]
    assert all(torch.equal(flows[0], other) for other in flows)


def test_grey_is_spread_and_the_transparent_lies_on_white(tmp_path):
    grey = (texture(20, 30)[0] * 255).round().byte().numpy()
    wanted = torch.from_numpy(grey).expand(3, -1, -1) / 255
    for form in (grey, grey[..., None], Image.fromarray(grey)):
        assert torch.equal(reading.picture(form, "image")[0], wanted)
    assert torch.equal(reading.picture(grey > 127, "image")[0], (wanted > 0.5).float())
    clear = np.zeros((20, 30, 4), np.uint8)
    clear[:10, :, 3] = 255
    for form in (clear, Image.fromarray(clear)):
        found = reading.picture(form, "image")[0]
        assert found[:, :10].max() == 0
        assert found[:, 10:].min() == 1


def test_the_number_that_stands_for_white_is_that_of_the_kind(tmp_path):
    """Bytes end at 255, 16 bits at 65535 in either order of bytes, booleans and floats at 1."""
    grey = (texture(20, 30)[0] * 255).round().byte().numpy()
    wanted = torch.from_numpy(grey).expand(3, -1, -1) / 255
    deep = grey.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    share = (grey / 255).astype(np.float32)
    forms = [
        deep, deep.astype(">u2"), torch.from_numpy(deep), tmp_path / "deep.png", Image.fromarray(deep),
        Image.fromarray(deep.astype(np.int32)), share, share.astype(">f8"), Image.fromarray(share),
        torch.from_numpy(share)[None], grey[:, ::-1][:, ::-1],
    ]  # fmt: skip
    for form in forms:
        assert (reading.picture(form, "image")[0] - wanted).abs().max() < 1e-6
    half = torch.from_numpy(share).half()
    assert (reading.picture(half, "image")[0] - wanted).abs().max() < 1e-3


def test_a_camera_on_its_side_is_turned(tmp_path):
    rows = (texture(20, 30) * 255).round().byte().permute(1, 2, 0).numpy()
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(rows)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    turned.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(reading.picture(tmp_path / "a.png", "a"), reading.picture(rows, "a"))


def test_a_seed_decides_and_hypotheses_spread(rough):
    a, b = texture(64, 64), texture(64, 64, seed=1)
    first, again, other = (
        match.dense(a, b, matcher=rough, samples=3, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.flow, again.flow)
    assert torch.equal(first.std, again.std)
    assert (first.flow - other.flow).abs().max() > 0
    assert first.std.min() > 0
    assert match.dense(a, b, matcher=rough, samples=1).std.max() == 0


def test_the_spread_is_how_far_refined_hypotheses_lie_from_the_flow(rough):
    from overpaint.match import denoiser
    from overpaint.match.optical_flow import refined

    a, b = texture(128, 128), texture(128, 128, seed=1)
    found = match.dense(a, b, matcher=rough, samples=3)
    told = denoiser.coarse_conditions(rough.backbone, rough.config, a[None], b[None])
    squares = []
    for rows in denoiser.sample(rough.coarse, told, samples=3):
        own = F.interpolate(rows, (128, 128), mode="bilinear") * 128
        squares.append((refined(a[None], b[None], own) - found.flow) ** 2)
    wanted = torch.cat(squares).mean(0).sum(0).sqrt()
    assert (found.std - wanted).abs().max() < 1e-3


def test_the_spread_is_in_pixels_of_a_along_each_axis(rough, monkeypatch):
    import importlib

    from overpaint.match import denoiser

    for name in ("dense", "sizes"):
        module = importlib.import_module(f"overpaint.match.{name}")
        monkeypatch.setattr(module, "refined", lambda source, target, flow: flow.clone())
    a, b = texture(400, 700), texture(600, 300, seed=1)
    found = match.dense(a, b, matcher=rough, samples=3)
    side = rough.config.image
    small = (
        F.interpolate(x[None], (side, side), mode="bilinear", antialias=True).clamp(0, 1)
        for x in (a, b)
    )
    told = denoiser.coarse_conditions(rough.backbone, rough.config, *small)
    coarse = denoiser.sample(rough.coarse, told, samples=3)[:, 0]
    final = found.flow[None].clone()
    # Without the shift of one picture's pixels to the other's, over its sides, at most 256 pixels a side.
    for axis, (size, other) in enumerate(((700, 300), (400, 600))):
        own = torch.arange(other)
        shift = (own + 0.5) * size / other - 0.5 - own
        final[:, axis] -= shift if axis == 0 else shift[:, None]
        final[:, axis] /= size
    apart = F.interpolate(coarse, (256, 128), mode="bilinear") - F.interpolate(
        final, (256, 128), mode="bilinear"
    )
    squares = (apart * torch.tensor([700.0, 400.0]).view(1, 2, 1, 1)).square().sum(1).mean(0)
    wanted = F.interpolate(squares[None, None], (600, 300), mode="bilinear")[0, 0].sqrt()
    assert found.std.median() > 1
    assert (found.std - wanted).abs().max() < 0.01 * wanted.max()


def test_hypotheses_that_are_too_thin_to_refine_are_compared_as_they_are(rough):
    a, b = texture(20, 600), texture(22, 640, seed=1)
    found, plain = (match.dense(a, b, matcher=rough, samples=2, refine=r) for r in (True, False))
    assert torch.equal(found.std, plain.std)
    assert not torch.equal(found.flow, plain.flow)


def test_a_control_draws_nothing_and_has_no_spread(rough):
    config = replace(rough.config, diffusion=False)
    parts = [Denoiser(config, stage) for stage in STAGES]
    for part, other in zip(parts, (rough.coarse, rough.fine), strict=True):
        part.load_state_dict(other.state_dict())
    control = match.Matcher(rough.backbone, *parts, config)
    a, b = texture(64, 64), texture(64, 64, seed=1)
    assert match.dense(a, b, matcher=control, samples=3).std.max() == 0


def test_without_refinement_the_spread_is_that_of_both_stages_in_pixels(rough):
    from overpaint.match import denoiser

    a, b = texture(128, 128), texture(128, 128, seed=1)
    found = match.dense(a, b, matcher=rough, samples=4, refine=False)
    config, generator = rough.config, torch.Generator().manual_seed(0)
    told = denoiser.coarse_conditions(rough.backbone, config, a[None], b[None])
    coarse = denoiser.sample(rough.coarse, told, samples=4, generator=generator)
    told = denoiser.fine_conditions(rough.backbone, config, a[None], b[None], coarse.mean(0))
    fine = denoiser.sample(rough.fine, told, samples=4, generator=generator)
    flow = F.interpolate(fine.mean(0), (128, 128), mode="bilinear") * 128
    assert (found.flow - flow[0]).abs().max() < 1e-3
    total = fine.var(0) + F.interpolate(coarse.var(0), (32, 32), mode="bilinear")
    wanted = F.interpolate(total, (128, 128), mode="bilinear").sum(1).sqrt()[0] * 128
    assert (found.std - wanted).abs().max() < 1e-3


def test_without_the_fine_stage_the_coarse_flow_is_the_answer(matcher):
    a, b = texture(64, 64), texture(64, 64, seed=1)
    alone = match.Matcher(matcher.backbone, matcher.coarse, None, matcher.config)
    found = match.dense(a, b, matcher=alone, samples=1)
    assert found.flow.shape == (2, 64, 64)
    assert torch.isfinite(found.flow).all()


def test_progress_counts_stages(matcher):
    a, told = texture(64, 64), []
    match.dense(
        a,
        a,
        matcher=matcher,
        samples=1,
        reinit=2,
        cycle=True,
        on_progress=lambda *n: told.append(n),
    )
    assert told == [(i, 8) for i in range(1, 9)]


def test_starting_again_from_the_mean_keeps_what_is_settled(matcher):
    whole = texture(160, 160)
    a, b = whole[:, :128, :128], whole[:, 8:136, 16:144]
    once, twice = (match.dense(a, b, matcher=matcher, samples=1, reinit=n) for n in (0, 1))
    assert torch.equal(once.flow, twice.flow)


def test_one_color_gives_a_flow_that_nobody_should_trust(matcher):
    for a, b in (
        (torch.full((3, 60, 80), 0.5), texture(60, 80)),
        (texture(60, 80), torch.zeros(3, 60, 80)),
    ):
        found = match.dense(a, b, matcher=matcher, samples=2)
        assert torch.isfinite(found.flow).all()
        assert found.std.min() == pytest.approx(100 / 12**0.5)


def test_a_matcher_survives_its_folder(rough, tmp_path):
    rough.save(tmp_path / "m")
    names = {"backbone.safetensors", "coarse.safetensors", "fine.safetensors", "config.json"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == names
    again = match.Matcher.load(tmp_path / "m")
    assert again.config == rough.config
    a, b = texture(64, 64), texture(64, 64, seed=1)
    one, two = (
        match.dense(a, b, matcher=m, samples=1, refine=False) for m in (rough, tmp_path / "m")
    )
    assert (one.flow - two.flow).abs().mean() < 0.05  # half precision
    assert two.protocol["matcher"] == str(tmp_path / "m")
    for name, tensor in rough.backbone.state_dict().items():
        assert torch.equal(again.backbone.state_dict()[name], tensor)
    match.Matcher(rough.backbone, rough.coarse, None, rough.config).save(tmp_path / "m")
    assert match.Matcher.load(tmp_path / "m").fine is None


def test_the_papers_parts_match_and_survive_their_folder(tmp_path):
    config = match.Config(
        image=128, grid=16, channels=(16, 32), sr_grid=64, sr_channels=(16, 32), steps=5,
        flow_scale=1.0, backbone="vgg16", hints=False, robust=False, align_corners=True,
    )  # fmt: skip
    match.Matcher.build(config).save(tmp_path)
    matcher = match.Matcher.load(tmp_path)
    assert matcher.config == config
    image = texture(128, 128)
    found = match.dense(image, image, matcher=matcher, samples=1, steps=1)
    assert middle(found.flow) == pytest.approx([0, 0], abs=1e-4)


def test_folders_that_hold_no_matcher_are_refused(rough, tmp_path):
    with pytest.raises(ValueError, match="unknown matcher 'nobody': name a folder, or 'matcher'"):
        match.Matcher.load("nobody")
    with pytest.raises(
        ValueError, match="has no config.json: install .* `overpaint train matcher`"
    ):
        match.Matcher.load(tmp_path)
    rough.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "channels": [16, 48]}))
    with pytest.raises(UnsupportedModel, match="do not fit the configuration beside them"):
        match.Matcher.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(
        UnsupportedModel, match=r"unknown entries \['depth'\].* Save the matcher again"
    ):
        match.Matcher.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "coarse.safetensors").write_bytes(b"cut short")
    with pytest.raises(UnsupportedModel, match="do not fit the configuration"):
        match.Matcher.load(tmp_path)


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (torch.zeros(3, 1, 1), ValueError, "`image_a` is 1x1 pixels: it must be at least 8 a side"),
        (np.zeros((0, 0, 3), np.uint8), ValueError, "`image_a` is 0x0 pixels"),
        (torch.zeros(1).expand(3, 8000, 8000), ValueError, "has 64.0 megapixels, the limit is 60: make"),
        (Image.new("1", (10000, 6001)), ValueError, "has 60.0 megapixels, the limit is 60"),
        (torch.full((3, 9, 9), torch.nan), ValueError, "`image_a` holds values that are not finite"),
        (torch.full((3, 9, 9), 200.0), ValueError, r"must be in \[0, 1\], got 200 to 200: divide by 255"),
        (torch.zeros(2, 9, 9), ValueError, r"must have shape \(3, H, W\), .* got \(2, 9, 9\): give one"),
        (torch.zeros(4, 3, 9, 9), ValueError, r"got \(4, 3, 9, 9\): give one picture"),
        (np.zeros((9, 9, 5)), ValueError, r"must have shape \(H, W\), .* got \(9, 9, 5\)"),
        (np.zeros((9, 9), np.int64), ValueError, "must be bytes, unsigned 16-bit .*, got torch.int64: make it floats"),
        (torch.zeros(9, 9).short(), ValueError, "got torch.int16: make it floats, divided by the number"),
        (np.zeros((9, 9), "U3"), TypeError, "an array must hold numbers of at most 64 bits, got <U3: convert"),
        (7, TypeError, "must be a path, a PIL image, an array or a tensor, got int: convert"),
        ("/nowhere/a.png", ValueError, "there is no file '/nowhere/a.png': check the path"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(matcher, image, error, text):
    with pytest.raises(error, match=text):
        match.dense(image, texture(20, 20), matcher=matcher)


def test_files_that_hold_no_picture_are_refused(matcher, tmp_path):
    path = tmp_path / "a.png"
    path.write_text("not a picture")
    with pytest.raises(
        ValueError, match="`image_b`: cannot read .*a.png' as a picture: save it as PNG"
    ):
        match.dense(texture(20, 20), path, matcher=matcher)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot read"):
        match.dense(texture(20, 20), path, matcher=matcher)
    with pytest.raises(ValueError, match="cannot read"):
        match.dense(tmp_path, texture(20, 20), matcher=matcher)
    Image.new("1", (14000, 14000)).save(path)
    with pytest.raises(ValueError, match="larger than 60 megapixels: make it smaller"):
        match.dense(path, texture(20, 20), matcher=matcher)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM"])
def test_an_open_image_whose_file_ends_early_is_refused(kind, tmp_path):
    path = tmp_path / "a"
    rows = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    Image.fromarray(rows).save(path, kind)
    path.write_bytes(path.read_bytes()[:2000])
    with (
        Image.open(path) as image,
        pytest.raises(
            ValueError, match=r"`a`: the open image cannot be read to its end \(.+\): fetch"
        ),
    ):
        reading.picture(image, "a")


def test_arguments_out_of_range_are_refused(matcher):
    a = texture(20, 20)
    with pytest.raises(ValueError, match="`reinit` must be at least 0, got -1"):
        match.dense(a, a, matcher=matcher, reinit=-1)
    with pytest.raises(ValueError, match="`samples` must be at least 1, got 0"):
        match.dense(a, a, matcher=matcher, samples=0)
    with pytest.raises(ValueError, match="`steps` must be 1 to 5, got 9"):
        match.dense(a, a, matcher=matcher, steps=9)


@pytest.mark.skipif(not SHIPPED, reason="the matcher's weights are not there")
def test_the_shipped_one_leaves_a_picture_where_it_is():
    a = texture(320, 320)[:, 32:288, 32:288]
    same = match.dense(a, a, matcher=match.Matcher.load(), samples=4)
    assert same.flow.norm(dim=0).mean() < 0.5


@pytest.mark.skipif(not SHIPPED, reason="the matcher's weights are not there")
def test_the_shipped_one_comes_back():
    whole = texture(320, 320)
    grid = fields.pixel_grid(256, 256)
    centre = grid - 127.5
    places = torch.cat(
        [
            0.95 * centre[:, :1] - 0.2 * centre[:, 1:] + 160,
            0.2 * centre[:, :1] + centre[:, 1:] + 158,
        ],
        1,
    )
    a, b = whole[:, 32:288, 32:288], fields.warp(whole[None], places - grid)[0]
    found = match.dense(a, b, matcher=match.Matcher.load(), samples=4, cycle=True)
    assert found.consistency is not None
    assert found.consistency[found.inside].median() < 2


@pytest.mark.skipif(not SHIPPED, reason="the matcher's weights are not there")
def test_the_guide_tells_the_errors_of_the_card():
    figures = json.loads((zoo.folder("matcher") / "card.json").read_text())["figures"]
    names = ("coarse_given", "coarse_steps_5", "fine_steps_5")
    given, coarse, fine = (f"{figures[name]:.1f}" for name in names)
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "match.md").read_text()
    told = (
        f"off by {given} pixels in the mean, the coarse flow by {coarse} and the fine one by {fine}"
    )
    assert told in " ".join(guide.split())


def test_denoisers_start_at_nothing(matcher):
    assert isinstance(matcher.coarse.unet.conv_out, nn.Conv2d)
    assert torch.count_nonzero(matcher.coarse.unet.conv_out.weight) == 0
