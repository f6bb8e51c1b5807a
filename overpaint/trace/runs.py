"""What the two tracers share: batches of one shape, distances, the scorer's name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Scorer", "check_settings", "equal_chunks", "recovered", "scorer_name"]

Scorer = Callable[[Tensor, Sequence[Any]], Tensor]


def check_settings(*, seeds: Sequence[int], steps: int, rows: int) -> None:
    """Raise `ValueError` if there are no seeds, no steps or no rows in a batch."""
    if not seeds:
        raise ValueError("`seeds` is empty: give at least one.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if rows < 1:
        raise ValueError(f"a batch must have at least 1 row, got {rows}.")


def equal_chunks(
    items: list[Any],
    size: int,
    *,
    rows: Callable[[int], int] = lambda length: length,
    multiple: int = 1,
    fill: Any = None,
) -> Iterator[tuple[list[Any], int]]:
    """Yield parts of equal length, about `size`, and how many of each are items.

    Rounding may depend on a batch's shape and, where matrix kernels treat the last rows apart, on
    a row's place in it. So all parts have one length, and `rows(length)` is a multiple of
    `multiple`; what is missing at the end is filled up.

    Args:
        items: What to share out.
        size: Items a part; a little more where `multiple` asks for it.
        rows: Rows of the batch that a part of some length makes.
        multiple: Of what the number of rows must be one.
        fill: Fills up a part; its own last item if `None`.
    """
    length = -(-len(items) // max(1, -(-len(items) // size)))
    while rows(length) % multiple:
        length += 1
    for start in range(0, max(1, len(items)), max(1, length)):
        part = items[start : start + length]
        filler = part[-1:] if fill is None else [fill]
        yield part + filler * (length - len(part)), len(part)


def recovered(values: Tensor) -> list[float | None]:
    """Return for each row from the third on the share of the way back from row 1 to row 0.

    1 - |restored - clean| / |corrupted - clean|; `None` where corruption changed nothing.
    """
    flat = values.flatten(1).double()
    distances = (flat[1:] - flat[0]).norm(dim=1).tolist()
    whole, rest = distances[0], distances[1:]
    return [1 - distance / whole if whole > 0 else None for distance in rest]


def scorer_name(score: Scorer | None) -> str:
    """Return what a protocol calls `score`: its owner's name, or its own."""
    if score is None:
        return "none"
    owner = getattr(score, "__self__", None)
    return str(getattr(owner, "name", None) or getattr(score, "__qualname__", type(score).__name__))
