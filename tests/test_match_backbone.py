"""The backbones' features: invariances, strides, and the authors' figures."""

import pytest
import torch
from test_match_flow import graf  # noqa: F401
from torch.nn import functional as F

from overpaint.match import backbone, correlation
from overpaint.match import flow as flows


def test_a_picture_matches_itself_with_zero_flow():
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(image[:, :, ::4, ::4], (256, 256), mode="bicubic").clamp(0, 1)
    features = backbone.load()(image)[0]
    flow = correlation.initial_flow(correlation.global_cost(features, features))
    assert (flow.abs().sum(1) == 0).double().mean() > 0.99


def test_features_have_strides_8_and_4_and_ignore_brightness_and_contrast():
    module = backbone.load()
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    coarse, fine = module(image)
    assert coarse.shape == (1, 64, 8, 12)
    assert fine.shape == (1, 24, 16, 24)
    again = module(0.5 * image + 0.25)[0]
    assert (F.cosine_similarity(coarse, again, dim=1)).min() > 0.999
    grey = module(image.mean(1, keepdim=True))[0]
    assert (grey - coarse).abs().max() < 1e-4


def test_the_initial_flow_on_graf_has_the_error_of_the_authors_module(graf):  # noqa: F811
    views, both = graf
    module = backbone.load()
    features = [module(F.interpolate(v, (512, 512), mode="bilinear"))[0] for v in views]
    for source, target, flow, expected in ((0, 1, both[0], 23.4), (1, 0, both[1], 37.7)):
        cells = correlation.initial_flow(
            correlation.global_cost(features[source], features[target])
        )
        error = (flows.resize(cells, (640, 800)) - flow).norm(dim=1)
        assert error[flows.inside(flow)[:, 0]].mean() == pytest.approx(expected, abs=3)


def test_vgg_concatenates_four_maps_and_has_torchvisions_names():
    module = backbone.build("vgg16")
    assert isinstance(module, backbone.VGG)
    names = module.state_dict()
    assert names["features.0.weight"].shape == (64, 3, 3, 3)
    assert names["features.21.bias"].shape == (512,)
    assert sum(p.numel() for p in module.parameters()) == 7_635_264
    coarse, fine = module(torch.rand(1, 3, 64, 64))
    assert coarse.shape == (1, 1152, 8, 8)
    assert fine.shape == (1, 64, 32, 32)
    parts = coarse.split([512, 256, 256, 128], 1)
    for part in parts:
        assert part.norm(dim=1).mean() == pytest.approx(0.5, abs=1e-3)


def test_unknown_names_missing_files_and_wrong_sizes_raise(tmp_path):
    with pytest.raises(ValueError, match="unknown backbone 'dino': choose 'xfeat' or 'vgg16'"):
        backbone.build("dino")
    with pytest.raises(FileNotFoundError, match="no weights at .* give the path of a backbone"):
        backbone.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="multiples of 32, got 64x50: resize"):
        backbone.build()(torch.rand(1, 3, 64, 50))
    assert sum(p.numel() for p in backbone.build().parameters()) == 633_140
