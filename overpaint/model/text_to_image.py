"""TextToImage: load a text-to-image model and use its parts.

The diffusers pipeline stays in reach as `model.pipe`; its `__call__`, safety checker and progress bars are not used.
"""

import math
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module
from torch.nn.functional import pad

from overpaint import zoo
from overpaint.errors import UnsupportedModel
from overpaint.images.pictures import Pictures
from overpaint.model import checkpoint
from overpaint.model.sampling import denoise

__all__ = ["TextToImage", "load", "text_features"]

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class TextToImage:
    """A Stable Diffusion pipeline (versions 1 and 2, and SDXL), taken apart.

    Attributes:
        pipe: The diffusers pipeline, live: what changes there changes here.
        name: Where it was loaded from.
        guidance_scale: What `generate` uses unless told otherwise; 7.5, or 5 for SDXL, as diffusers has it.
        held_out: (object, style) pairs that its training never showed, where that is known.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        name: str,
        guidance_scale: float | None = None,
        held_out: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        self.pipe = pipe
        self.name = name
        self.held_out = held_out
        usual = 7.5 if len(self.text_encoders) == 1 else 5.0
        self.guidance_scale = usual if guidance_scale is None else guidance_scale

    @property
    def text_encoder(self) -> Any:
        """The `CLIPTextModel`; the first one, where there are two."""
        return self.pipe.text_encoder

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """Every text encoder: one, or in SDXL also a `CLIPTextModelWithProjection`."""
        second = getattr(self.pipe, "text_encoder_2", None)
        return (self.text_encoder,) if second is None else (self.text_encoder, second)

    @property
    def tokenizer(self) -> Any:
        """The `CLIPTokenizer`; the first one, where there are two."""
        return self.pipe.tokenizer

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """The tokenizer of each text encoder; SDXL's two differ in how they pad."""
        return (
            (self.tokenizer,)
            if len(self.text_encoders) == 1
            else (self.tokenizer, self.pipe.tokenizer_2)
        )

    @property
    def unet(self) -> Any:
        """The `UNet2DConditionModel`."""
        return self.pipe.unet

    @property
    def vae(self) -> Any:
        """The `AutoencoderKL`."""
        return self.pipe.vae

    @property
    def scheduler(self) -> Any:
        """The scheduler; every run works on a copy of its settings."""
        return self.pipe.scheduler

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures, in pixels."""
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return height * scale, width * scale

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the UNet's weights."""
        return next(self.unet.parameters()).dtype

    def tokenize(self, prompts: Sequence[str], *, encoder: int = 0) -> Tensor:
        """Return the token ids of `prompts` for a text encoder, padded and cut to the limit, int64, shape (N, L)."""
        tokenizer = self.tokenizers[encoder]
        return tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the text features of `prompts`, as `text_features` packs them; without an attention mask.

        `encode([""])` is what the unconditional branch of the guidance sees: for SDXL that is zero where the
        pipeline's setting `force_zeros_for_empty_prompt` says so (as it does by default), and not what its encoders
        make of an empty prompt.

        Args:
            prompts: N prompts.

        Returns:
            Shape (N, 77, D), for SDXL (N, 78, D).
        """
        ids = [self.tokenize(prompts, encoder=i) for i in range(len(self.text_encoders))]
        features = text_features(self.text_encoders, [rows.to(self.device) for rows in ids])
        if len(ids) == 2 and self.pipe.config.get("force_zeros_for_empty_prompt", True):
            features[[i for i, prompt in enumerate(prompts) if prompt == ""]] = 0
        return features

    def initial_latents(
        self, seeds: Sequence[int], *, steps: int | None = None, scheduler: Any = None
    ) -> Tensor:
        """Return the noise each seed starts from, shape (N, C, h, w), scaled as the scheduler asks.

        Each row has a CPU generator of its own, so that it depends neither on its neighbours nor on the device.

        Args:
            seeds: One a row.
            steps: How many there will be; with some schedulers (SDXL's own) the scale depends on it. Their longest
                schedule if `None`.
            scheduler: Whose scale to take, instead of the model's.
        """
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (self.unet.config.in_channels, height, width)
        rows = [torch.randn(shape, generator=Generator().manual_seed(seed)) for seed in seeds]
        base = self.scheduler if scheduler is None else scheduler
        fresh = type(base).from_config(base.config)  # the live one may have been used
        if steps is not None:
            fresh.set_timesteps(steps)
        return (torch.stack(rows) * fresh.init_noise_sigma).to(self.device, self.dtype)

    def noise_pred(self, latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the UNet's prediction at timestep `t`: noise or velocity, shape of `latents` (B, C, h, w)."""
        embeds = prompt_embeds.to(latents.dtype)
        if len(self.text_encoders) == 1:
            return self.unet(latents, t, encoder_hidden_states=embeds).sample
        pooled = embeds[:, -1, : self.text_encoders[-1].config.projection_dim]
        added = {
            "text_embeds": pooled,
            "time_ids": self._time_ids().to(embeds).expand(len(embeds), -1),
        }
        return self.unet(
            latents, t, encoder_hidden_states=embeds[:, :-1], added_cond_kwargs=added
        ).sample

    def _time_ids(self) -> Tensor:
        """Return what SDXL is told of the picture, shape (6,): drawn at its own size, not cropped, shown at that."""
        size = self.unet.config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        pixels = [side * factor for side in sides]
        return torch.tensor([*pixels, 0, 0, *pixels])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of `latents` (N, C, h, w): RGB in [0, 1], float32, shape (N, 3, H, W).

        SDXL's decoder overflows in float16: where its setting `force_upcast` says so it runs in float32 for the
        while, which gives its weights back bit for bit.
        """
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        scaled = latents / config.scaling_factor + shift
        half = len(self.text_encoders) == 2 and self.vae.dtype == torch.float16
        if not (half and config.force_upcast):
            images = self.vae.decode(scaled).sample
            return (images.float() / 2 + 0.5).clamp(0, 1)
        try:
            images = self.vae.to(torch.float32).decode(scaled.float()).sample
        finally:
            self.vae.to(torch.float16)
        return (images / 2 + 0.5).clamp(0, 1)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        guidance_scale: float | None = None,
        batch_size: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Pictures:
        """Draw a picture for each prompt.

        A row depends on its prompt and seed alone: neither on its neighbours nor, to 1e-4, on `batch_size`.

        Args:
            prompts: What to draw, N prompts or one.
            seed: One for all prompts, or one a prompt.
            steps: Denoising steps.
            guidance_scale: Weight of the prompt against the empty prompt; the model's own default if `None`.
            batch_size: Pictures at a time.
            on_progress: Called after each step with the steps done and the steps in all.

        Returns:
            The pictures, on the CPU, with the settings that made them.

        Raises:
            ValueError: No prompts, not as many seeds as prompts, or a setting out of range.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seed] * len(texts) if isinstance(seed, int) else list(seed)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        _check_request(texts, seeds, scale, steps=steps, batch_size=batch_size)
        distinct = list(dict.fromkeys(["", *texts]))
        embeds = torch.cat([self.encode(part) for part in _slices(distinct, batch_size)])
        rows = torch.tensor([distinct.index(text) for text in texts], device=embeds.device)
        batches = _slices(list(range(len(texts))), batch_size)
        done = 0
        images: list[Tensor] = []

        def tick(*_: object) -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(done, max(done, steps * len(batches)))

        for batch in batches:
            chosen = [seeds[i] for i in batch]
            latents = denoise(
                self,
                self.initial_latents(chosen, steps=steps),
                embeds[rows[batch[0] : batch[-1] + 1]],
                embeds[:1],
                steps=steps,
                guidance_scale=scale,
                on_step=tick,
                generators=[Generator().manual_seed(s + 1) for s in chosen],
            )
            images.append(self.decode(latents).cpu())
        protocol = self.protocol(steps=steps, guidance_scale=scale)
        return Pictures(torch.cat(images), tuple(texts), tuple(seeds), protocol)

    def protocol(self, *, steps: int, guidance_scale: float) -> dict[str, Any]:
        """Return what made a picture or a number, ready for JSON."""
        return {
            "model": self.name,
            "text_encoders": len(self.text_encoders),
            "steps": steps,
            "guidance_scale": guidance_scale,
            "scheduler": type(self.scheduler).__name__,
            "prediction_type": self.scheduler.config.get("prediction_type", "epsilon"),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }


