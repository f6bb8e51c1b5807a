"""Matchers on disk: what is saved loads, invalid folders raise."""

import json

import matchers
import pytest
import torch
from matchers import texture
from torch import nn

from overpaint import match
from overpaint.errors import UnsupportedModel


@pytest.fixture(scope="module")
def random_matcher():
    return matchers.build_random()


def test_a_saved_matcher_loads(random_matcher, tmp_path):
    random_matcher.save(tmp_path / "m")
    names = {"backbone.safetensors", "coarse.safetensors", "fine.safetensors", "config.json"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == names
    again = match.Matcher.load(tmp_path / "m")
    assert again.config == random_matcher.config
    a, b = texture(64, 64), texture(64, 64, seed=1)
    one, two = (
        match.dense(a, b, matcher=m, samples=1, refine=False)
        for m in (random_matcher, tmp_path / "m")
    )
    assert (one.flow - two.flow).abs().mean() < 0.05  # half precision
    assert two.protocol["matcher"] == str(tmp_path / "m")
    for name, tensor in random_matcher.backbone.state_dict().items():
        assert torch.equal(again.backbone.state_dict()[name], tensor)
    match.Matcher(random_matcher.backbone, random_matcher.coarse, None, random_matcher.config).save(
        tmp_path / "m"
    )
    assert match.Matcher.load(tmp_path / "m").fine is None


def test_a_matcher_on_vgg_saves_loads_and_matches(tmp_path):
    config = match.Config(
        image=128, grid=16, channels=(16, 32), sr_grid=64, sr_channels=(16, 32), steps=5,
        flow_scale=1.0, backbone="vgg16", hints=False, robust=False, align_corners=True,
    )  # fmt: skip
    match.Matcher.build(config).save(tmp_path)
    matcher = match.Matcher.load(tmp_path)
    assert matcher.config == config
    image = texture(128, 128)
    result = match.dense(image, image, matcher=matcher, samples=1, steps=1)
    assert result.flow[:, 24:-24, 24:-24].abs().max() < 1e-4


def test_folders_without_a_valid_matcher_raise(random_matcher, tmp_path):
    with pytest.raises(ValueError, match="unknown matcher 'nobody': name a folder, or 'matcher'"):
        match.Matcher.load("nobody")
    with pytest.raises(
        ValueError, match="has no config.json: install .* `overpaint train matcher`"
    ):
        match.Matcher.load(tmp_path)
    random_matcher.save(tmp_path)
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


def test_untrained_denoisers_have_a_zero_last_layer():
    matcher = matchers.build()
    assert isinstance(matcher.coarse.unet.conv_out, nn.Conv2d)
    assert torch.count_nonzero(matcher.coarse.unet.conv_out.weight) == 0
