"""Change: the movement of one weight, as data. Apply, revert, save, load.

A change touches exactly one tensor and says by hash which bytes it was made for. What `revert` writes back are those
very bytes, which `apply` put aside: adding and subtracting a movement would not return them, least of all in half
precision. They are kept in a stack on the parameter they belong to: there is no global state, two wrappers of one
pipeline agree, a copy of the model starts clean, and the bytes go when the model goes. A new process that opens a
model saved in its edited state has no original bytes to return to: load the model that the change was made for.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.edit import storage
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage

__all__ = ["Change", "fingerprint", "text_layers", "weight_at"]

PROJECTIONS = ("q", "k", "v", "out")
_SITE = re.compile(r"text\.(\d+)\.self_attn\.(q|k|v|out)_proj|text\.token_embedding")
_STACK = "_overpaint_applied"


@dataclass(frozen=True)
class _Applied:
    """One applied change: which, the bytes it left behind, and the hash of those it made."""

    digest: str
    original: Tensor
    result: str


@dataclass(frozen=True, eq=False)
class Change:
    """A movement `left @ right` of the weight at `site`.

    Attributes:
        site: The weight: `text.0.self_attn.out_proj` or `text.token_embedding`.
        base_hash: `fingerprint` of the weight that the movement starts from.
        left: Shape (D_out, R), float64; a row of zeros leaves that row of the weight alone.
        right: Shape (R, D_in), float64.
        keys: Inputs that were given new outputs, shape (N, D_in), float32; N is 0 where nothing was solved.
        targets: Those outputs, shape (N, D_out), float32.
        protocol: The arguments that made it, and of which model, ready for JSON.
        report: What the solve measured: condition number, effective rank, residuals, seconds.
    """

    site: str
    base_hash: str
    left: Tensor
    right: Tensor
    keys: Tensor
    targets: Tensor
    protocol: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def delta(self) -> Tensor:
        """The movement of the weight, shape (D_out, D_in), float64."""
        return self.left @ self.right

    @property
    def pairs(self) -> dict[str, str]:
        """The concepts, old to new."""
        return dict(self.protocol.get("pairs", {}))

    @property
    def ridge(self) -> float | None:
        """The pull towards the old weight, or `None` where nothing was solved."""
        return self.protocol.get("ridge")

    @property
    def digest(self) -> str:
        """SHA-256 of what the change does: equal for a change and its saved copy."""
        text = f"{self.site} {self.base_hash} {fingerprint(self.left)} {fingerprint(self.right)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def is_applied(self, model: TextToImage) -> bool:
        """Whether this is the last change applied to its weight in `model`."""
        stack = _stack(weight_at(model, self.site))
        return bool(stack) and stack[-1].digest == self.digest

    def apply(self, model: TextToImage) -> None:
        """Move the weight of `model`, in place: same parameter, dtype, device, `requires_grad` and tying.

        Raises:
            ValueError: The weight is not the one that the change was made for, or the result overflows its dtype.
            UnknownSite: The model has no such weight.
        """
        parameter = weight_at(model, self.site)
        moved, record = self._prepare(parameter, model.name)
        try:
            _overwrite(parameter, moved)
            _stack(parameter).append(record)
        except BaseException:
            _overwrite(parameter, record.original)
            raise

    def revert(self, model: TextToImage) -> None:
        """Put back the bytes that `apply` found, bit for bit. Changes of one weight go in the reverse order.

        Raises:
            ValueError: The change is not applied, not the last one applied, or the weight was changed since.
        """
        parameter = weight_at(model, self.site)
        stack = _stack(parameter)
        if self.digest not in (applied.digest for applied in stack):
            raise ValueError(
                f"this change is not applied to {self.site} of {model.name!r}: there is nothing to revert. `apply` it "
                "first, or load the model again if it was saved in its edited state."
            )
        if stack[-1].digest != self.digest:
            raise ValueError(
                f"another change was applied to {self.site} after this one: revert that one first."
            )
        if fingerprint(parameter) != stack[-1].result:
            raise ValueError(
                f"{self.site} of {model.name!r} is not as this change left it, something else wrote to it: to discard "
                "that too, load the model again."
            )
        _overwrite(parameter, stack[-1].original)
        stack.pop()

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[TextToImage]:
        """Apply on entry; on exit, also by an exception or Ctrl-C, the weight returns bit for bit.

        Whatever was done to this weight inside the block goes with it.
        """
        parameter = weight_at(model, self.site)
        moved, record = self._prepare(parameter, model.name)
        stack = _stack(parameter)
        depth = len(stack)
        try:
            _overwrite(parameter, moved)
            stack.append(record)
            yield model
        finally:
            _overwrite(parameter, record.original)
            del stack[depth:]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the name must end so. See `storage.write` for what it raises."""
        tensors = {name: getattr(self, name) for name in ("left", "right", "keys", "targets")}
        fields = ("site", "base_hash", "protocol", "report")
        storage.write(path, tensors, {name: getattr(self, name) for name in fields})

    @classmethod
    def load(cls, path: str | Path) -> "Change":
        """Read what `save` wrote. The weight it belongs to is checked by `apply`.

        Raises:
            ValueError: A pickle, a damaged or foreign file.
            OSError: The file cannot be read.
        """
        tensors, record = storage.read(path)
        fault = _fault(tensors, record)
        if fault:
            raise ValueError(f"{str(path)!r} is damaged: {fault}. Copy it again, or remake it.")
        fields: dict[str, Any] = {**record, **tensors}
        return cls(**fields)

    def _prepare(self, parameter: nn.Parameter, name: str) -> tuple[Tensor, _Applied]:
        """Return the moved weight and the record to keep; nothing is written yet."""
        found = fingerprint(parameter)
        if found != self.base_hash:
            advice = "apply it to the model it was made for, unedited and in the same dtype"
            if _stack(parameter):
                advice = "revert the change applied there first, or make one change of both with `edit.stack`"
            raise ValueError(
                f"wrong base hash: {self.site} of {name!r} is {found[:12]}, the change was made for "
                f"{self.base_hash[:12]}. To use it, {advice}."
            )
        original = parameter.detach().clone()
        moved = original.cpu()
        rows = (
            self.left.abs().amax(1) > 0
            if self.left.shape[1]
            else self.left.new_zeros(len(self.left)).bool()
        )
        moved = moved.clone()
        moved[rows] = (moved[rows].double() + self.left[rows] @ self.right).to(moved.dtype)
        if not bool(torch.isfinite(moved).all()):
            raise ValueError(
                f"applied to {self.site} the change gives numbers that {moved.dtype} cannot hold: load the model in "
                "float32 and make it again, or raise `ridge`."
            )
        return moved, _Applied(self.digest, original, fingerprint(moved))


