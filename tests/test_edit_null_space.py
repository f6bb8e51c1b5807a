"""Exact preservation against scipy's null space and as the limit of a growing preserve weight."""

import numpy as np
import pytest
import scipy.linalg
import torch

from overpaint.edit.least_squares import factorise, solve
from overpaint.edit.null_space import check_room, outside, span

WIDTH = 12


def draw(rows, *, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def test_the_complement_of_the_span_is_scipys_null_space():
    rows = torch.cat([draw(5), draw(5) @ torch.eye(WIDTH).double() * 3])  # rank 5 of 10 rows
    basis = span(rows)
    null = scipy.linalg.null_space(rows.numpy())
    assert basis.shape == (WIDTH, 5)
    assert np.allclose(np.eye(WIDTH) - (basis @ basis.T).numpy(), null @ null.T, atol=1e-12)
    keys = draw(3, seed=1)
    assert np.allclose(outside(keys, basis).numpy(), keys.numpy() @ null @ null.T, atol=1e-12)


def test_more_rows_than_a_block_span_the_same_as_all_of_them():
    rows = draw(5000) @ torch.diag(torch.arange(WIDTH, 0, -1.0)).double()
    values, vectors = np.linalg.eigh((rows.T @ rows).numpy())
    basis = span(rows, rank=4)
    top = vectors[:, -4:]
    assert np.allclose((basis @ basis.T).numpy(), top @ top.T, atol=1e-8)
    least = float(np.sqrt(values[-3] + values[-4]) / 2**0.5)
    assert span(rows, least=least).shape == (WIDTH, 3)


def test_directions_beside_a_basis_complete_it():
    first, rows = span(draw(3)), torch.cat([draw(3), draw(4, seed=1)])
    rest = span(rows, beside=first)
    both = torch.cat([first, rest], 1)
    assert rest.shape == (WIDTH, 4)
    assert torch.allclose(both.T @ both, torch.eye(7).double(), atol=1e-14)
    assert float(outside(rows, both).norm()) < 1e-13 * float(rows.norm())
    assert span(draw(3), beside=first).shape == (WIDTH, 0)
    assert span(draw(0)).shape == (WIDTH, 0)


def test_exact_preservation_is_the_limit_of_a_growing_preserve_weight():
    keys, kept, weight, targets = draw(4), draw(5, seed=1), draw(6, seed=2), draw(4, seed=3)[:, :6]
    rest = outside(keys, span(kept))
    exact = factorise(rest, ridge=0.3).solve(targets - keys @ weight.T).delta
    errors = [
        float((solve(keys, targets, weight=weight, ridge=0.3, preserve=kept, preserve_weight=a).delta - exact).norm())
        for a in (1e2, 1e4, 1e6)
    ]  # fmt: skip
    assert errors[2] < 2e-2 * errors[1] < 4e-4 * errors[0]
    assert float((kept @ exact.T).norm()) < 1e-13 * float((keys @ exact.T).norm())


def test_a_concept_without_a_direction_is_refused_by_name():
    kept = draw(5)
    keys = torch.cat([draw(2, seed=1), kept[:2] * 2])
    rest = outside(keys, span(kept))
    check_room(keys[:2], rest[:2], [0, 0], ["dog"])
    with pytest.raises(ValueError, match="leave no direction of 12 in which 'cat' could be edited"):
        check_room(keys, rest, [0, 0, 1, 1], ["dog", "cat"])
