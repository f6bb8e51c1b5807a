"""Builders of tiny Stable Diffusion pipelines with random weights, in the layout of the published models.

The default layout is SD-1.4's: 22 ResNet blocks and 16 transformer blocks in the UNet, 12 text layers, 77 positions.
Only the widths are small, so that tests are fast and need no download.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import torch

__all__ = ["byte_letters", "clip_tokenizer", "tiny", "vocabulary"]

Layout = Literal["sd1", "sd2", "sdxl"]

# Words in the vocabulary of the tiny tokenizer; it splits a word at `|`. Names are split as in CLIP's vocabulary, so
# that token counts agree with it. In this order the merges of a word do not change the tokens of another.
_WORDS = """
johannes monet nemo tw|e|moji background grumpy snoopy japan photo rut|kowski open|moji president ver|meer
painting contrast picture british py|thon monarch charles picasso running drawing purple rocket person united
yellow fluent biden prince orange states image three house style apple green beach no|to white robot pablo
city gray flag with bird blob pink blue high greg fish tree logo gogh joe red two cat dog the van and on of in
an to a r d
"""


def tiny(layout: Layout = "sd1", *, seed: int = 0, text_layers: int = 12) -> Any:
    """Return a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` with random weights and small widths.

    Args:
        layout: `"sd1"` predicts noise and pads prompts with the end-of-text token; `"sd2"` predicts velocity, uses
            linear projections and pads with `!`; `"sdxl"` has two text encoders, whose tokenizers use these two
            paddings, a UNet of three levels, and SDXL's Euler scheduler.
        seed: Seed of the weights. The state of the global generator does not change.
        text_layers: Number of layers of the text encoder; the second one of `"sdxl"` has one more.

    Returns:
        The pipeline in float32 on the CPU: latents (4, 8, 8), pictures (3, 16, 16), text features (77, 64). For
        `"sdxl"` the width of text features is 32 + 48, and of pooled features 40.

    Raises:
        ValueError: There is no such layout.
    """
    diffusers = _diffusers()
    if layout not in ("sd1", "sd2", "sdxl"):
        raise ValueError(f"`layout` must be 'sd1', 'sd2' or 'sdxl', got {layout!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if layout == "sdxl":
            parts = {**_two_encoders(text_layers), "unet": _unet_xl().eval(), "vae": _vae().eval()}
            return diffusers.StableDiffusionXLPipeline(**parts, scheduler=_scheduler(layout))
        tokenizer = clip_tokenizer(pad="<|endoftext|>" if layout == "sd1" else "!")
        parts = {
            "tokenizer": tokenizer,
            "text_encoder": _text_encoder(tokenizer, layers=text_layers),
            "unet": _unet(layout).eval(),
            "vae": _vae().eval(),
        }
    return diffusers.StableDiffusionPipeline(
        **parts,
        scheduler=_scheduler(layout),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def clip_tokenizer(*, pad: str = "<|endoftext|>") -> Any:
    """Return a `CLIPTokenizer` of 77 positions with a short list of words as vocabulary.

    Every character has a token, so that any prompt can be encoded; listed words have one token for each part.
    """
    from transformers import CLIPTokenizer

    merges = _merges()
    return CLIPTokenizer(
        vocab=vocabulary(merges),
        merges=merges,  # type: ignore[arg-type]
        pad_token=pad,
        model_max_length=77,
    )


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the number of each token, as CLIP counts: bytes, bytes that end a word, merges, two special tokens."""
    letters = byte_letters()
    entries = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges)]
    entries = list(dict.fromkeys(entries)) + ["<|startoftext|>", "<|endoftext|>"]
    return {entry: i for i, entry in enumerate(entries)}


def _merges() -> list[tuple[str, str]]:
    """Return the merges that join the letters of each part of each word from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS.split():
        parts = word.split("|")
        for index, part in enumerate(parts):
            symbols = list(part)
            if index == len(parts) - 1:
                symbols[-1] += "</w>"
            joined = symbols[0]
            for symbol in symbols[1:]:
                merges[joined, symbol] = None
                joined += symbol
    return list(merges)


def byte_letters() -> list[str]:
    """Return the 256 printable characters that represent bytes, in the order of GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(printable))]
    return [chr(code) for code in (*printable, *others)]


def _two_encoders(layers: int) -> dict[str, Any]:
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    return {
        "tokenizer": first,
        "tokenizer_2": second,
        "text_encoder": _text_encoder(first, layers=layers, width=32),
        "text_encoder_2": _text_encoder(second, layers=layers + 1, width=48, projection=40),
    }


def _text_encoder(tokenizer: Any, *, layers: int, width: int = 64, projection: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae() -> Any:
    return _diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
    )


def _scheduler(layout: Layout) -> Any:
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if layout == "sdxl":
        return _diffusers().EulerDiscreteScheduler(
            **noise, steps_offset=1, timestep_spacing="leading"
        )
    return _diffusers().DDIMScheduler(
        **noise,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon" if layout == "sd1" else "v_prediction",
    )


def _unet(layout: str) -> Any:
    return _diffusers().UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=layout == "sd2",
    )


def _unet_xl() -> Any:
    return _diffusers().UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    )


def _diffusers() -> Any:
    """Return diffusers: imported late because that is slow, and untyped because its tuples have wrong types."""
    return import_module("diffusers")
