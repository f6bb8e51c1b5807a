"""Change: the movement of one weight or several, as data. Apply, revert, save, load, add, scale.

A change says by hash which bytes it was made for. What `revert` writes back are those very bytes, which `apply` put
aside: adding and subtracting a movement would not return them, least of all in half precision. They are kept in a stack
on the parameter they belong to: there is no global state, two wrappers of one pipeline agree, a copy of the model
starts clean, and the bytes go when the model goes. Several weights move together or not at all. A new process that
opens a model saved in its edited state has no original bytes to return to: load the model that the change was made for.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.edit import storage
from overpaint.edit.least_squares import Solution, compress, one_thread
from overpaint.edit.weights import fingerprint, weights_at
from overpaint.model import TextToImage

__all__ = ["Change", "Movement"]

_STACK = "_overpaint_applied"
_BLOCK = 64  # rows


@dataclass(frozen=True, eq=False)
class _Applied:
    """One applied change at one weight: which, the bytes it found, the hash of those it made, and its other weights."""

    digest: str
    original: Tensor
    result: str
    everywhere: list[tuple[nn.Parameter, "_Applied"]]


@dataclass(frozen=True, eq=False)
class Movement:
    r"""A movement `left @ right` of one weight, and what it was solved from.

    Attributes:
        site: The weight, as `weight_at` names it.
        base_hash: `fingerprint` of the weight that the movement starts from.
        left: Shape (D_out, R), float16, 32 or 64; a row of zeros leaves that row of the weight alone.
        right: Shape (R, D_in), of the same kinds.
        keys: Inputs :math:`K` that were given new outputs, shape (N, D_in); N is 0 where nothing was solved.
        residuals: What these outputs are more than the base weight's, :math:`V - K W^\top`, shape (N, D_out).
        owners: Of each key, the concept it belongs to: its place among the pairs of the change.
        gram: :math:`a P^\top P` of the preserved keys, shape (D_in, D_in); `None` if there are none, or not at hand.
    """

    site: str
    base_hash: str
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    keys: Tensor = field(repr=False)
    residuals: Tensor = field(repr=False)
    owners: tuple[int, ...] = field(repr=False)
    gram: Tensor | None = field(repr=False)

    @classmethod
    def of(
        cls,
        site: str,
        parameter: Tensor,
        solution: Solution,
        keys: Tensor,
        residuals: Tensor | Callable[[], Tensor],
        owners: Sequence[int],
        gram: Tensor | None,
    ) -> "Movement":
        """Movement of `parameter`, whose present bytes are the base, by a solution cut to its exact rank.

        Residuals may be given as a function: it is called when they are first asked for, and not by `apply`.
        """
        left, right = compress(solution.left, solution.right, orthonormal=solution.orthonormal)
        base, keys = fingerprint(parameter), keys.detach().cpu()
        given = residuals.detach().cpu() if isinstance(residuals, Tensor) else keys[:0]
        made = cls(site, base, left, right, keys, given, tuple(owners), gram)
        if not isinstance(residuals, Tensor):
            del vars(made)["residuals"]
            vars(made)["_later"] = residuals
        return made

    def __getattr__(self, name: str) -> Any:
        """Return the residuals that `of` left for later; any other name there is not."""
        if name != "residuals" or "_later" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        vars(self)["residuals"] = vars(self)["_later"]()
        del vars(self)["_later"]
        return self.residuals

    @cached_property
    def delta(self) -> Tensor:
        """The movement of the weight, shape (D_out, D_in), float64; kept once it was asked for."""
        return self.left.double() @ self.right.double()

    def moved(self, weight: Tensor) -> Tensor:
        """Return `weight` after the movement, on the CPU, in its dtype. Rows that do not move keep their bytes."""
        with one_thread():
            result = weight.detach().cpu().clone()
        if not self.left.numel():
            return result
        with one_thread():
            rows = self.left.abs().amax(1) > 0
        if not bool(rows.all()):
            shift = self.left[rows].double() @ self.right.double()
            result[rows] = (result[rows].double() + shift).to(result.dtype)
            return result
        shift = self.delta if "delta" in vars(self) else self.left.double() @ self.right.double()
        # a block at a time: fresh pages for the whole in double cost more than the sum
        with one_thread():
            for old, by in zip(result.split(_BLOCK), shift.split(_BLOCK), strict=True):
                old.copy_(by + old)
        return result


@dataclass(frozen=True, eq=False)
class Change:
    """Movements of one weight or several, made together, applied and reverted together.

    `a + b` solves both jointly, in either order to the same bytes; `0.5 * a` is a dial; `a.without("snoopy")` takes one
    concept out again. For a change of one weight, `site`, `base_hash`, `left`, `right`, `keys` and `delta` are those of
    its movement.

    Attributes:
        movements: One for each weight, no two of the same.
        protocol: The arguments that made it, and of which model, ready for JSON.
        report: What the solve measured: condition number, effective rank, residuals, seconds.
    """

    movements: tuple[Movement, ...]
    protocol: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def sites(self) -> tuple[str, ...]:
        """The weights that move."""
        return tuple(movement.site for movement in self.movements)

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
        return dict(self.protocol.get("pairs", {}))

    @property
    def ridge(self) -> float | None:
        """The pull towards the old weight, or `None` where nothing was solved."""
        return self.protocol.get("ridge")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the change does: equal for a change and its saved copy."""
        lines = [
            f"{m.site} {m.base_hash} {fingerprint(m.left)} {fingerprint(m.right)}"
            for m in self.movements
        ]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def is_applied(self, model: TextToImage) -> bool:
        """Whether this is the last change applied to each of its weights in `model`."""
        stacks = [_stack(parameter) for parameter in weights_at(model, self.sites)]
        return all(stack and stack[-1].digest == self.digest for stack in stacks)

    def apply(self, model: TextToImage) -> None:
        """Move the weights of `model`, in place: same parameters, dtype, device, `requires_grad` and tying.

        All of them move, or none.

        Raises:
            ValueError: A weight is not the one that the change was made for, or the result overflows its dtype.
            UnknownSite: The model has no such weight.
            UnsupportedModel: A weight is quantised, fused, wrapped by an adapter, or not in memory.
        """
        parameters, moved, records = self._prepare(model)
        depths = [len(_stack(parameter)) for parameter in parameters]
        try:
            _move(parameters, moved, records)
        except BaseException:
            _restore(parameters, records, depths)
            raise

    def revert(self, model: TextToImage) -> None:
        """Put back the bytes that `apply` found, bit for bit. Changes of one weight go in the reverse order.

        Raises:
            ValueError: The change is not applied, not the last one applied, or a weight was changed since. Then all
                weights stay as they are.
        """
        parameters = weights_at(model, self.sites)
        for movement, parameter in zip(self.movements, parameters, strict=True):
            self._check_last(movement, parameter, model.name)
        records = [_stack(parameter)[-1] for parameter in parameters]
        depths = [len(_stack(parameter)) - 1 for parameter in parameters]
        try:
            _restore(parameters, records, depths)
        except BaseException:  # Ctrl-C between two weights: finish, so that none is left moved
            _restore(parameters, records, depths)
            raise

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[TextToImage]:
        """Apply on entry; on exit, also by an exception or Ctrl-C, the weights return bit for bit.

        Whatever was done to these weights inside the block goes with it; a change that was applied on top of them
        goes from its other weights too.
        """
        parameters, moved, records = self._prepare(model)
        depths = [len(_stack(parameter)) for parameter in parameters]
        try:
            _move(parameters, moved, records)
            yield model
        finally:
            _restore(parameters, records, depths)

    def __add__(self, other: object) -> "Change":
        """All concepts of both, solved jointly from what the two hold; see `joint.add`."""
        from overpaint.edit import algebra

        return algebra.add(self, other) if isinstance(other, Change) else NotImplemented

    def __mul__(self, factor: object) -> "Change":
        """The same movement, `factor` times as far: 0 does nothing, 1 is this change."""
        from overpaint.edit import algebra

        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return algebra.scale(self, float(factor))

    __rmul__ = __mul__

    def without(self, concept: str) -> "Change":
        """This change less one old concept, solved again; see `joint.without`."""
        from overpaint.edit import algebra

        return algebra.without(self, concept)

    def complete(self, model: TextToImage) -> "Change":
        """This change with its preserve terms, which files leave out, read anew; see `joint.complete`."""
        from overpaint.edit import algebra

        return algebra.complete(self, model)

    def compact(self, *, rank: int = 16, dtype: torch.dtype = torch.float16) -> "Change":
        """This change cut to `rank` and rounded, for a small file; see `compact.compact`."""
        from overpaint.edit import low_rank

        return low_rank.compact(self, rank=rank, dtype=dtype)

    def save(self, path: str | Path, *, gram: bool = False) -> None:
        """Write one safetensors file; the name must end so. See `storage.write` for what it raises.

        Args:
            path: Where.
            gram: Write the preserve terms too, D_in x D_in numbers each. Without them a loaded change that preserves
                prompts must read them again before it is added to another: `edit.stack` does.
        """
        storage.write(path, *storage.pack(self, gram=gram))

    @classmethod
    def load(cls, path: str | Path) -> "Change":
        """Read what `save` wrote. The weights it belongs to are checked by `apply`.

        Raises:
            ValueError: A pickle, a damaged or foreign file.
            OSError: The file cannot be read.
        """
        tensors, record = storage.read(path)
        movements = [Movement(**fields) for fields in storage.unpack(path, tensors, record)]
        return cls(tuple(movements), record["protocol"], record["report"])

    @property
    def _only(self) -> Movement:
        if len(self.movements) != 1:
            raise ValueError(
                f"this change moves {len(self.movements)} weights, not one: read them from `change.movements`."
            )
        return self.movements[0]

    def _prepare(
        self, model: TextToImage
    ) -> tuple[list[nn.Parameter], list[Tensor], list[_Applied]]:
        """Return the parameters, their moved values and the records to keep; nothing is written yet."""
        parameters = weights_at(model, self.sites)
        moved: list[Tensor] = []
        records: list[_Applied] = []
        everywhere: list[tuple[nn.Parameter, _Applied]] = []
        for movement, parameter in zip(self.movements, parameters, strict=True):
            _check_base(movement, parameter, model.name)
            moved.append(_finite(movement, parameter))
            with one_thread():
                original = parameter.detach().clone()
            records.append(_Applied(self.digest, original, fingerprint(moved[-1]), everywhere))
            everywhere.append((parameter, records[-1]))
        return parameters, moved, records

    def _check_last(self, movement: Movement, parameter: nn.Parameter, name: str) -> None:
        """Refuse unless this change was the last at `parameter`, and nobody wrote there since."""
        stack, site = _stack(parameter), movement.site
        if self.digest not in (applied.digest for applied in stack):
            raise ValueError(
                f"this change is not applied to {site} of {name!r}: there is nothing to revert. `apply` it first, or "
                "load the model again if it was saved in its edited state."
            )
        if stack[-1].digest != self.digest:
            raise ValueError(
                f"another change was applied to {site} after this one: revert that one first."
            )
        if fingerprint(parameter) != stack[-1].result:
            raise ValueError(
                f"{site} of {name!r} is not as this change left it, something else wrote to it: to discard that too, "
                "load the model again."
            )


