"""How many rows fit: the peak of the tensors that one more row of a batch keeps alive.

A forward pass of one row and one of two are watched operation by operation; what a tensor's storage takes counts from
its birth to its death. The difference is the price of a row, and no run has to fail to find out. Scratch space inside
a kernel is not seen; `HEADROOM` allows for it.
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


def rows_that_fit(call: Callable[[int], object], memory: float, *, least: int, what: str) -> int:
    """Return the largest batch of `call` that stays within `memory`.

    Args:
        call: Runs a batch of so many rows once.
        memory: Budget in MiB, for activations; the weights are there already.
        least: The smallest batch that is of use.
        what: Its name in the error.

    Raises:
        ValueError: `memory` is not positive, or the smallest batch does not fit.
    """
    if not memory > 0:
        raise ValueError(f"`memory` must be a positive number of MiB, got {memory!r}.")
    call(1)  # what is made once, such as a kernel's cache, is no row's
    one, two = (peak_bytes(lambda n=n: call(n)) for n in (1, 2))
    row = max(two - one, 1) * HEADROOM
    fixed = max(one * HEADROOM - row, 0.0)
    fitting = int((memory * _MIB - fixed) / row)
    if fitting < least:
        needed = (fixed + least * row) / _MIB
        raise ValueError(
            f"`memory` of {memory:g} MiB is too little: the smallest batch of {what}, {least} rows, takes {needed:.0f} "
            "MiB. Give at least that, or load the model in half precision."
        )
    return fitting


def peak_bytes(call: Callable[[], object]) -> int:
    """Return how many bytes of new tensors were alive at once while `call` ran."""
    watch = _Watch()
    with torch.no_grad(), watch:
        call()
    return watch.peak


class _Watch(TorchDispatchMode):
    """Counts the storages that operations make, while they live."""

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
        held = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, held)
        return result

    def _add(self, tensor: Tensor, held: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in held or key in self._known:
            return  # a view, or written in place
        self._known.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size
