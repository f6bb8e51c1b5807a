"""Muon's orthogonalisation against the singular value decomposition."""

import pytest
import torch

from overpaint.train.muon import orthogonalise


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 10)])
def test_orthogonalise_is_close_to_the_polar_factor(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (result * (u @ v)).sum() / (result.norm() * (u @ v).norm()) > 0.97
