r"""How far a flow is from the truth, and whether its uncertainty knows.

Flows are (B, 2, H, W), in pixels; errors and deviations (B, 1, H, W) or (B, H, W); masks the same, True where a place
counts. Every function returns a number a pair, float64, shape (B,): NaN where no place counts.

Source: Ilg et al., 2018, https://arxiv.org/abs/1802.07095, section 4.3 (sparsification).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from overpaint.metrics import intervals

__all__ = ["ause", "epe", "pck", "spearman"]

Measure = Callable[[Tensor, Tensor], Tensor]


def epe(flow: Tensor, truth: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean distance between where `flow` and `truth` point to, in pixels (end-point error).

    Raises:
        ValueError: The shapes disagree.
    """
    return _each(_distance(flow, truth), None, valid, lambda error, _: error.mean())


def pck(flow: Tensor, truth: Tensor, pixels: float, valid: Tensor | None = None) -> Tensor:
    """Return the share of places that are at most `pixels` off, in [0, 1] (correct key points).

    Raises:
        ValueError: The shapes disagree.
    """
    return _each(
        _distance(flow, truth), None, valid, lambda error, _: (error <= pixels).double().mean()
    )


def spearman(std: Tensor, error: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the rank correlation of the uncertainty with the error, over the places of each pair, in [-1, 1].

    NaN where either is the same everywhere, for then there is no order to compare.

    Raises:
        ValueError: The shapes disagree.
    """

    def correlate(error: Tensor, std: Tensor) -> Tensor:
        return error.new_tensor(intervals.spearman(std.numpy(), error.numpy()))

    return _each(error, std, valid, correlate)


def ause(std: Tensor, error: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Return the area under the sparsification error; 0 for the best order there is.

    Leave out the places of greatest uncertainty, one after the other: :math:`s_k` is the mean error of the k places
    that remain, :math:`o_k` what it would be had the largest errors been left out. The area is the mean of
    :math:`(s_k - o_k) / s_n` over k; an uncertainty that knows nothing gets 1 less the mean of :math:`o_k / s_n`. Equal
    uncertainties stand in the order of the picture. 0 where there is no error.

    Raises:
        ValueError: The shapes disagree.
    """

    def area(error: Tensor, std: Tensor) -> Tensor:
        count = torch.arange(1, error.numel() + 1, dtype=torch.float64)
        ours = error[std.argsort(stable=True)].cumsum(0) / count
        best = error.sort().values.cumsum(0) / count
        whole = ours[-1]
        return ((ours - best).mean() / whole) if whole > 0 else whole

    return _each(error, std, valid, area)


def _distance(flow: Tensor, truth: Tensor) -> Tensor:
    if flow.shape != truth.shape or flow.ndim != 4 or flow.shape[1] != 2:
        raise ValueError(
            f"`flow` and `truth` must share a shape (B, 2, H, W), got {tuple(flow.shape)} and "
            f"{tuple(truth.shape)}: resize one to the other's grid."
        )
    return (flow.double() - truth.double()).norm(dim=1)


def _each(error: Tensor, std: Tensor | None, valid: Tensor | None, measure: Measure) -> Tensor:
    """Apply `measure` to the counted errors, and deviations, of each pair."""
    rows = error.detach().cpu().double().flatten(1)
    others = rows if std is None else std.detach().cpu().double().flatten(1)
    counted = torch.ones_like(rows, dtype=torch.bool)
    if valid is not None:
        counted = valid.detach().cpu().bool().flatten(1)
        counted = counted.expand(len(rows), -1)
    if rows.shape != others.shape or counted.shape != rows.shape:
        raise ValueError(
            f"errors, uncertainties and masks must cover the same places, got {tuple(rows.shape)}, "
            f"{tuple(others.shape)} and {tuple(counted.shape)}: resize them to one grid."
        )
    found = [
        measure(e[c], s[c]) if c.any() else e.new_tensor(torch.nan)
        for e, s, c in zip(rows, others, counted, strict=True)
    ]
    return torch.stack(found)
