"""Cost volumes against plain loops, windows against volumes, and the features against the authors' figures."""

import math

import pytest
import torch
from test_match_flow import graf  # noqa: F401
from torch.nn import functional as F

from overpaint.match import backbone, correlation
from overpaint.match import flow as fields


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_volume_is_that_of_a_loop():
    source, target = features(2, 5, 6, 7), features(2, 5, 4, 3, seed=1)
    volume = correlation.global_cost(source, target)
    assert volume.shape == (2, 4, 3, 6, 7)
    assert volume.abs().max() <= 1 + 1e-6
    for b, y, x, v, u in ((0, 0, 0, 0, 0), (1, 3, 2, 5, 6), (1, 2, 0, 1, 4), (0, 3, 1, 4, 2)):
        p, q = target[b, :, y, x].double(), source[b, :, v, u].double()
        assert volume[b, y, x, v, u] == pytest.approx(
            float(p @ q / (p.norm() * q.norm())), abs=1e-6
        )


def test_best_places_are_found_and_lead_back():
    source = features(1, 16, 6, 7)
    target = torch.roll(source, (1, -2), (2, 3))  # what stood at (x, y) stands at (x - 2, y + 1)
    volume = correlation.global_cost(source, target)
    flow = correlation.initial_flow(volume)
    assert flow[0, :, 1:, :5].flatten(1).unique(dim=1).tolist() == [[2.0], [-1.0]]
    assert correlation.cycle_error(volume).max() == 0
    assert correlation.max_cosine(volume).min() > 1 - 1e-5


def test_the_cycle_error_is_the_way_home():
    volume = torch.zeros(1, 1, 4, 1, 4)  # target x, source x
    volume[0, 0, 0, 0, 1] = 0.5  # 0 likes 1,
    volume[0, 0, 3, 0, 1] = 0.9  # which likes 3
    assert correlation.cycle_error(volume)[0, 0, 0, 0] == 3
    assert correlation.cycle_error(volume)[0, 0, 0, 3] == 0


def test_a_window_lists_offsets_row_by_row():
    volume = torch.zeros(1, 5, 5, 9, 9)
    volume[0, 2, 2, 5, 3] = 1  # from the centre one to the right and three down
    window = correlation.slice_cost(volume, torch.zeros(1, 2, 5, 5), radius=4)
    peak = int(window[0, :, 2, 2].argmax())
    assert peak == (3 + 4) * 9 + (1 + 4)
    assert window.sum() == 1


def test_a_window_is_the_volume_at_whole_cells_and_nothing_outside():
    volume = correlation.global_cost(features(2, 8, 6, 7), features(2, 8, 6, 7, seed=1))
    flow = torch.randint(-3, 4, (2, 2, 6, 7)).float()
    window = correlation.slice_cost(volume, flow, radius=2)
    for b, y, x, dy, dx in ((0, 0, 0, 0, 0), (1, 5, 6, -2, 1), (1, 3, 3, 2, 2), (0, 4, 1, -1, -2)):
        u, v = (int(n) for n in flow[b, :, y, x] + torch.tensor([x + dx, y + dy]))
        wanted = volume[b, y, x, v, u] if 0 <= v < 6 and 0 <= u < 7 else torch.tensor(0.0)
        assert window[b, (dy + 2) * 5 + dx + 2, y, x] == wanted
    away = correlation.slice_cost(volume, torch.full((2, 2, 6, 7), 20.0), radius=2)
    assert away.abs().max() == 0


def test_between_cells_a_window_reads_as_grid_sample_does():
    volume = correlation.global_cost(features(1, 8, 6, 7), features(1, 8, 6, 7, seed=1))
    flow = 3 * features(1, 2, 6, 7, seed=2)
    window = correlation.slice_cost(volume, flow, radius=1)
    for i, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
        place = fields.to_mapping(flow) + torch.tensor([dx, dy]).view(1, 2, 1, 1)
        grid = (2 * place + 1) / torch.tensor([7, 6]).view(1, 2, 1, 1) - 1
        slices = volume.view(42, 1, 6, 7)
        wanted = F.grid_sample(slices, grid[0].flatten(1).T.view(42, 1, 1, 2), align_corners=False)
        assert (window[0, i].flatten() - wanted.flatten()).abs().max() < 1e-5


def test_a_window_without_the_volume_is_the_same():
    source, target = features(2, 12, 9, 8), features(2, 12, 6, 7, seed=1)
    flow = 4 * features(2, 2, 6, 7, seed=2)
    whole = correlation.slice_cost(correlation.global_cost(source, target), flow, radius=3)
    assert (correlation.local_cost(source, target, flow, radius=3) - whole).abs().max() < 1e-5


def test_a_picture_matches_itself():
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(image[:, :, ::4, ::4], (256, 256), mode="bicubic").clamp(0, 1)
    found = backbone.load()(image)[0]
    flow = correlation.initial_flow(correlation.global_cost(found, found))
    assert (flow.abs().sum(1) == 0).double().mean() > 0.99


def test_features_do_not_see_brightness_or_contrast_and_have_their_strides():
    module = backbone.load()
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    coarse, fine = module(image)
    assert coarse.shape == (1, 64, 8, 12)
    assert fine.shape == (1, 24, 16, 24)
    again = module(0.5 * image + 0.25)[0]
    assert (F.cosine_similarity(coarse, again, dim=1)).min() > 0.999
    grey = module(image.mean(1, keepdim=True))[0]
    assert (grey - coarse).abs().max() < 1e-4


def test_the_argmax_on_graf_is_what_was_measured_with_the_authors_module(graf):  # noqa: F811
    views, flows = graf
    module = backbone.load()
    found = [module(F.interpolate(v, (512, 512), mode="bilinear"))[0] for v in views]
    for source, target, flow, wanted in ((0, 1, flows[0], 23.4), (1, 0, flows[1], 37.7)):
        cells = correlation.initial_flow(correlation.global_cost(found[source], found[target]))
        error = (fields.resize(cells, (640, 800)) - flow).norm(dim=1)
        assert error[fields.inside(flow)[:, 0]].mean() == pytest.approx(wanted, abs=3)


def test_vgg_averages_four_cosines_and_takes_torchvisions_names():
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


def test_what_cannot_be_loaded_or_seen_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown backbone 'dino': choose 'xfeat' or 'vgg16'"):
        backbone.build("dino")
    with pytest.raises(FileNotFoundError, match="no weights at .* give the path of a backbone"):
        backbone.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="multiples of 32, got 64x50: resize"):
        backbone.build()(torch.rand(1, 3, 64, 50))
    assert math.isclose(sum(p.numel() for p in backbone.build().parameters()), 633_140)
