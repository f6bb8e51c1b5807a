"""Who was asked what: marks by which a folder knows that a trace goes on with the same model, scorer and prompts.

A mark of weights is a digest of every byte of them, so that a change of one number is another mark. A scorer is known
by its name and, where its owner holds weights (as a `Judge` does), by these too. Of a plain function the name is all
there is to know: two functions of one name pass for the same scorer.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.model.sites import Site

__all__ = ["asked", "fingerprint", "members", "scorer_mark"]


def fingerprint(model: Any) -> str:
    """Return a digest of all weights of a `TextToImage`, 16 hexadecimal digits; a second for every few GB."""
    parts = (*model.text_encoders, model.unet, model.vae)
    return _digest((f"{i}.{name}", t) for i, part in enumerate(parts) for name, t in _held(part))


def scorer_mark(score: Any) -> str | None:
    """Return a digest of the weights that `score`, or the object it is a method of, holds; `None` where it has none."""
    found = list(_held(getattr(score, "__self__", score)))
    return _digest(iter(found)) if found else None


def asked(probes: Sequence[Any]) -> list[dict[str, Any]]:
    """Return what makes each probe the question it is, ready for JSON; the prompts stand by themselves."""
    return [
        {
            "id": probe.id, "kind": probe.kind, "concept": probe.concept,
            "label": getattr(probe, "label", ""), "seed": getattr(probe, "seed", None),
        }
        for probe in probes
    ]  # fmt: skip


def members(groups: Mapping[str, Sequence[Site]] | None) -> dict[str, list[str]] | None:
    """Return the names of each group's sites, ready for JSON."""
    if groups is None:
        return None
    return {name: [site.name for site in chosen] for name, chosen in groups.items()}


def _held(owner: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module, or those in an object's attributes and in dictionaries there, by name."""
    if isinstance(owner, Module):
        yield from owner.state_dict().items()
        return
    for name, value in sorted(getattr(owner, "__dict__", {}).items()):
        if isinstance(value, Module):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in value.state_dict().items())
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        yield from ((f"{name}.{key}", entry) for key, entry in entries if isinstance(entry, Tensor))


def _digest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
