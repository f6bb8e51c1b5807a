"""Site: a named place in the network, found by structure, in execution order.

`named_modules()` lists modules in the order they were registered (a UNet's mid block after its up blocks), and paths
differ between releases of transformers. So sites are found by walking the blocks as `forward` does, and counted per
kind: `unet.resnet.0` is the first ResNet block that runs.

Source of the kinds (22 resnet, 16 self_attn, 16 cross_attn, 16 mlp in Stable Diffusion 1):
Basu et al., 2024, https://arxiv.org/abs/2310.13730.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch.nn import Module

from overpaint.errors import UnknownSite, UnsupportedModel

__all__ = ["KINDS", "Kind", "Site", "find", "find_text", "find_unet", "get"]

Kind = Literal["resnet", "self_attn", "cross_attn", "mlp"]
KINDS: tuple[Kind, ...] = ("resnet", "self_attn", "cross_attn", "mlp")


class HasParts(Protocol):
    """A model as far as this file needs it."""

    @property
    def unet(self) -> Any:
        """The UNet."""
        ...

    @property
    def text_encoder(self) -> Any:
        """The text encoder."""
        ...


@dataclass(frozen=True)
class Site:
    """A place in the network.

    Attributes:
        name: `unet.<kind>.<index>` or `text.<index>.<kind>`.
        part: `"unet"` or `"text"`.
        kind: `"resnet"`, `"self_attn"`, `"cross_attn"` or `"mlp"`.
        index: In the UNet the place among its kind in execution order; in the text encoder the layer.
        path: Dotted path of the module inside its part, in the model it was found in.
    """

    name: str
    part: Literal["unet", "text"]
    kind: Kind
    index: int
    path: str

    def module(self, model: HasParts) -> Module:
        """Return the module of `model` at this site."""
        part = model.unet if self.part == "unet" else model.text_encoder
        return part.get_submodule(self.path)


def find(model: HasParts) -> tuple[Site, ...]:
    """Return all sites of `model` in execution order: the text encoder's, then the UNet's."""
    return find_text(model.text_encoder) + find_unet(model.unet)


def find_text(text_encoder: Module) -> tuple[Site, ...]:
    """Return the sites of a CLIP text encoder: self_attn and mlp of each layer, in execution order.

    Raises:
        UnsupportedModel: The module has no stack of layers with `self_attn` and `mlp`.
    """
    _refuse_compiled(text_encoder)
    prefix = next(
        (p for p in ("", "text_model.") if _has(text_encoder, f"{p}encoder.layers")), None
    )
    layers: Any = () if prefix is None else text_encoder.get_submodule(f"{prefix}encoder.layers")
    if not layers or not all(_has(layer, "self_attn") and _has(layer, "mlp") for layer in layers):
        raise UnsupportedModel(
            f"{type(text_encoder).__name__} has no encoder layers with self_attn and mlp: pass a model whose text "
            "encoder is a `CLIPTextModel`."
        )
    return tuple(
        Site(f"text.{i}.{kind}", "text", kind, i, f"{prefix}encoder.layers.{i}.{kind}")
        for i in range(len(layers))
        for kind in ("self_attn", "mlp")
    )


def find_unet(unet: Module) -> tuple[Site, ...]:
    """Return the sites of a `UNet2DConditionModel`, in execution order. Weights may be on the meta device.

    Raises:
        UnsupportedModel: The module has other blocks, or is compiled, fused or chunked, so that hooks would be missed.
    """
    _refuse_compiled(unet)
    if not all(_has(unet, name) for name in ("down_blocks", "mid_block", "up_blocks")):
        raise UnsupportedModel(
            f"{type(unet).__name__} has no down, mid and up blocks: pass a model whose denoiser is a "
            "`UNet2DConditionModel`."
        )
    counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    sites: list[Site] = []
    for kind, path in _walk(unet):
        sites.append(Site(f"unet.{kind}.{counts[kind]}", "unet", kind, counts[kind], path))
        counts[kind] += 1
    return tuple(sites)


def get(model: HasParts, name: str) -> Site:
    """Return the site called `name`.

    Raises:
        UnknownSite: `model` has no such site.
    """
    sites = find(model)
    for site in sites:
        if site.name == name:
            return site
    raise UnknownSite(
        f"unknown site {name!r}: this model has {_census(sites)}. List them with `overpaint sites`."
    )


def _census(sites: tuple[Site, ...]) -> str:
    layers = 1 + max(site.index for site in sites if site.part == "text")
    kinds = [
        f"unet.{kind}.0 to {sum(s.part == 'unet' and s.kind == kind for s in sites) - 1}"
        for kind in KINDS
    ]
    return f"text.0 to {layers - 1} (self_attn, mlp), " + ", ".join(kinds)


def _walk(unet: Any) -> Iterator[tuple[Kind, str]]:
    """Yield (kind, path) of every block in the order in which `forward` runs them."""
    for i, block in enumerate(unet.down_blocks):
        yield from _walk_block(block, f"down_blocks.{i}")
    yield from _walk_block(unet.mid_block, "mid_block")
    for i, block in enumerate(unet.up_blocks):
        yield from _walk_block(block, f"up_blocks.{i}")


def _walk_block(block: Any, path: str) -> Iterator[tuple[Kind, str]]:
    """Yield a block's sites: each attention after its ResNet (a mid block has one ResNet more)."""
    if not _has(block, "resnets"):
        raise UnsupportedModel(
            f"{type(block).__name__} ({path}) has no ResNet blocks: this UNet's layout is not supported."
        )
    attentions = list(getattr(block, "attentions", None) or ())
    for i in range(len(block.resnets)):
        yield "resnet", f"{path}.resnets.{i}"
        if i < len(attentions) and attentions[i] is not None:
            yield from _walk_attention(attentions[i], f"{path}.attentions.{i}")


def _walk_attention(wrapper: Any, path: str) -> Iterator[tuple[Kind, str]]:
    if not _has(wrapper, "transformer_blocks"):
        raise UnsupportedModel(
            f"{type(wrapper).__name__} ({path}) has no transformer blocks: this UNet's layout is not supported."
        )
    for j, block in enumerate(wrapper.transformer_blocks):
        if getattr(block, "_chunk_size", None) is not None:
            raise UnsupportedModel(
                "this UNet runs its feed-forward blocks in chunks, which hides them: call "
                "`set_chunk_feed_forward(None)` on each block first."
            )
        for name, kind in (("attn1", "self_attn"), ("attn2", "cross_attn"), ("ff", "mlp")):
            module = getattr(block, name, None)
            if module is None:
                continue
            if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
                raise UnsupportedModel(
                    "this UNet's projections are fused, so edits of to_k and to_v would be missed: call "
                    "`unet.unfuse_qkv_projections()` first."
                )
            yield kind, f"{path}.transformer_blocks.{j}.{name}"  # type: ignore[misc]


def _refuse_compiled(module: Module) -> None:
    if hasattr(module, "_orig_mod"):
        raise UnsupportedModel(
            "this model is compiled, which hides its modules from hooks: use the model as it was "
            "before `torch.compile`."
        )


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True
