r"""DiffSTE in the size of its paper: the inpainting UNet of Stable Diffusion with a second branch of characters.

`build` makes the networks without weights on the meta device, or with random ones. `load_unet` copies a stock
inpainting UNet and leaves the character branch new; `load` reads a folder that `save` wrote; `from_published` renames
the entries of the published checkpoint, once these are saved as safetensors.

The published checkpoint is a file of PyTorch Lightning whose `state_dict` has four prefixes: `vae.` and
`text_encoder.`, frozen, as in Stable Diffusion; `char_embedder.` with `char_embedding.weight` (95, 32),
`position_embedding.weight` (20, 32) and the buffer `position_ids`; and `unet.`, whose blocks hold the transformers as
`<block>.attentions.text.<n>.*` and `<block>.attentions.char.<n>.*`. Here they are `<block>.attentions.<n>.text.*` and
`<block>.attentions.<n>.char.*`; all other names agree with diffusers. The file is a pickle, which is never read here.

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568; the names are those of UCSB-NLP-Chang/DiffSTE
(MIT). Rombach et al., 2022, https://arxiv.org/abs/2112.10752, for the UNet.
Deviations: none in `branch` mode; `decoupled` mode is smaller, see `attention`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overpaint import files
from overpaint.errors import UnsupportedModel
from overpaint.scene_text.attention import Branches, install_branches, install_decoupled
from overpaint.scene_text.encoders import CharacterEncoder

__all__ = ["FullSize", "build", "from_published", "load", "load_unet", "save", "unet_settings"]

TEXT_LENGTH = 20
TEXT_WIDTH = 32
_CHARACTER_NAMES = {
    "char_embedding.weight": "embedding.weight",
    "position_embedding.weight": "position_embedding.weight",
}


@dataclass(frozen=True, eq=False)
class FullSize:
    """The trained parts of DiffSTE.

    Attributes:
        unet: `UNet2DConditionModel` of 9 input channels (noisy latents, mask, masked latents), whose
            `encoder_hidden_states` are `Conditions`.
        characters: Encoder of 20 characters, 32 wide.
        mode: `"branch"` or `"decoupled"`.
    """

    unet: Any
    characters: CharacterEncoder
    mode: str


def unet_settings(*, width: int = 320) -> dict[str, Any]:
    """Return the arguments of `UNet2DConditionModel` for the inpainting UNet of Stable Diffusion 1.

    Args:
        width: Channels of the first level; smaller for tests.
    """
    return {
        "sample_size": 64, "in_channels": 9, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768, "attention_head_dim": 8,
    }  # fmt: skip


def build(
    mode: str = "branch", *, settings: Mapping[str, Any] | None = None, device: str = "meta"
) -> FullSize:
    """Return the networks without weights, or with random ones on another device.

    Args:
        mode: `"branch"`, the network of the public code: 859.5 M parameters and 248.9 M of the character branch; or
            `"decoupled"`, with 0.8 M for the characters.
        settings: Of `unet_settings`; by default those of Stable Diffusion.
        device: `"meta"`, `"cpu"` or another.

    Raises:
        ValueError: There is no such mode.
    """
    if mode not in ("branch", "decoupled"):
        raise ValueError(
            f"`mode` must be 'branch' or 'decoupled', got {mode!r}: leave it out for 'branch'."
        )
    diffusers: Any = import_module("diffusers")
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(**(settings or unet_settings()))
        install = install_branches if mode == "branch" else install_decoupled
        install(unet, TEXT_WIDTH)
        characters = CharacterEncoder(TEXT_LENGTH, TEXT_WIDTH, both_ends=False, has_layout=False)
    return FullSize(unet.eval(), characters.eval(), mode)


def load_unet(model: FullSize, weights: Mapping[str, Tensor], *, is_harmless: bool = False) -> None:
    """Copy the weights of a stock inpainting UNet into the UNet and the instruction branch.

    Args:
        model: On a device with memory; changed in place.
        weights: State dict of a `UNet2DConditionModel` of the same sizes.
        is_harmless: Set the last layer of each character branch to zero, so that the network starts closer to the stock
            one; DiffSTE starts it at random. The mean still halves what the instruction branch adds.

    Raises:
        UnsupportedModel: Names or shapes differ.
    """
    renamed = dict(weights)
    if model.mode == "branch":
        renamed = {
            re.sub(r"attentions\.(\d+)\.", r"attentions.\1.text.", k): v for k, v in weights.items()
        }
    own = model.unet.state_dict()
    new = {k for k in own if ".char." in k or "_char." in k}
    if set(renamed) != set(own) - new or any(own[k].shape != v.shape for k, v in renamed.items()):
        raise UnsupportedModel(
            "the weights are not those of an inpainting UNet of these sizes: load Stable Diffusion 1 inpainting, with "
            "9 input channels."
        )
    model.unet.load_state_dict(renamed, strict=False)
    if is_harmless:
        for module in model.unet.modules():
            if isinstance(module, Branches):
                output: Any = module.char.proj_out
                nn.init.zeros_(output.weight)
                nn.init.zeros_(output.bias)


def from_published(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dicts of UNet and character encoder from the entries of the published checkpoint.

    Args:
        weights: Its `state_dict`, of which `vae.` and `text_encoder.` are left out.

    Raises:
        UnsupportedModel: It has no entries of a UNet or of a character encoder.
    """
    unet = {
        re.sub(
            r"attentions\.(text|char)\.(\d+)\.", r"attentions.\2.\1.", key.removeprefix("unet.")
        ): value
        for key, value in weights.items()
        if key.startswith("unet.")
    }
    characters = {
        new: weights[f"char_embedder.{old}"]
        for old, new in _CHARACTER_NAMES.items()
        if f"char_embedder.{old}" in weights
    }
    if not unet or len(characters) != len(_CHARACTER_NAMES):
        raise UnsupportedModel(
            "the weights have no `unet.` or `char_embedder.` entries: give the `state_dict` of DiffSTE's checkpoint."
        )
    return unet, characters


def save(model: FullSize, folder: str | Path, *, settings: Mapping[str, Any] | None = None) -> None:
    """Write `config.json`, `unet.safetensors` and `characters.safetensors`, each atomically.

    Args:
        model: The networks.
        folder: Where to write.
        settings: Those that the model was built with.
    """
    folder = files.user_path(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("unet", model.unet), ("characters", model.characters)):
        tensors = {k: v.detach().cpu().contiguous() for k, v in part.state_dict().items()}
        with files.atomic(folder / f"{name}.safetensors") as draft:
            save_file(tensors, draft)
    files.write_json(
        folder / "config.json", {"mode": model.mode, "unet": dict(settings or unet_settings())}
    )


def load(folder: str | Path) -> FullSize:
    """Return the networks of a folder that `save` wrote, on the CPU.

    Raises:
        UnsupportedModel: The configuration is damaged, or the weights do not fit it; no entry may be missing.
        OSError: A file is missing.
    """
    folder = files.user_path(folder, "folder")
    path = folder / "config.json"
    try:
        entries = files.from_json(path.read_bytes())
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in entries["unet"].items()}
        model = build(entries["mode"], settings=settings, device="cpu")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UnsupportedModel(
            f"{str(path)!r} is no configuration of DiffSTE ({str(error)[:200]}): it must be what `full_size.save` "
            "writes. Save the model again."
        ) from error
    for name, part in (("unet", model.unet), ("characters", model.characters)):
        path = folder / f"{name}.safetensors"
        try:
            part.load_state_dict(load_file(path))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedModel(
                f"the weights in {str(path)!r} do not fit the configuration beside them ({reason}): save the "
                "model again."
            ) from error
    return model
