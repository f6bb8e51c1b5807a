"""Change: the movement of one weight or several, as data. Apply, revert, save, load, add, scale.

A change stores the hash of each weight that it was made for, and `apply` refuses another weight. `revert` writes back
the bytes that `apply` stored, see `edit.application`. If a model was saved in its edited state and is
loaded again, there are no stored bytes to restore: load the model that the change was made for.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import algebra, application, low_rank, storage
from overpaint.edit.movement import Contents, Movement, digest
from overpaint.errors import check_one_text, listed
from overpaint.model import TextToImage

__all__ = ["Change"]


@dataclass(frozen=True, eq=False)
class Change:
    """Movements of one or several weights, computed, applied and reverted together.

    `a + b` solves both jointly, with the same result in either order; `0.5 * a` moves half as far;
    `a.without("snoopy")` removes one concept. For a change of one weight, `site`, `base_hash`, `left`, `right`, `keys`
    and `delta` are those of its movement.

    Attributes:
        movements: One for each weight, no two of the same weight.
        protocol: The arguments that made the change and the name of its model, ready for JSON.
        report: Measurements of the solve: condition number, effective rank, residuals, seconds.
    """

    movements: tuple[Movement, ...]
    protocol: Mapping[str, Any]
    report: Mapping[str, Any]

    def __repr__(self) -> str:
        pairs = [f"{old} → {new or '(nothing)'}" for old, new in self.pairs.items()]
        sites = self.sites[0] if len(self.sites) == 1 else f"{len(self.sites)} weights"
        method = self.protocol.get("method", "unknown method")
        return f"<Change by {method}: {listed(pairs, limit=3)}; moves {sites}>"

    @property
    def contents(self) -> Contents:
        """Movements, protocol and report, as the functions of `edit.algebra` take them."""
        return Contents(self.movements, self.protocol, self.report)

    @property
    def sites(self) -> tuple[str, ...]:
        """The weights that move."""
        return self.contents.sites

    @property
    def site(self) -> str:
        """The one weight that moves."""
        return self._only.site

    @property
    def base_hash(self) -> str:
        """`fingerprint` of the one weight it starts from."""
        return self._only.base_hash

    @property
    def left(self) -> Tensor:
        """Left factor of the one movement, shape (D_out, R)."""
        return self._only.left

    @property
    def right(self) -> Tensor:
        """Right factor of the one movement, shape (R, D_in)."""
        return self._only.right

    @property
    def keys(self) -> Tensor:
        """Keys of the one movement, shape (N, D_in)."""
        return self._only.keys

    @property
    def delta(self) -> Tensor:
        """The movement of the one weight, shape (D_out, D_in), float64."""
        return self._only.delta

    @property
    def pairs(self) -> dict[str, str]:
        """The concepts, old to new."""
        return self.contents.pairs

    @property
    def ridge(self) -> float | None:
        """The pull towards the old weight, or `None` where nothing was solved."""
        return self.contents.ridge

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the movements: equal for a change and its saved copy."""
        return digest(self.movements)

    def is_applied(self, model: TextToImage) -> bool:
        """Return whether this is the last change applied to each of its weights in `model`."""
        return application.is_applied(model, self.movements, self.digest)

    def apply(self, model: TextToImage) -> None:
        """Move the weights of `model`, in place: same parameters, dtype, device, `requires_grad` and tying.

        All of them move, or none.

        Raises:
            ValueError: A weight is not the one that the change was made for, or the result overflows its dtype.
            UnknownSite: The model has no such weight.
            UnsupportedModel: A weight is quantised, fused, wrapped by an adapter, or not in memory.
        """
        application.apply(model, self.movements, self.digest)

    def revert(self, model: TextToImage) -> None:
        """Restore the weights as they were before `apply`, bit for bit. Changes of one weight go in reverse order.

        Raises:
            ValueError: The change is not applied, not the last one applied, or a weight was changed since. Then all
                weights stay as they are.
        """
        application.revert(model, self.movements, self.digest)

    def applied(self, model: TextToImage) -> AbstractContextManager[TextToImage]:
        """Return a context that applies the change on entry and restores the weights bit for bit on exit.

        They are restored also after an exception or Ctrl-C. Everything else that was written to these weights inside
        the block is undone too, and a change that was applied on top of them is also removed from its other weights.

        Raises:
            ValueError: As `apply`, on entry.
        """
        return application.applied(model, self.movements, self.digest)

    def __add__(self, other: object) -> "Change":
        """Return a change of all concepts of both, solved jointly; see `edit.algebra.add`."""
        if not isinstance(other, Change):
            return NotImplemented
        return Change(*algebra.add(self.contents, other.contents))

    def __mul__(self, factor: object) -> "Change":
        """Return the movement times `factor`: 0 changes nothing, 1 is this change."""
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return Change(*algebra.scale(self.contents, float(factor)))

    __rmul__ = __mul__

    def without(self, concept: str) -> "Change":
        """Return this change without one old concept, solved again; see `edit.algebra.without`.

        Raises:
            TypeError: `concept` is not one text.
        """
        several = "`edit.stack(model, [change], without=[...])` takes several concepts"
        check_one_text(concept, "`concept`", several)
        return Change(*algebra.without(self.contents, concept))

    def compact(self, *, rank: int = 16, dtype: torch.dtype = torch.float16) -> "Change":
        """Return this change cut to `rank` and rounded, for a small file; see `edit.low_rank.compact`."""
        return Change(*low_rank.compact(self.contents, rank=rank, dtype=dtype))

    def save(self, path: str | Path, *, gram: bool = False) -> None:
        """Write one safetensors file. See `edit.storage.write` for the errors.

        Args:
            path: A file name that ends in `.safetensors`.
            gram: Write the preserve terms too, D_in x D_in numbers each. Without them a loaded change that preserves
                prompts must read them again before it is added to another: `edit.stack` does that.
        """
        storage.write(path, *storage.pack(self.contents, gram=gram))

    @classmethod
    def load(cls, path: str | Path) -> "Change":
        """Read a file that `save` wrote. The weights that it belongs to are checked by `apply`.

        Raises:
            ValueError: A pickle, a damaged file, or a file of another kind.
            OSError: The file cannot be read.
        """
        return cls(*storage.unpack(path, *storage.read(path)))

    @property
    def _only(self) -> Movement:
        if len(self.movements) != 1:
            raise ValueError(
                f"this change moves {len(self.movements)} weights, not one: read them from `change.movements`."
            )
        return self.movements[0]
