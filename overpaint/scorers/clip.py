"""A public CLIP as a scorer: the cosine of picture and prompt, for pictures of any size.

Papers on causal tracing of text-to-image models use this score. It is less specific than the probability of a judge and
has another scale, so thresholds for one do not apply to the other.

Source: Hessel et al., 2021 (CLIPScore), https://arxiv.org/abs/2104.08718, without its factor 2.5 and its cut at 0;
Radford et al., 2021, https://arxiv.org/abs/2103.00020, for how pictures are prepared.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.files import user_path
from overpaint.probes.text import warn_of_cuts

__all__ = ["Clip"]


class Clip:
    """A CLIP model from a folder or the hub; its method `score` is the scorer.

    Its weights are frozen. Scores and features are differentiable with respect to the pictures.

    Attributes:
        name: Folder or hub id that it was loaded from.
    """

    def __init__(self, source: str | Path, *, device: str | torch.device = "cpu") -> None:
        """Load the model and its tokenizer; a hub id may reach the network.

        Raises:
            ValueError: There is no CLIP in safetensors format.
        """
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        user_path(source, "source")  # raises if it is empty
        self.name = str(source)
        try:
            build: Any = CLIPModel  # its type hints lack the loading info
            model, about = build.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if about[
                "missing_keys"
            ]:  # of another architecture, or damaged: these weights would be random
                raise ValueError(f"it lacks {min(about['missing_keys'])}")
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot load a CLIP from {self.name!r} ({str(error).strip().splitlines()[0]}): name a folder that "
                "`CLIPModel.save_pretrained` wrote beside its tokenizer, or a hub id such as "
                "'openai/clip-vit-large-patch14'."
            ) from error
        self._warned: set[str] = set()  # texts whose cut words were named in a warning
        self._clip = model.to(device).eval().requires_grad_(False)
        self._mean, self._std = (
            torch.tensor(three, device=device).view(3, 1, 1)
            for three in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )

    def score(self, images: Tensor, probes: Sequence[Any]) -> Tensor:
        """Return the cosine of each picture with its probe's prompt, shape (N,), on the CPU.

        Args:
            images: RGB in [0, 1], shape (N, 3, H, W); resized to the input size of the model, bicubic.
            probes: One probe for each picture.
        """
        features = self.image_features(images)
        return F.cosine_similarity(features, self.text_features([p.prompt for p in probes]))

    def image_features(self, images: Tensor) -> Tensor:
        """Return the unit features of `images` (B, 3, H, W) in [0, 1], on the CPU, shape (B, D)."""
        pooled = self._clip.vision_model(pixel_values=self._pixels(images)).pooler_output
        return F.normalize(self._clip.visual_projection(pooled), dim=1).cpu()

    def layers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer of the image tower for `images`, on the CPU, each of shape (B, P, D)."""
        output = self._clip.vision_model(
            pixel_values=self._pixels(images), output_hidden_states=True
        )
        return tuple(layer.cpu() for layer in output.hidden_states[1:])

    def _pixels(self, images: Tensor) -> Tensor:
        side = int(self._clip.config.vision_config.image_size)
        pixels = images.to(self._mean)
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - self._mean) / self._std

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return the unit features of `prompts`, on the CPU, shape (N, D).

        A `CutPromptWarning` names words beyond the model's limit, which are cut off.
        """
        limit = int(self._clip.config.text_config.max_position_embeddings)
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self._mean.device)
        if tokens.input_ids.shape[1] == limit:
            warn_of_cuts(self._tokenizer, prompts, self._warned, reader=self.name, limit=limit)
        pooled = self._clip.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return F.normalize(self._clip.text_projection(pooled), dim=1).cpu()
