"""Compute the largest batch size that fits a memory budget.

Two forward passes are measured, with one row and with two rows. A torch dispatch mode counts the bytes of each storage
from its allocation until it is freed. The difference between the two peaks is the memory of one row. Temporary memory
inside a kernel is not counted, so the result is multiplied by `HEADROOM`.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HEADROOM", "peak_bytes", "rows_that_fit"]

HEADROOM = 1.6
_MIB = 2**20


def rows_that_fit(call: Callable[[int], object], memory: float, *, least: int, label: str) -> int:
    """Return the largest number of rows for which `call` needs at most `memory`.

    Args:
        call: Runs one batch; called with its number of rows.
        memory: Budget for activations in MiB, positive. The weights are already in memory and are not included.
        least: Number of rows of the smallest useful batch.
        label: Name of the model part, for the error message.

    Raises:
        ValueError: The smallest batch does not fit.
    """
    call(1)  # the first call also allocates buffers that later calls reuse; they are not counted
    one, two = (peak_bytes(lambda n=n: call(n)) for n in (1, 2))
    row = max(two - one, 1) * HEADROOM
    fixed = max(one * HEADROOM - row, 0.0)
    rows = int((memory * _MIB - fixed) / row)
    if rows < least:
        needed = (fixed + least * row) / _MIB
        raise ValueError(
            f"`memory` of {memory:g} MiB is too little: the smallest batch of {label}, {least} rows, needs "
            f"{needed:.0f} MiB. Pass at least that, or load the model in half precision."
        )
    return rows


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak memory, in bytes, of the tensors that `call` allocates."""
    counter = _StorageCounter()
    with torch.no_grad(), counter:
        call()
    return counter.peak


class _StorageCounter(TorchDispatchMode):
    """Counts the bytes of all storages that operations have allocated and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, inputs)
        return result

    def _add(self, tensor: Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in inputs or key in self._counted:
            return  # a view, or the output of an in-place operation
        self._counted.add(key)
        size = storage.nbytes()
        self.live_bytes += size
        self.peak = max(self.peak, self.live_bytes)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live_bytes -= size
