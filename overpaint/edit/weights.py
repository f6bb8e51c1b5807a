"""The weights that an edit can move, found by name and by the structure of the model.

A weight is named by its site and matrix: `text.0.self_attn.out_proj`, `text.0.mlp.fc2`, `text2.3.self_attn.q_proj` in
a second text encoder, `text.token_embedding`, `text2.token_embedding`, or `unet.cross_attn.7.to_k`, where 7 counts in
execution order. A weight that is not a plain matrix in memory (quantised, fused, wrapped by an adapter, left on disk)
is refused by name: values written to it would be lost, or would have another meaning.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.sites import TEXT_PARTS, find_unet

__all__ = [
    "EMBEDDING",
    "PROJECTIONS",
    "Weight",
    "cast_hashes",
    "encoder_index",
    "find_weight",
    "find_weights",
    "fingerprint",
    "half_sample",
    "is_base",
    "is_embedding",
    "is_site",
    "of_one_weight",
    "text_layers",
]

PROJECTIONS = ("q", "k", "v", "out")
EMBEDDING = "text.token_embedding"
_EMBEDDINGS = tuple(f"{part}.token_embedding" for part in TEXT_PARTS)
_TEXT = re.compile(r"(text2?)\.(\d{1,3})\.(self_attn\.(?:q|k|v|out)_proj|mlp\.fc2)")
_UNET = re.compile(r"unet\.cross_attn\.(\d{1,3})\.(to_q|to_k|to_v|to_out)")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAMPLE = 64  # numbers of a weight in half precision that a movement stores
_ALIKE = 0.875  # least share of a sample whose float16 numbers round to the bfloat16 ones; about 0.97 for one weight
_EXACT_IN = {  # for each dtype, those that hold all its numbers
    torch.float16: (torch.float16, torch.float32, torch.float64),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
    torch.float64: (torch.float64,),
}


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of a model.

    Attributes:
        site: Its name.
        module: The `nn.Linear` or `nn.Embedding` that holds it.
        parameter: Its numbers, (D_out, D_in). Where accelerate has offloaded the module to the CPU, this is the tensor
            that accelerate stores there: a value written to it is used by the next forward pass.
        bias: The bias of the module, shape (D_out,), or `None`.
        encoder: Index of its text encoder in `model.text_encoders`; `None` in the UNet.
    """

    site: str
    module: nn.Linear | nn.Embedding
    parameter: nn.Parameter
    bias: Tensor | None
    encoder: int | None


def is_site(name: str) -> bool:
    """Return whether `name` has the form of a weight's name; a model may still lack that weight."""
    return is_embedding(name) or bool(_TEXT.fullmatch(name) or _UNET.fullmatch(name))


def is_embedding(site: str) -> bool:
    """Return whether `site` is the token embedding of a text encoder."""
    return site in _EMBEDDINGS


def find_weight(model: TextToImage, site: str) -> Weight:
    """Return the weight named `site`.

    Raises:
        UnknownSite: The name is not one of a weight, or the model has no such weight.
        UnsupportedModel: The weight is quantised, fused, wrapped by an adapter, or not in memory.
    """
    return find_weights(model, [site])[0]


def find_weights(model: TextToImage, sites: Sequence[str]) -> list[Weight]:
    """Return the weights named `sites`, in that order. The UNet is searched once. Raises as `find_weight`."""
    attentions: list[Any] | None = None
    weights: list[Weight] = []
    for site in sites:
        text, unet = _TEXT.fullmatch(site), _UNET.fullmatch(site)
        if is_embedding(site):
            index = encoder_index(model, site.partition(".")[0])
            embedding = model.text_encoders[index].get_input_embeddings()
            weights.append(_weight(site, embedding, index))
        elif text:
            block = _item(text_layers(model, text[1]), int(text[2]), site, f"{text[1]} layers")
            weights.append(
                _weight(site, _part(block, text[3], site), encoder_index(model, text[1]))
            )
        elif unet:
            if attentions is None:
                attentions = [s for s in find_unet(model.unet) if s.kind == "cross_attn"]
            attention = _item(attentions, int(unet[1]), site, "cross_attn")
            weights.append(_weight(site, _projection(attention.module(model), unet[2]), None))
        else:
            raise UnknownSite(
                f"unknown weight {site!r}: an edit can move 'text.<layer>.self_attn.<q, k, v or out>_proj' and "
                f"'text.<layer>.mlp.fc2', {EMBEDDING!r} ('text2' for a second encoder) and "
                "'unet.cross_attn.<index>.<to_q, to_k, to_v or to_out>'."
            )
    return weights


