"""Cost volumes against plain loops, windows against volumes."""

import pytest
import torch
from torch.nn import functional as F

from overpaint.match import correlation
from overpaint.match import flow as flows


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_volume_equals_a_loop():
    source, target = features(2, 5, 6, 7), features(2, 5, 4, 3, seed=1)
    volume = correlation.global_cost(source, target)
    assert volume.shape == (2, 4, 3, 6, 7)
    assert volume.abs().max() <= 1 + 1e-6
    for b, y, x, v, u in ((0, 0, 0, 0, 0), (1, 3, 2, 5, 6), (1, 2, 0, 1, 4), (0, 3, 1, 4, 2)):
        p, q = target[b, :, y, x].double(), source[b, :, v, u].double()
        assert volume[b, y, x, v, u] == pytest.approx(
            float(p @ q / (p.norm() * q.norm())), abs=1e-6
        )


def test_a_shift_gives_its_flow_without_cycle_error():
    source = features(1, 16, 6, 7)
    target = torch.roll(source, (1, -2), (2, 3))  # what was at (x, y) is now at (x - 2, y + 1)
    volume = correlation.global_cost(source, target)
    flow = correlation.initial_flow(volume)
    assert flow[0, :, 1:, :5].flatten(1).unique(dim=1).tolist() == [[2.0], [-1.0]]
    assert correlation.cycle_error(volume).max() == 0
    assert correlation.max_cosine(volume).min() > 1 - 1e-5


def test_the_cycle_error_worked_by_hand():
    volume = torch.zeros(1, 1, 4, 1, 4)  # target x, source x
    volume[0, 0, 0, 0, 1] = 0.5  # target 0 is most similar to source 1,
    volume[0, 0, 3, 0, 1] = 0.9  # which is most similar to target 3
    assert correlation.cycle_error(volume)[0, 0, 0, 0] == 3
    assert correlation.cycle_error(volume)[0, 0, 0, 3] == 0


def test_a_window_lists_offsets_row_by_row():
    volume = torch.zeros(1, 5, 5, 9, 9)
    volume[0, 2, 2, 5, 3] = 1  # from the centre one to the right and three down
    window = correlation.slice_cost(volume, torch.zeros(1, 2, 5, 5), radius=4)
    peak = int(window[0, :, 2, 2].argmax())
    assert peak == (3 + 4) * 9 + (1 + 4)
    assert window.sum() == 1


def test_a_window_equals_the_volume_at_whole_cells_and_is_zero_outside():
    volume = correlation.global_cost(features(2, 8, 6, 7), features(2, 8, 6, 7, seed=1))
    flow = torch.randint(-3, 4, (2, 2, 6, 7)).float()
    window = correlation.slice_cost(volume, flow, radius=2)
    for b, y, x, dy, dx in ((0, 0, 0, 0, 0), (1, 5, 6, -2, 1), (1, 3, 3, 2, 2), (0, 4, 1, -1, -2)):
        u, v = (int(n) for n in flow[b, :, y, x] + torch.tensor([x + dx, y + dy]))
        expected = volume[b, y, x, v, u] if 0 <= v < 6 and 0 <= u < 7 else torch.tensor(0.0)
        assert window[b, (dy + 2) * 5 + dx + 2, y, x] == expected
    away = correlation.slice_cost(volume, torch.full((2, 2, 6, 7), 20.0), radius=2)
    assert away.abs().max() == 0


def test_between_cells_a_window_equals_grid_sample():
    volume = correlation.global_cost(features(1, 8, 6, 7), features(1, 8, 6, 7, seed=1))
    flow = 3 * features(1, 2, 6, 7, seed=2)
    window = correlation.slice_cost(volume, flow, radius=1)
    for i, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
        place = flows.to_mapping(flow) + torch.tensor([dx, dy]).view(1, 2, 1, 1)
        grid = (2 * place + 1) / torch.tensor([7, 6]).view(1, 2, 1, 1) - 1
        slices = volume.view(42, 1, 6, 7)
        expected = F.grid_sample(
            slices, grid[0].flatten(1).T.view(42, 1, 1, 2), align_corners=False
        )
        assert (window[0, i].flatten() - expected.flatten()).abs().max() < 1e-5


def test_local_cost_equals_slice_cost():
    source, target = features(2, 12, 9, 8), features(2, 12, 6, 7, seed=1)
    flow = 4 * features(2, 2, 6, 7, seed=2)
    whole = correlation.slice_cost(correlation.global_cost(source, target), flow, radius=3)
    assert (correlation.local_cost(source, target, flow, radius=3) - whole).abs().max() < 1e-5
