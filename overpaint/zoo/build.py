"""Builders of tiny Stable Diffusion pipelines with random weights, in the layout of the real ones.

The layout is SD-1.4's: 22 ResNet blocks and 16 transformer blocks in the UNet, 12 text layers, 77 positions. Only the
widths are small, so that a picture takes a blink and every law of the package can be tested without a download.
"""

from importlib import import_module
from typing import Any, Literal

import torch

__all__ = ["clip_tokenizer", "tiny"]

# Words that the tiny tokenizer knows; `|` is where it splits a word. The splits of names are those of CLIP's own
# vocabulary, so that token counts agree with it. In this order no word's merges break another's.
_WORDS = """
johannes monet nemo tw|e|moji background grumpy snoopy japan photo rut|kowski open|moji president ver|meer
painting contrast picture british py|thon monarch charles picasso running drawing purple rocket person united
yellow fluent biden prince orange states image three house style apple green beach no|to white robot pablo
city gray flag with bird blob pink blue high greg fish tree logo gogh joe red two cat dog the van and on of in
an to a r d
"""


def tiny(layout: Literal["sd1", "sd2"] = "sd1", *, seed: int = 0, text_layers: int = 12) -> Any:
    """Build a `StableDiffusionPipeline` with small random weights.

    Args:
        layout: `"sd1"` predicts noise and pads prompts with the end-of-text token; `"sd2"` predicts velocity, uses
            linear projections and pads with `!`.
        seed: Of the weights. The global generator is left as it was.
        text_layers: Depth of the text encoder.

    Returns:
        The pipeline in float32 on the CPU: latents (4, 8, 8), pictures (3, 16, 16), text features (77, 64).
    """
    from transformers import CLIPTextModel

    diffusers = _diffusers()
    if layout not in ("sd1", "sd2"):
        raise ValueError(f"`layout` must be 'sd1' or 'sd2', got {layout!r}.")
    tokenizer = clip_tokenizer(pad="<|endoftext|>" if layout == "sd1" else "!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(tokenizer, text_layers)).eval()
        unet = _unet(layout).eval()
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 16),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=16,
        ).eval()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon" if layout == "sd1" else "v_prediction",
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def clip_tokenizer(*, pad: str = "<|endoftext|>") -> Any:
    """Build a `CLIPTokenizer` of 77 positions from a short list of words, without any file.

    Every character has a token, so that any prompt can be encoded; listed words have one token a part.
    """
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    merges = _merges()
    entries = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges)]
    entries = list(dict.fromkeys(entries)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={entry: i for i, entry in enumerate(entries)},
        merges=merges,  # type: ignore[arg-type]
        pad_token=pad,
        model_max_length=77,
    )


def _merges() -> list[tuple[str, str]]:
    """Return merges that join each part of each word from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS.split():
        parts = word.split("|")
        for place, part in enumerate(parts):
            symbols = list(part)
            if place == len(parts) - 1:
                symbols[-1] += "</w>"
            joined = symbols[0]
            for symbol in symbols[1:]:
                merges[joined, symbol] = None
                joined += symbol
    return list(merges)


def _byte_letters() -> list[str]:
    """Return the 256 printable stand-ins for bytes, in the order of GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(printable))]
    return [chr(code) for code in (*printable, *others)]


def _text_config(tokenizer: Any, layers: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
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


def _diffusers() -> Any:
    """Return diffusers, late since it is slow to import, and untyped since its tuples are mistyped."""
    return import_module("diffusers")