def _check_base(movement: Movement, parameter: nn.Parameter, name: str) -> None:
    found = fingerprint(parameter)
    if found == movement.base_hash:
        return
    advice = "apply it to the model it was made for, unedited and in the same dtype"
    if _stack(parameter):
        advice = (
            "revert the change applied there first, or make one change of both with `edit.stack`"
        )
    raise ValueError(
        f"wrong base hash: {movement.site} of {name!r} is {found[:12]}, the change was made for "
        f"{movement.base_hash[:12]}. To use it, {advice}."
    )


@one_thread()
def _finite_ends(moved: Tensor) -> bool:
    ends = torch.stack(moved.aminmax()) if moved.numel() else moved  # NaN is both least and most
    return bool(torch.isfinite(ends).all())


def _finite(movement: Movement, parameter: nn.Parameter) -> Tensor:
    moved = movement.moved(parameter)
    if not _finite_ends(moved):
        raise ValueError(
            f"applied to {movement.site} the change gives numbers that {moved.dtype} cannot hold: load the model in "
            "float32 and make it again, or raise `ridge`."
        )
    return moved


def _stack(parameter: nn.Parameter) -> list[_Applied]:
    """Return the changes applied to `parameter`, oldest first; the list lives on the parameter itself."""
    return vars(parameter).setdefault(_STACK, [])


def _move(
    parameters: Sequence[nn.Parameter], moved: Sequence[Tensor], records: Sequence[_Applied]
) -> None:
    for parameter, value, record in zip(parameters, moved, records, strict=True):
        _overwrite(parameter, value)
        _stack(parameter).append(record)


def _restore(
    parameters: Sequence[nn.Parameter], records: Sequence[_Applied], depths: Sequence[int]
) -> None:
    """Write back the originals. What was applied on top of one of them goes too, from all the weights it moved."""
    queue = list(zip(parameters, depths, strict=True))
    while queue:
        parameter, depth = queue.pop()
        above = _stack(parameter)[depth:]
        if not above:
            continue
        _overwrite(parameter, above[0].original)
        del _stack(parameter)[depth:]
        for place, record in (pair for applied in above for pair in applied.everywhere):
            if record in _stack(place):
                queue.append((place, _stack(place).index(record)))
    for parameter, record in zip(parameters, records, strict=True):
        _overwrite(parameter, record.original)


@torch.no_grad()
@one_thread()
def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)
