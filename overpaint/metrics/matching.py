r"""Metrics of flow: its error, and the agreement of its predicted uncertainty with that error.

Flows are (B, 2, H, W), in pixels. Errors and standard deviations are (B, 1, H, W) or (B, H, W), and so are masks, which
are True at the pixels to use. Every function returns one number for each pair of pictures, float64, shape (B,): NaN if
no pixel is used.

Source: Ilg et al., 2018, https://arxiv.org/abs/1802.07095, section 4.3 (sparsification).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from overpaint.metrics import intervals

__all__ = ["ause", "epe", "pck", "spearman"]

Measure = Callable[[Tensor, Tensor], Tensor]


def epe(flow: Tensor, truth: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean end-point error: the distance between `flow` and `truth`, in pixels.

    Raises:
        ValueError: The shapes disagree.
    """
    return _each(_distance(flow, truth), None, valid, lambda error, _: error.mean())


def pck(flow: Tensor, truth: Tensor, pixels: float, valid: Tensor | None = None) -> Tensor:
    """Return the share of pixels with an end-point error of at most `pixels`, in [0, 1] (correct key points).

    Raises:
        ValueError: The shapes disagree.
    """
    return _each(
        _distance(flow, truth), None, valid, lambda error, _: (error <= pixels).double().mean()
    )


def spearman(std: Tensor, error: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the rank correlation of uncertainty and error over the pixels of each pair, in [-1, 1].

    NaN if either is constant.

    Raises:
        ValueError: The shapes disagree.
    """

    def correlate(error: Tensor, std: Tensor) -> Tensor:
        return error.new_tensor(intervals.spearman(std.numpy(), error.numpy()))

    return _each(error, std, valid, correlate)


def ause(std: Tensor, error: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Return the area under the sparsification error; 0 if the uncertainty orders the pixels as the error does.

    Remove the pixels of greatest uncertainty, one after the other: :math:`s_k` is the mean error of the k pixels that
    remain, and :math:`o_k` their mean error if the pixels of greatest error were removed instead. The area is the mean
    of :math:`(s_k - o_k) / s_n` over k. For an uncertainty that is independent of the error its expected value is 1
    minus the mean of :math:`o_k / s_n`. Equal uncertainties keep the order of the picture. The area is 0 if there is no
    error.

    Raises:
        ValueError: The shapes disagree.
    """

    def area(error: Tensor, std: Tensor) -> Tensor:
        count = torch.arange(1, error.numel() + 1, dtype=torch.float64)
        by_std = error[std.argsort(stable=True)].cumsum(0) / count
        by_error = error.sort().values.cumsum(0) / count
        mean = by_std[-1]
        return ((by_std - by_error).mean() / mean) if mean > 0 else mean

    return _each(error, std, valid, area)


def _distance(flow: Tensor, truth: Tensor) -> Tensor:
    if flow.shape != truth.shape or flow.ndim != 4 or flow.shape[1] != 2:
        raise ValueError(
            f"`flow` and `truth` must share a shape (B, 2, H, W), got {tuple(flow.shape)} and "
            f"{tuple(truth.shape)}: resize one to the other's grid."
        )
    return (flow.double() - truth.double()).square().sum(1).sqrt()


def _each(error: Tensor, std: Tensor | None, valid: Tensor | None, measure: Measure) -> Tensor:
    """Return `measure` of the errors and deviations at the used pixels of each pair."""
    rows = error.detach().cpu().double().flatten(1)
    others = rows if std is None else std.detach().cpu().double().flatten(1)
    used = torch.ones_like(rows, dtype=torch.bool)
    if valid is not None:
        used = valid.detach().cpu().bool().flatten(1).expand(len(rows), -1)
    if rows.shape != others.shape or used.shape != rows.shape:
        raise ValueError(
            f"errors, uncertainties and masks must cover the same pixels, got {tuple(rows.shape)}, "
            f"{tuple(others.shape)} and {tuple(used.shape)}: resize them to one grid."
        )
    values = [
        measure(e[c], s[c]) if c.any() else e.new_tensor(torch.nan)
        for e, s, c in zip(rows, others, used, strict=True)
    ]
    return torch.stack(values)
