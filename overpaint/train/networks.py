"""The recipe of `icons`: its settings and the untrained networks that they describe.

The networks have Stable Diffusion's classes and block types at a small size, so that code for them runs on Stable
Diffusion too.
"""

from dataclasses import dataclass
from typing import Any

from overpaint.train import captions, icon_world

__all__ = [
    "CPU",
    "CUDA",
    "MERGES",
    "TOKENS",
    "Recipe",
    "build_clip",
    "build_scheduler",
    "build_unet",
    "build_vae",
]

TOKENS = 32  # positions of the text tower
MERGES = 16_000  # of CLIP's tokenizer; the vocabulary is 514 entries larger


@dataclass(frozen=True)
class Recipe:
    """Settings of the recipe."""

    merges: int = MERGES  # of the tokenizer
    held_out: str = captions.HELD_OUT  # the tenths of the captions' words that training never shows
    text_layers: int = 6  # depth of the text tower
    text_width: int = 192  # width of the text tower, and of the UNet's cross-attention
    vision_layers: int = 4  # depth of the image tower, which only trains the text tower
    vision_width: int = 128  # width of the image tower
    clip_batch: int = (
        48  # pictures in a step; the other rows are the negatives of the contrastive loss
    )
    clip_lr: float = 1e-3  # peak learning rate
    clip_ema: float = 0.99  # decay of the average of the weights
    vae_channels: tuple[int, ...] = (16, 32, 64, 96)  # three halvings: 64 -> 8 pixels
    latent_channels: int = 8  # of 8x8 latents
    vae_batch: int = 4  # pictures in a step
    vae_lr: float = 1.5e-3  # peak learning rate
    vae_ema: float = 0.99  # decay of the average of the weights
    unet_channels: tuple[int, ...] = (96, 192)  # 8x8 and 4x4, both with cross-attention
    unet_layers: int = (
        1  # pairs of ResNet and transformer blocks in a level going down, one more going up
    )
    unet_batch: int = 128  # latents in a step
    unet_lr: float = 1.5e-3  # peak learning rate
    unet_ema: float = 0.998  # decay of the average of the weights
    pictures: int = 49_152  # training pictures of the UNet of 64 pixels, drawn and encoded once
    scenes: int = 12_288  # of 128 pixels
    drop_caption: float = 0.1  # part of the rows that get the empty prompt, for guidance
    shares: tuple[float, float, float] = (
        0.14,
        0.14,
        0.72,
    )  # parts of the minutes for clip, vae and unet


CPU = Recipe()
CUDA = Recipe(
    text_layers=12,
    text_width=256,
    clip_batch=512,
    vae_batch=64,
    unet_batch=512,
    pictures=196_608,
    scenes=49_152,
)


def build_clip(recipe: Recipe, vocabulary: int) -> Any:
    """Return an untrained `CLIPModel` of this recipe."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=recipe.text_width, intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers, num_attention_heads=recipe.text_width // 32,
        max_position_embeddings=TOKENS, projection_dim=128, hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=recipe.vision_width, intermediate_size=4 * recipe.vision_width,
        num_hidden_layers=recipe.vision_layers, num_attention_heads=recipe.vision_width // 32,
        image_size=icon_world.SIZE, patch_size=8, projection_dim=128, hidden_act="quick_gelu",
    )  # fmt: skip
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128
    )
    return CLIPModel(config)


def build_vae(recipe: Recipe) -> Any:
    """Return an untrained `AutoencoderKL` of this recipe."""
    import diffusers

    build: Any = diffusers.AutoencoderKL  # its annotations allow one level only
    levels = len(recipe.vae_channels)
    return build(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels, layers_per_block=1, latent_channels=recipe.latent_channels,
        norm_num_groups=8, sample_size=icon_world.SIZE, scaling_factor=1.0, mid_block_add_attention=False,
    )  # fmt: skip


def build_unet(recipe: Recipe) -> Any:
    """Return an untrained `UNet2DConditionModel` of this recipe: Stable Diffusion's block types, two resolutions."""
    import diffusers

    build: Any = diffusers.UNet2DConditionModel  # its annotations allow one level only
    levels = len(recipe.unet_channels)
    return build(
        sample_size=icon_world.SIZE // 8, in_channels=recipe.latent_channels, out_channels=recipe.latent_channels,
        block_out_channels=recipe.unet_channels, layers_per_block=recipe.unet_layers, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * levels, up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=recipe.text_width, attention_head_dim=[c // 32 for c in recipe.unet_channels],
    )  # fmt: skip


def build_scheduler() -> Any:
    """Return DDIM with v-prediction, rescaled to zero terminal SNR, so that plain backgrounds keep their color."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,
    )  # fmt: skip
