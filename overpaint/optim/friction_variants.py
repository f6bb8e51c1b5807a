r"""The friction of diffGrad and its five variants: the share of Adam's step that a coordinate takes.

With :math:`d = g_{t-1} - g_t`, and :math:`\mu, \nu` the mean and the standard deviation of :math:`|g_t|` over a tensor:

== ============================================ ======================================================
id :math:`\xi`                                  range
== ============================================ ======================================================
0  :math:`\sigma(|d|)`                          [1/2, 1); the method
1  :math:`\sigma(d)`                            (0, 1); signed, so that a step can vanish
2  :math:`9\,\sigma(|d| / 2) - 4`               [1/2, 5)
3  :math:`\sigma(\nu |d| - \mu)`                [:math:`\sigma(-\mu)`, 1), below one half
4  :math:`\sigma(\nu^2 |d| - \mu)`              as 3
5  :math:`\sigma(\sqrt\nu |d| - \mu)`           as 3
== ============================================ ======================================================

Source: Dubey et al., 2020 (diffGrad), https://arxiv.org/abs/1909.11015, equations 17 to 19 and section VII-B.
Deviations: the paper does not state the set that :math:`\mu` and :math:`\nu` are computed over, nor the kind of
deviation. Here the set is one tensor (all of it if it is sharded) and the deviation is the biased one. Variant 2 is
interpreted so that it has the range printed in the paper.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["friction"]

VARIANTS = range(6)
_DOUBLINGS = 6


def friction(change: Tensor, gradient: Tensor, dfc: int = 0) -> Tensor:
    r"""Return the share :math:`\xi` of Adam's step that each coordinate takes.

    Args:
        change: :math:`g_{t-1} - g_t`, real, any shape.
        gradient: :math:`g_t`, same shape; only variants 3 to 5 use it.
        dfc: Variant of the friction coefficient, 0 to 5.

    Returns:
        The share, shape and dtype of `change`; its range is in the table above.

    Raises:
        ValueError: There is no such variant.
    """
    check_variant(dfc)
    if dfc == 0:
        return change.abs().sigmoid()
    if dfc == 1:
        return change.sigmoid()
    if dfc == 2:
        return 9 * (change.abs() / 2).sigmoid() - 4
    size = gradient.abs()
    # `Tensor.mean` of a sharded tensor assumes shards of equal size.
    mean = size.sum() / max(1, size.numel())
    variance = (size - mean).square().sum() / max(1, size.numel())
    factor = variance ** {3: 0.5, 4: 1.0, 5: 0.25}[dfc]
    return (factor * change.abs() - mean).sigmoid()


def friction_list(
    previous: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor] | None, dfc: int
) -> list[Tensor]:
    """Return the friction of each tensor, times `exp_avgs` if given; it may be computed in the memory of `previous`."""
    if dfc == 0:
        torch._foreach_sub_(previous, grads)
        torch._foreach_abs_(previous)
        torch._foreach_sigmoid_(previous)
        shares = previous
    else:
        shares = [friction(p - g, g, dfc) for p, g in zip(previous, grads, strict=True)]
    if exp_avgs is not None:
        torch._foreach_mul_(shares, exp_avgs)
    return shares


def inverse_friction(change: Tensor) -> Tensor:
    r"""Return :math:`1 / \xi = 1 + e^{-|d|} \in [1, 2]` for variant 0, float32, to 2e-7, without a call of `exp`.

    The code that compilers generate for CPUs calls `exp` for every few numbers, which takes longer than the rest of a
    step. This function uses only products and sums: a Taylor polynomial of :math:`e^x - 1` at :math:`x = -|d| / 64`,
    doubled six times by :math:`e^{2x} - 1 = (e^x - 1)(2 + (e^x - 1))`, which does not increase the error.

    Args:
        change: :math:`g_{t-1} - g_t`; at magnitudes above 20 the friction rounds to one.
    """
    x = change.abs().clamp(max=20.0) * -(2.0**-_DOUBLINGS)
    power = x * (1 + x * (1 / 2) * (1 + x * (1 / 3) * (1 + x * (1 / 4))))
    for _ in range(_DOUBLINGS):
        power = power * (2 + power)
    return 2 + power


def check_variant(dfc: Any) -> None:
    """Raise unless `dfc` is a variant.

    Raises:
        ValueError: It is not an integer from 0 to 5.
    """
    if isinstance(dfc, bool) or dfc not in VARIANTS:
        raise ValueError(
            f"`dfc` must be a variant from 0 to 5, got {dfc!r}. Omit it for the paper's friction, 0."
        )
