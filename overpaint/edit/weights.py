"""The weights that an edit can move: by name, found by structure, as the model holds them.

A weight is named by its site and matrix: `text.0.self_attn.out_proj`, `text.0.mlp.fc2`, `text2.3.self_attn.q_proj` in
a second text encoder, `text.token_embedding`, or `unet.cross_attn.7.to_k`, where 7 counts in execution order. What is
not a plain matrix in memory (quantised, fused, wrapped by an adapter, left on disk) is refused by name: writing to it
would be lost, or would not mean what it says.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.sites import TEXT_PARTS, find_unet

__all__ = [
    "PROJECTIONS",
    "bias_at",
    "fingerprint",
    "is_site",
    "linear_at",
    "text_layers",
    "weight_at",
    "weights_at",
]

PROJECTIONS = ("q", "k", "v", "out")
EMBEDDING = "text.token_embedding"
_TEXT = re.compile(r"(text2?)\.(\d{1,3})\.(self_attn\.(?:q|k|v|out)_proj|mlp\.fc2)")
_UNET = re.compile(r"unet\.cross_attn\.(\d{1,3})\.(to_q|to_k|to_v|to_out)")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_site(name: str) -> bool:
    """Whether `name` is spelt as the name of a weight; a model may still not have it."""
    return name == EMBEDDING or bool(_TEXT.fullmatch(name) or _UNET.fullmatch(name))


def weight_at(model: TextToImage, site: str) -> nn.Parameter:
    """Return the parameter that `site` names, found by structure.

    Where accelerate has offloaded the module to the CPU, that is the tensor it keeps there: what is written to it is
    used by the next forward pass.

    Raises:
        UnknownSite: No such site, or not in this model.
        UnsupportedModel: The weight is quantised, fused, wrapped by an adapter, or not in memory.
    """
    return weights_at(model, [site])[0]


def weights_at(model: TextToImage, sites: Sequence[str]) -> list[nn.Parameter]:
    """Return `weight_at` of each site, at the price of one walk through the UNet."""
    return [_real(module, site) for module, site in zip(_modules(model, sites), sites, strict=True)]


def linear_at(model: TextToImage, site: str) -> Any:
    """Return the module whose weight `site` names. Raises as `weight_at`."""
    return _modules(model, [site])[0]


def bias_at(model: TextToImage, site: str) -> Tensor | None:
    """Return the bias beside the weight that `site` names, or `None`. Raises as `weight_at`."""
    module = linear_at(model, site)
    return None if module.bias is None else _real(module, site, "bias")


def text_layers(model: TextToImage, part: str = "text") -> list[Any]:
    """Return a text encoder's blocks in execution order: the modules that own a CLIP self-attention.

    Args:
        model: The model.
        part: `"text"`, or `"text2"` for the second encoder of SDXL.

    Raises:
        UnknownSite: The model has one text encoder only, or `part` is no encoder.
        UnsupportedModel: The encoder has no such blocks.
    """
    encoder = model.text_encoders[encoder_index(model, part)]
    layers = [m for m in encoder.modules() if hasattr(getattr(m, "self_attn", None), "out_proj")]
    if not layers:
        raise UnsupportedModel(
            f"no CLIP self-attention in the text encoder {type(encoder).__name__}: use a model with a `CLIPTextModel`."
        )
    return layers


def encoder_index(model: TextToImage, part: str) -> int:
    """Return the place of the text encoder `part` among those of `model`.

    Raises:
        UnknownSite: There is none of that name.
    """
    known = TEXT_PARTS[: len(model.text_encoders)]
    if part not in known:
        raise UnknownSite(
            f"unknown text encoder {part!r}: this model has {' and '.join(map(repr, known))}. Name one of them with "
            "`encoder`."
        )
    return known.index(part)


def fingerprint(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and bytes (row by row, as in memory), in hexadecimal."""
    content = tensor.detach().cpu().contiguous()
    head = f"{str(content.dtype).removeprefix('torch.')} {tuple(content.shape)} "
    digest = hashlib.sha256(head.encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _modules(model: TextToImage, sites: Sequence[str]) -> list[Any]:
    attentions: list[Any] | None = None
    found: list[Any] = []
    for site in sites:
        text, unet = _TEXT.fullmatch(site), _UNET.fullmatch(site)
        if site == EMBEDDING:
            found.append(model.text_encoder.get_input_embeddings())
        elif text:
            block = _pick(text_layers(model, text[1]), int(text[2]), site, f"{text[1]} layers")
            found.append(_part(block, text[3], site))
        elif unet:
            if attentions is None:
                attentions = [s for s in find_unet(model.unet) if s.kind == "cross_attn"]
            place = _pick(attentions, int(unet[1]), site, "cross_attn")
            found.append(_projection(place.module(model), unet[2]))
        else:
            raise UnknownSite(
                f"unknown weight {site!r}: edits know 'text.<layer>.self_attn.<q, k, v or out>_proj' and "
                f"'text.<layer>.mlp.fc2' ('text2' for a second encoder), {EMBEDDING!r} and "
                "'unet.cross_attn.<index>.<to_q, to_k, to_v or to_out>'."
            )
    return found


def _pick(places: Sequence[Any], index: int, site: str, what: str) -> Any:
    if index >= len(places):
        raise UnknownSite(
            f"unknown weight {site!r}: this model has {what} 0 to {len(places) - 1}. Name one of those."
        )
    return places[index]


def _part(block: Any, path: str, site: str) -> Any:
    try:
        return block.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModel(
            f"this model has no {site}: its text layers are not laid out as CLIP's. Edit a projection of its attention."
        ) from error


def _projection(attention: Any, name: str) -> Any:
    if getattr(attention, "fused_projections", False):
        raise UnsupportedModel(
            "this UNet's projections are fused, so edits of to_k and to_v would be missed: call "
            "`unet.unfuse_qkv_projections()` first."
        )
    module = getattr(attention, name)
    return module[0] if name == "to_out" else module


def _real(module: Any, site: str, name: str = "weight") -> nn.Parameter:
    """Return the weight or bias of `module` where its numbers are."""
    if type(module) not in (nn.Linear, nn.Embedding):
        raise UnsupportedModel(
            f"{site} is a {type(module).__name__}, not a plain Linear: remove adapters and quantisation before editing."
        )
    weight: Any = getattr(module, name)
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        raise UnsupportedModel(
            f"{site} holds {weight.dtype} numbers in a {type(weight).__name__}, it is quantised: load the model in "
            "float16, bfloat16 or float32 to edit it."
        )
    if weight.device.type != "meta":
        return weight
    return _offloaded(module, site, name)


def _offloaded(module: Any, site: str, name: str) -> nn.Parameter:
    """Return the tensor that accelerate keeps in place of one on the meta device."""
    hook = getattr(module, "_hf_hook", None)
    kept = [h.weights_map for h in getattr(hook, "hooks", [hook]) if getattr(h, "weights_map", None)]  # fmt: skip
    tensor: Any = kept[0][name] if kept else None
    if tensor is None or tensor.device.type == "meta" or tensor is not kept[0][name]:
        raise UnsupportedModel(
            f"{site} is not in memory (it is on the meta device, or offloaded to disk): load the model without "
            "offloading, or with `enable_model_cpu_offload`, to edit it."
        )
    return tensor
