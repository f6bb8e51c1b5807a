"""Digests and fields that detect whether a saved trace used the same model, scorer and prompts.

A digest of weights covers every byte of them, so a change of one number changes the digest. A scorer is identified by
its name and, if it is a method of an object with weights (such as a `Judge`), by the digest of these weights. A plain
function is identified by its name alone: two functions with the same name count as the same scorer.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.model.sites import Site

__all__ = ["fingerprint", "group_members", "probe_fields", "scorer_digest"]


def fingerprint(model: Any) -> str:
    """Return a digest of all weights of a `TextToImage`, 16 hexadecimal digits; takes a second for every few GB."""
    parts = (*model.text_encoders, model.unet, model.vae)
    return _digest((f"{i}.{name}", t) for i, part in enumerate(parts) for name, t in _tensors(part))


def scorer_digest(scorer: Any) -> str | None:
    """Return a digest of the weights of `scorer`, or of the object it is a method of; `None` if there are none."""
    tensors = list(_tensors(getattr(scorer, "__self__", scorer)))
    return _digest(iter(tensors)) if tensors else None


def probe_fields(probes: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the fields that identify each probe, ready for JSON, without the prompt, which has a key of its own."""
    return [
        {
            "id": probe.id, "kind": probe.kind, "concept": probe.concept,
            "label": getattr(probe, "label", ""), "seed": getattr(probe, "seed", None),
        }
        for probe in probes
    ]  # fmt: skip


def group_members(groups: Mapping[str, Sequence[Site]] | None) -> dict[str, list[str]] | None:
    """Return the names of each group's sites, ready for JSON."""
    if groups is None:
        return None
    return {name: [site.name for site in members] for name, members in groups.items()}


def _tensors(owner: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the tensors of a module, or of an object's attributes and the dictionaries in them."""
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
