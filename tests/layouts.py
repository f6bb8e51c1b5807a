"""Stable Diffusion folders with CLIP's real vocabulary and tiny random weights: 1.5, 2.1, XL and inpainting.

The vocabulary is the file of the package open-clip-torch, which `make setup` installs without its dependencies. A text
encoder here has all 49,408 rows in its token embedding, so that words share tokens as they do in real checkpoints.
"""

import functools
import gzip
from importlib.metadata import distribution
from pathlib import Path

import torch

LAYOUTS = ("sd1", "sd2", "sdxl", "inpainting")
_VOCABULARY = "open_clip/bpe_simple_vocab_16e6.txt.gz"


@functools.cache
def vocabulary():
    """Return CLIP's vocabulary (token to number, 49,408 of them) and its merges."""
    from overpaint.zoo import builders

    path = Path(str(distribution("open-clip-torch").locate_file(_VOCABULARY)))
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    return builders.vocabulary(merges), merges


def tokenizer(*, pad="<|endoftext|>"):
    """Return a `CLIPTokenizer` with CLIP's vocabulary."""
    from transformers import CLIPTokenizer

    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def pipeline(layout, *, seed=0, text_layers=2):
    """Return a pipeline of `layout` with small random weights and the real vocabulary."""
    import diffusers

    from overpaint.zoo import builders

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scheduler = builders._scheduler("sdxl" if layout == "sdxl" else layout)
        if layout == "sdxl":
            first, second = tokenizer(), tokenizer(pad="!")
            return diffusers.StableDiffusionXLPipeline(
                tokenizer=first, tokenizer_2=second,
                text_encoder=builders._text_encoder(first, layers=text_layers, width=32),
                text_encoder_2=builders._text_encoder(second, layers=text_layers + 1, width=48, projection=40),
                unet=builders._unet_xl().eval(), vae=builders._vae().eval(), scheduler=scheduler,
            )  # fmt: skip
        words = tokenizer(pad="!" if layout == "sd2" else "<|endoftext|>")
        parts = {
            "tokenizer": words,
            "text_encoder": builders._text_encoder(words, layers=text_layers),
            "unet": _unet(layout).eval(),
            "vae": builders._vae().eval(),
            "scheduler": scheduler,
        }
        if layout == "inpainting":
            return diffusers.StableDiffusionInpaintPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        if layout == "sd1":
            return diffusers.StableDiffusionPipeline(**parts, **_safety_checker())
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


def folder(path, layout, *, dtype=torch.float32, variant=None, **options):
    """Write the pipeline of `layout` as a folder at `path` and return the path."""
    pipeline(layout, **options).to(dtype).save_pretrained(path, variant=variant)
    return Path(path)


def _unet(layout):
    from overpaint.zoo import builders

    if layout != "inpainting":
        return builders._unet(layout)
    unet = builders._unet("sd1")
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")} | {"in_channels": 9}
    return type(unet).from_config(config)


def _safety_checker():
    """Return a tiny safety checker and feature extractor, as every SD 1.5 folder has them."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tower = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 8},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    checker = StableDiffusionSafetyChecker(config).eval()
    return {
        "safety_checker": checker,
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        "requires_safety_checker": True,
    }