def weight_at(model: TextToImage, site: str) -> nn.Parameter:
    """Return the parameter that `site` names, found by structure.

    Raises:
        UnknownSite: No such site, or not in this model.
        UnsupportedModel: The module there is not a plain `nn.Linear`.
    """
    match = _SITE.fullmatch(site)
    if match is None:
        raise UnknownSite(
            f"unknown weight {site!r}: edits know 'text.<layer>.self_attn.<q, k, v or out>_proj' and "
            "'text.token_embedding'."
        )
    if match[1] is None:
        return model.text_encoder.get_input_embeddings().weight
    layers = text_layers(model)
    if int(match[1]) >= len(layers):
        raise UnknownSite(
            f"unknown weight {site!r}: this model has text layers 0 to {len(layers) - 1}."
        )
    linear: Any = getattr(layers[int(match[1])].self_attn, f"{match[2]}_proj")
    if type(linear) is not nn.Linear:
        raise UnsupportedModel(
            f"{site} is a {type(linear).__name__}, not a plain Linear: remove adapters and quantisation before editing."
        )
    weight: Any = linear.weight
    return weight


def text_layers(model: TextToImage) -> list[Any]:
    """Return the text encoder's blocks in execution order: the modules that own a CLIP self-attention.

    Raises:
        UnsupportedModel: There are none.
    """
    layers = [
        m
        for m in model.text_encoder.modules()
        if hasattr(getattr(m, "self_attn", None), "out_proj")
    ]
    if not layers:
        raise UnsupportedModel(
            f"no CLIP self-attention in the text encoder {type(model.text_encoder).__name__}: use a model with a "
            "`CLIPTextModel`."
        )
    return layers


def fingerprint(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and bytes (row by row, as in memory), in hexadecimal."""
    content = tensor.detach().cpu().contiguous()
    head = f"{str(content.dtype).removeprefix('torch.')} {tuple(content.shape)} "
    digest = hashlib.sha256(head.encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stack(parameter: nn.Parameter) -> list[_Applied]:
    """Return the changes applied to `parameter`, oldest first; the list lives on the parameter itself."""
    return vars(parameter).setdefault(_STACK, [])


@torch.no_grad()
def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


def _fault(tensors: Mapping[str, Tensor], record: Any) -> str:
    """Return what is wrong with the content of a file, or an empty string."""
    fields = {"site": str, "base_hash": str, "protocol": dict, "report": dict}
    if not isinstance(record, dict) or set(record) != set(fields):
        return "its record has other fields than a change"
    wrong = [name for name, kind in fields.items() if not isinstance(record[name], kind)]
    if wrong:
        return f"its `{wrong[0]}` is of the wrong type"
    if not _SITE.fullmatch(record["site"]) or not re.fullmatch(
        r"[0-9a-f]{64}", record["base_hash"]
    ):
        return "its site or hash is not one that overpaint writes"
    if set(tensors) != {"left", "right", "keys", "targets"} or any(
        t.ndim != 2 for t in tensors.values()
    ):
        return "its tensors are not those of a change"
    (out, rank), (inner, width), n = (
        tensors["left"].shape,
        tensors["right"].shape,
        len(tensors["keys"]),
    )
    shapes = (tensors["keys"].shape, tensors["targets"].shape)
    if rank != inner or shapes != ((n, width), (n, out)):
        return "its tensors do not fit one another"
    wanted = {
        "left": torch.float64,
        "right": torch.float64,
        "keys": torch.float32,
        "targets": torch.float32,
    }
    if any(tensors[name].dtype != dtype for name, dtype in wanted.items()):
        return "its tensors have the wrong dtype"
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        return "it holds NaN or infinity"
    return ""
