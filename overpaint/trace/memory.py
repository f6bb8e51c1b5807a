"""Batch size for a memory budget, from the peak bytes of live tensors that one more row of a batch takes.

A forward pass of one row and one of two rows are counted operation by operation: a tensor's storage counts from its
allocation until it is freed. The difference is the memory of a row, so no run has to fail to measure it. Scratch space
inside a kernel is not counted; `HEADROOM` allows for it.
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
    """Return the largest batch of `call` that stays within `memory`.

    Args:
        call: Runs a batch once; called with its number of rows.
        memory: Positive budget for activations in MiB; the weights are loaded already and do not count.
        least: Rows of the smallest useful batch.
        label: Name of the batch in the error.

    Raises:
        ValueError: The smallest batch does not fit.
    """
    call(1)  # allocates once what belongs to no row, such as a kernel's cache
    one, two = (peak_bytes(lambda n=n: call(n)) for n in (1, 2))
    row = max(two - one, 1) * HEADROOM
    fixed = max(one * HEADROOM - row, 0.0)
    fitting = int((memory * _MIB - fixed) / row)
    if fitting < least:
        needed = (fixed + least * row) / _MIB
        raise ValueError(
            f"`memory` of {memory:g} MiB is too little: the smallest batch of {label}, {least} rows, takes "
            f"{needed:.0f} MiB. Give at least that, or load the model in half precision."
        )
    return fitting


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the largest number of bytes of new tensors that were alive at once while `call` ran."""
    counter = _StorageCounter()
    with torch.no_grad(), counter:
        call()
    return counter.peak


class _StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

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
        if key in inputs or key in self._known:
            return  # a view, or written in place
        self._known.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size
