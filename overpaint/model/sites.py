"""Sites: named modules of the network, found by structure and listed in execution order.

`named_modules()` lists modules in the order of their registration (a UNet's mid block after its up blocks), and module
paths differ between releases of transformers. So sites are found by visiting the blocks in the order of `forward`, and
are counted per kind: `unet.resnet.0` is the first ResNet block that runs. `trace.hook_check` runs a model once and
checks that order.

Source of the kinds (22 resnet, 16 self_attn, 16 cross_attn, 16 mlp in Stable Diffusion 1):
Basu et al., 2024, https://arxiv.org/abs/2310.13730.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch.nn import Module

from overpaint.errors import UnknownSite, UnsupportedModel

__all__ = [
    "KINDS",
    "Kind",
    "Part",
    "Site",
    "find",
    "find_text",
    "find_texts",
    "find_unet",
    "get",
    "head_input",
    "heads",
]

Kind = Literal["resnet", "self_attn", "cross_attn", "mlp"]
KINDS: tuple[Kind, ...] = ("resnet", "self_attn", "cross_attn", "mlp")
Part = Literal["unet", "text", "text2"]
TEXT_PARTS: tuple[Part, ...] = ("text", "text2")


class HasParts(Protocol):
    """The part of a model that this module uses."""

    @property
    def unet(self) -> Any:
        """The UNet."""
        ...

    @property
    def text_encoders(self) -> Sequence[Any]:
        """The text encoders: one, or two in SDXL."""
        ...


@dataclass(frozen=True)
class Site:
    """A named module of the network.

    Attributes:
        name: `unet.<kind>.<index>` or `text.<index>.<kind>`; `text2.<index>.<kind>` in a second text encoder.
        part: `"unet"`, `"text"` or `"text2"`.
        kind: `"resnet"`, `"self_attn"`, `"cross_attn"` or `"mlp"`.
        index: In the UNet the number among the sites of its kind in execution order; in a text encoder the layer.
        path: Dotted path of the module in its part of the model.
    """

    name: str
    part: Part
    kind: Kind
    index: int
    path: str

    def module(self, model: HasParts) -> Module:
        """Return the module of `model` at this site."""
        if self.part == "unet":
            return model.unet.get_submodule(self.path)
        return model.text_encoders[TEXT_PARTS.index(self.part)].get_submodule(self.path)


def find(model: HasParts) -> tuple[Site, ...]:
    """Return all sites of `model` in execution order: those of each text encoder, then the UNet's.

    No weights are loaded for this if the model was opened from a folder.
    """
    parts = getattr(model, "structure", model)
    texts = find_texts(parts.text_encoders)
    return texts if parts.unet is None else (*texts, *find_unet(parts.unet))


def find_texts(text_encoders: Sequence[Module]) -> tuple[Site, ...]:
    """Return the sites of all text encoders of a model, one after the other."""
    return tuple(
        site
        for part, encoder in zip(TEXT_PARTS, text_encoders, strict=False)
        for site in find_text(encoder, part)
    )


def find_text(text_encoder: Module, part: Part = "text") -> tuple[Site, ...]:
    """Return the sites of a CLIP text encoder: self_attn and mlp of each layer, in execution order.

    Args:
        text_encoder: A `CLIPTextModel`, also with projection. Weights may be on the meta device.
        part: `"text"`, or `"text2"` for the second encoder of SDXL.

    Raises:
        UnsupportedModel: The module has no stack of layers with `self_attn` and `mlp`.
    """
    _check_not_compiled(text_encoder)
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
        Site(f"{part}.{i}.{kind}", part, kind, i, f"{prefix}encoder.layers.{i}.{kind}")
        for i in range(len(layers))
        for kind in ("self_attn", "mlp")
    )


def find_unet(unet: Module) -> tuple[Site, ...]:
    """Return the sites of a `UNet2DConditionModel`, in execution order. Weights may be on the meta device.

    Raises:
        UnsupportedModel: The module has other blocks, or is compiled, fused or chunked, so that hooks would not run.
    """
    _check_not_compiled(unet)
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
    """Return the site named `name`.

    Raises:
        UnknownSite: `model` has no such site.
    """
    sites = find(model)
    for site in sites:
        if site.name == name:
            return site
    raise UnknownSite(
        f"unknown site {name!r}: this model has {_site_counts(sites)}. List them with `overpaint sites`."
    )


def heads(model: HasParts, site: Site) -> int:
    """Return the number of attention heads at `site`, 0 if it is not an attention site."""
    if site.kind not in ("self_attn", "cross_attn"):
        return 0
    module: Any = site.module(model)
    return int(module.num_heads if site.part != "unet" else module.heads)


def head_input(model: HasParts, site: Site) -> Module:
    """Return the linear module whose input is the concatenated outputs of the heads, shape (B, L, heads * D_head).

    Head h has the columns h * D_head to (h + 1) * D_head - 1.

    Raises:
        ValueError: `site` is not an attention site.
    """
    if not heads(model, site):
        raise ValueError(
            f"{site.name} has no attention heads: choose a site of kind self_attn or cross_attn."
        )
    module: Any = site.module(model)
    return module.out_proj if site.part != "unet" else module.to_out[0]


def _site_counts(sites: tuple[Site, ...]) -> str:
    parts: list[str] = []
    for part in TEXT_PARTS:
        layers = [site.index for site in sites if site.part == part]
        parts += [f"{part}.0 to {layers[-1]} (self_attn, mlp)"] if layers else []
    for kind in KINDS:
        count = sum(site.part == "unet" and site.kind == kind for site in sites)
        parts += [f"unet.{kind}.0 to {count - 1}"] if count else []
    return ", ".join(parts)


def _walk(unet: Any) -> Iterator[tuple[Kind, str]]:
    """Yield (kind, path) of every site in the order in which `forward` runs them."""
    for i, block in enumerate(unet.down_blocks):
        yield from _walk_block(block, f"down_blocks.{i}")
    yield from _walk_block(unet.mid_block, "mid_block")
    for i, block in enumerate(unet.up_blocks):
        yield from _walk_block(block, f"up_blocks.{i}")


def _walk_block(block: Any, path: str) -> Iterator[tuple[Kind, str]]:
    """Yield the sites of a block: each attention after its ResNet (a mid block has one more ResNet)."""
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
                "this UNet runs its feed-forward blocks in chunks, so that hooks on them run several times: call "
                "`set_chunk_feed_forward(None)` on each block first."
            )
        for name, kind in (("attn1", "self_attn"), ("attn2", "cross_attn"), ("ff", "mlp")):
            module = getattr(block, name, None)
            if module is None:
                continue
            if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
                raise UnsupportedModel(
                    "this UNet's projections are fused, so that edits of to_k and to_v have no effect: call "
                    "`unet.unfuse_qkv_projections()` first."
                )
            yield kind, f"{path}.transformer_blocks.{j}.{name}"  # type: ignore[misc]


def _check_not_compiled(module: Module) -> None:
    """Raise if the module or a submodule was compiled with `torch.compile(m)` or `m.compile()`."""
    for path, inner in module.named_modules():
        if hasattr(inner, "_orig_mod") or inner._compiled_call_impl is not None:
            suffix = f" ({path})" if path else ""
            raise UnsupportedModel(
                f"this model is compiled{suffix}, so that hooks on its modules do not run: use the model without "
                "`torch.compile`."
            )


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True
