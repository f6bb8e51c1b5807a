"""Convert weight names of diffusers to those of an LDM (CompVis) checkpoint of Stable Diffusion 1.

Names are derived from the blocks of the model, not from a table of SD-1.4's names, so a smaller model of the same
layout works too.

Source: the module tree of CompVis/latent-diffusion (`openaimodel.py`, `model.py`), Rombach et al., 2022,
https://arxiv.org/abs/2112.10752.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.pipeline_folder import stored_dtype

__all__ = ["state"]

Name = tuple[str, str]  # path of a module in diffusers, and in LDM

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXT = "cond_stage_model.transformer.text_model."
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_BLOCK = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out": "proj_out",
}


def state(model: TextToImage, *, stored: bool = False) -> dict[str, Tensor]:
    """Return all weights of `model` under LDM's names; no tensor is copied that keeps its dtype.

    Args:
        model: The model.
        stored: Convert each part to the dtype in which the model's folder stores it.

    Raises:
        UnsupportedModel: The model is not of Stable Diffusion 1's layout.
    """
    config = model.unet.config
    if len(model.text_encoders) > 1 or config.use_linear_projection:
        raise UnsupportedModel(
            f"{model.name!r} is not of Stable Diffusion 1's layout, the only one that can be a single file: export a "
            "folder instead."
        )
    text = model.text_encoder.state_dict()
    parts = {
        "unet": _renamed(model.unet.state_dict(), dict(_unet(model.unet)), _UNET_RESNET, _UNET),
        "vae": _vae_state(model.vae),
        "text_encoder": {_TEXT + n.removeprefix("text_model."): t for n, t in text.items()},
    }
    if stored and model.folder is not None:
        for part, tensors in parts.items():
            dtype = stored_dtype(model.folder.files_of(part))
            parts[part] = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}


def _vae_state(vae: Any) -> dict[str, Tensor]:
    """Return the weights of the VAE; its attention's projections are 1x1 convolutions in LDM."""
    weights = _renamed(vae.state_dict(), dict(_vae(vae)), _VAE_BLOCK, _VAE)
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in weights.items()
    }


def _renamed(
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, str],
    inside: Mapping[str, str],
    prefix: str,
) -> dict[str, Tensor]:
    """Return `tensors` renamed: the module by `modules`, the first name inside it by `inside`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = next((old for old in modules if name.startswith(f"{old}.")), None)
        if module is None:
            raise UnsupportedModel(
                f"the weight {name!r} has no name in Stable Diffusion 1's single file: export a folder instead."
            )
        head, *rest = name.removeprefix(f"{module}.").split(".")
        if head == "to_out":  # a list of a projection and dropout in diffusers
            rest = rest[1:]
        renamed[".".join([prefix + modules[module], inside.get(head, head), *rest])] = tensor
    return renamed


def _unet(unet: Any) -> Iterator[Name]:
    """Yield the names of the UNet's modules: LDM numbers all blocks with a skip connection consecutively."""
    yield "conv_in", "input_blocks.0.0"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    row = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield from _layer(block, f"down_blocks.{i}", j, f"input_blocks.{row}")
            row += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{row}.0.op"
            row += 1
    for j, place in enumerate((0, 2)):
        yield f"mid_block.resnets.{j}", f"middle_block.{place}"
    yield "mid_block.attentions.0", "middle_block.1"
    row = -1
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            row += 1
            yield from _layer(block, f"up_blocks.{i}", j, f"output_blocks.{row}")
        if block.upsamplers:
            place = 2 if hasattr(block, "attentions") else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{row}.{place}.conv"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _layer(block: Any, path: str, j: int, place: str) -> Iterator[Name]:
    yield f"{path}.resnets.{j}", f"{place}.0"
    if hasattr(block, "attentions"):
        yield f"{path}.attentions.{j}", f"{place}.1"


def _vae(vae: Any) -> Iterator[Name]:
    """Yield the names of the VAE's modules; LDM numbers the decoder's blocks from the last one to the first."""
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name
    sides = (
        ("encoder", "down", vae.encoder.down_blocks, "downsample"),
        ("decoder", "up", vae.decoder.up_blocks, "upsample"),
    )
    for side, way, blocks, resize in sides:
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
        yield f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        for j in range(2):
            yield f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}"
        for i, block in enumerate(blocks):
            place = f"{side}.{way}.{i if way == 'down' else len(blocks) - 1 - i}"
            for j in range(len(block.resnets)):
                yield f"{side}.{way}_blocks.{i}.resnets.{j}", f"{place}.block.{j}"
            yield f"{side}.{way}_blocks.{i}.{resize}rs.0.conv", f"{place}.{resize}.conv"