def text_layers(model: TextToImage, part: str = "text") -> list[Any]:
    """Return the blocks of a text encoder in execution order: the modules that hold a CLIP self-attention.

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
    """Return the index of the text encoder `part`, `"text"` or `"text2"`, in `model.text_encoders`.

    Raises:
        UnknownSite: The model has no encoder of that name.
    """
    known = TEXT_PARTS[: len(model.text_encoders)]
    if part not in known:
        raise UnknownSite(
            f"unknown text encoder {part!r}: this model has {' and '.join(map(repr, known))}. Name one of them with "
            "`encoder`; use a change with the model that it was made for."
        )
    return known.index(part)


def fingerprint(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and bytes (row by row, as in memory), in hexadecimal."""
    content = tensor.detach().cpu().contiguous()
    head = f"{str(content.dtype).removeprefix('torch.')} {tuple(content.shape)} "
    digest = hashlib.sha256(head.encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cast_hashes(tensor: Tensor) -> tuple[str, ...]:
    """Return `fingerprint` of `tensor` in each other dtype of a model in which its numbers may be rounded."""
    exact = _EXACT_IN[tensor.dtype]
    return tuple(fingerprint(tensor.detach().to(d)) for d in _DTYPES if d not in exact)


def is_base(tensor: Tensor, base_hash: str, casts: Sequence[str] = ()) -> bool:
    """Return whether `tensor` holds the numbers that `base_hash` is of, up to one cast between dtypes.

    Accepted are the same numbers in any dtype; a cast of the base to a dtype of `casts`, in any dtype; and numbers of
    which the base is a cast, in any dtype. Two different roundings of the same numbers are not compared; for a model
    from a folder `stored_weights.is_base_of` compares the stored numbers.

    Args:
        tensor: A weight of a model.
        base_hash: `fingerprint` of the weight that a change was made for.
        casts: `cast_hashes` of that weight; empty in old files.
    """
    present = fingerprint(tensor)
    if present == base_hash or present in casts:
        return True
    for dtype in (d for d in _DTYPES if d != tensor.dtype):
        other = tensor.detach().to(dtype)
        hashed, back = fingerprint(other), other.to(tensor.dtype)
        if hashed == base_hash:
            return True
        # either may be a cast that is kept in a wider dtype, as float16 files are in a model loaded in float32
        if (hashed in casts and back.equal(tensor)) or fingerprint(back) == base_hash:
            return True
    return False


def half_sample(tensor: Tensor) -> tuple[float, ...]:
    """Return evenly spaced numbers of a weight in half precision, for `of_one_weight`; none of other weights."""
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        return ()
    flat = tensor.detach().reshape(-1)
    return tuple(flat[:: -(-len(flat) // _SAMPLE)].cpu().double().tolist())


def of_one_weight(half: Sequence[float], brain: Sequence[float]) -> bool:
    """Return whether two samples may be one weight rounded to float16 and to bfloat16.

    No number may be further off than both roundings allow, and nearly all float16 numbers must round to the bfloat16
    ones. Weights that differ by less than a thousandth are not told apart.

    Args:
        half: `half_sample` of the float16 weight.
        brain: `half_sample` of the bfloat16 weight.
    """
    if not half or len(half) != len(brain):
        return False
    a, b = (torch.tensor(sample, dtype=torch.float64) for sample in (half, brain))
    if not (a.half().double().equal(a) and b.bfloat16().double().equal(b)):
        return False
    rounded = a.bfloat16().double()
    if rounded.equal(a):  # both are bfloat16
        return False
    # half a unit in the last place of each, and of the smallest float16 numbers
    near = (a - b).abs() <= (2.0**-8 + 2.0**-11) * torch.maximum(a.abs(), b.abs()) + 2.0**-25
    return bool(near.all()) and float((rounded == b).double().mean()) >= _ALIKE


def _weight(site: str, module: Any, encoder: int | None) -> Weight:
    parameter = _parameter(module, site)
    bias = None if getattr(module, "bias", None) is None else _parameter(module, site, "bias")
    return Weight(site, module, parameter, bias, encoder)


def _item(items: Sequence[Any], index: int, site: str, kind: str) -> Any:
    if index >= len(items):
        raise UnknownSite(
            f"unknown weight {site!r}: this model has {kind} 0 to {len(items) - 1}. Name one of those."
        )
    return items[index]


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


def _parameter(module: Any, site: str, name: str = "weight") -> nn.Parameter:
    """Return the weight or bias of `module`, from the offloading hook if it is on the meta device."""
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
    """Return the tensor that accelerate stores for a parameter on the meta device."""
    hook = getattr(module, "_hf_hook", None)
    maps = [h.weights_map for h in getattr(hook, "hooks", [hook]) if getattr(h, "weights_map", None)]  # fmt: skip
    tensor: Any = maps[0][name] if maps else None
    # A map that reads from disk returns a new tensor at each access.
    if tensor is None or tensor.device.type == "meta" or tensor is not maps[0][name]:
        raise UnsupportedModel(
            f"{site} is not in memory (it is on the meta device, or offloaded to disk): load the model without "
            "offloading, or with `enable_model_cpu_offload`, to edit it."
        )
    return tensor