def text_features(encoders: Sequence[Module], ids: Sequence[Tensor]) -> Tensor:
    """Return text features in one tensor, so that they can be sampled, traced and stored as one.

    One encoder (Stable Diffusion 1 and 2): its last hidden state, shape (N, L, D). Two (SDXL): their penultimate
    hidden states side by side, D = D_1 + D_2, and below them as one row more the pooled output of the second, filled
    up with zeros: shape (N, L + 1, D). `TextToImage.noise_pred` takes that apart again.

    Args:
        encoders: The text encoders, one or two.
        ids: Token ids for each of them, shape (N, L), on its device.

    Source: Podell et al., 2023 (SDXL), https://arxiv.org/abs/2307.01952, section 2.1.
    """
    if len(encoders) == 1:
        return encoders[0](ids[0])[0]
    outputs = [
        encoder(rows, output_hidden_states=True)
        for encoder, rows in zip(encoders, ids, strict=True)
    ]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = outputs[-1].text_embeds
    row = pad(pooled, (0, hidden.shape[-1] - pooled.shape[-1]))
    return torch.cat([hidden, row[:, None]], dim=1)


def load(
    source: Any, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TextToImage:
    """Load a model; the only function of the package, with `features.load`, that may reach the network.

    Args:
        source: A name from the zoo (`"icons"`), a diffusers folder, a hub id (`"owner/name"`), or a live
            `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, which stays as it is: then `device` and `dtype`
            are not used.
        device: Where to put the weights.
        dtype: Number format to load into, whatever is on disk.

    Raises:
        UnsupportedModel: A pickle, a foreign or damaged folder, another layout, or weights that are not finite.
        ValueError: The name is unknown.
    """
    if not isinstance(source, str | Path):
        checkpoint.check(source)
        return TextToImage(source, name=str(source.config.get("_name_or_path") or "live pipeline"))
    text = str(source)
    if text in _pipelines() or Path(text).is_dir():
        folder = zoo.folder(text) if text in _pipelines() else Path(text)
        pipe, settings = checkpoint.read_folder(folder, dtype=dtype)
    elif Path(text).suffix in (*_PICKLES, ".safetensors"):
        raise UnsupportedModel(_single_file_message(text))
    elif isinstance(source, str) and _is_hub_id(text):
        pipe, settings = checkpoint.read_hub(text, dtype=dtype)
    else:
        raise ValueError(
            f"unknown model {text!r}: it is neither a folder nor a name that ships with the package "
            f"({', '.join(_pipelines()) or 'none'}). Check the spelling, or give a hub id such as 'owner/name'."
        )
    checkpoint.check(pipe)
    return TextToImage(pipe.to(device), name=text, **settings)


def _pipelines() -> tuple[str, ...]:
    """Return the zoo's names that are text-to-image models."""
    return tuple(name for name in zoo.names() if (zoo.folder(name) / "model_index.json").is_file())


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) is not None


def _single_file_message(text: str) -> str:
    if Path(text).suffix in _PICKLES:
        return (
            f"{text!r} is a pickle, which can run any code when it is read: use the model's folder of safetensors "
            "instead, or convert it on a machine where that does no harm."
        )
    return (
        f"{text!r} is a single file without the model's settings: make a folder of it once with "
        "`StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)` and load that."
    )


def _check_request(
    texts: Sequence[str], seeds: Sequence[int], scale: float, *, steps: int, batch_size: int
) -> None:
    if not texts:
        raise ValueError("`prompts` is empty: give at least one prompt.")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`prompts` must be strings, got {texts!r}.")
    if len(seeds) != len(texts):
        raise ValueError(
            f"{len(seeds)} seeds for {len(texts)} prompts: give one seed for all, or one for each prompt."
        )
    if not math.isfinite(scale):
        raise ValueError(f"`guidance_scale` must be a finite number, got {scale}.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")


def _slices(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
