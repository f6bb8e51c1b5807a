"""Batches of one shape: rows shared out equally, and functions that copy single heads between rows."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module

from overpaint.model import sites
from overpaint.model.sites import Site

__all__ = ["equal_chunks", "head_columns", "on_first"]


def equal_chunks(
    items: list[Any],
    limit: int,
    *,
    rows: Callable[[int], int] = lambda length: length,
    multiple: int = 1,
    fill: Any = None,
) -> Iterator[tuple[list[Any], int]]:
    """Yield chunks of equal length, in batches of at most `limit` rows, and the number of items in each.

    Rounding may depend on a batch's shape and, where matrix kernels handle the last rows separately, on
    a row's place in it. So all chunks have one length, `rows(length)` is a multiple of `multiple`, and the last chunk
    is filled up.

    Args:
        items: Items to share out.
        limit: Largest number of rows of a batch; a chunk holds at least one item even so.
        rows: Returns the number of rows of a batch from the length of its chunk.
        multiple: Divisor of the number of rows.
        fill: Fills up the last chunk; that chunk's own last item if `None`.
    """
    fitting = [n for n in range(1, limit + 1) if rows(n) <= limit and not rows(n) % multiple]
    size = max(fitting, default=1)
    length = -(-len(items) // max(1, -(-len(items) // size)))
    while rows(length) % multiple:
        length += 1
    for start in range(0, max(1, len(items)), max(1, length)):
        part = items[start : start + length]
        filler = part[-1:] if fill is None else [fill]
        yield part + filler * (length - len(part)), len(part)


def head_columns(model: Any, site: Site, head: int) -> tuple[Module, slice]:
    """Return the output projection of an attention site, and the columns of its input that belong to `head`."""
    linear: Any = sites.head_input(model, site)
    width = linear.in_features // sites.heads(model, site)
    return linear, slice(head * width, (head + 1) * width)


def on_first(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a function of a module's arguments that applies `function` to the first positional argument."""
    return lambda args, kwargs: ((function(args[0]), *args[1:]), kwargs)
