"""TextToImage: a text-to-image model, its parts, and generation of pictures.

The diffusers pipeline is `model.pipe`; its `__call__`, safety checker and progress bars are not used.
"""

import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from overpaint import zoo
from overpaint.errors import UnsupportedModel
from overpaint.images.pictures import Pictures
from overpaint.model import checkpoint
from overpaint.model.sampling import Progress, denoise
from overpaint.model.text_encoding import check_clip_skip, text_features

__all__ = ["TextToImage", "load"]

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class TextToImage:
    """A Stable Diffusion pipeline (versions 1 and 2, and SDXL) and its parts.

    Attributes:
        pipe: The diffusers pipeline. It is not copied.
        name: The zoo name, folder or hub id that it was loaded from.
        guidance_scale: Default guidance scale of `generate`: 7.5, or 5 for SDXL, as in diffusers.
        held_out: (object, style) pairs that training never showed, if known.
        clip_skip: Number of last layers of the text encoders that are left out, as in diffusers; see `text_features`.

    Raises:
        ValueError: `clip_skip` is negative, or leaves no layer.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        name: str,
        guidance_scale: float | None = None,
        held_out: frozenset[tuple[str, str]] = frozenset(),
        clip_skip: int = 0,
    ) -> None:
        self.pipe = pipe
        self.name = name
        self.held_out = held_out
        default = 7.5 if len(self.text_encoders) == 1 else 5.0
        self.guidance_scale = default if guidance_scale is None else guidance_scale
        check_clip_skip(self.text_encoders, clip_skip)
        self.clip_skip = clip_skip

    def with_clip_skip(self, clip_skip: int) -> "TextToImage":
        """Return a model of the same pipeline, not copied, whose text features leave out the last `clip_skip` layers.

        Raises:
            ValueError: `clip_skip` is negative, or leaves no layer.
        """
        return TextToImage(
            self.pipe,
            name=self.name,
            guidance_scale=self.guidance_scale,
            held_out=self.held_out,
            clip_skip=clip_skip,
        )

    @property
    def text_encoder(self) -> Any:
        """The `CLIPTextModel`; the first one if there are two."""
        return self.pipe.text_encoder

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """All text encoders: one, and in SDXL also a `CLIPTextModelWithProjection`."""
        second = getattr(self.pipe, "text_encoder_2", None)
        return (self.text_encoder,) if second is None else (self.text_encoder, second)

    @property
    def tokenizer(self) -> Any:
        """The `CLIPTokenizer`; the first one if there are two."""
        return self.pipe.tokenizer

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """The tokenizer of each text encoder; SDXL's two use different padding tokens."""
        if len(self.text_encoders) == 1:
            return (self.tokenizer,)
        return (self.tokenizer, self.pipe.tokenizer_2)

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
        """The scheduler; every run creates a new one with its settings."""
        return self.pipe.scheduler

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        height, width = self._latent_size
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return height * scale, width * scale

    @property
    def _latent_size(self) -> tuple[int, int]:
        side = self.unet.config.sample_size
        return (side, side) if isinstance(side, int) else (side[0], side[1])

    @property
    def device(self) -> torch.device:
        """Device of the UNet's weights."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the UNet's weights."""
        return next(self.unet.parameters()).dtype

    def tokenize(self, prompts: Sequence[str], *, encoder: int = 0) -> Tensor:
        """Return the token ids of `prompts` for a text encoder, padded or cut to L tokens, int64, shape (N, L)."""
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
        """Return the text features of `prompts`, packed as in `text_features`; no attention mask is used.

        `encode([""])` returns the features of the unconditional branch of the guidance: as in diffusers, `clip_skip`
        does not apply to it, and for SDXL it is zero if the pipeline's setting `force_zeros_for_empty_prompt` is on, as
        it is by default.

        Args:
            prompts: N prompts.

        Returns:
            Shape (N, 77, D), for SDXL (N, 78, D).
        """
        features = self._features(prompts, clip_skip=self.clip_skip)
        empty = [i for i, prompt in enumerate(prompts) if prompt == ""]
        if not empty:
            return features
        if len(self.text_encoders) == 2 and self.pipe.config.get("force_zeros_for_empty_prompt", True):  # fmt: skip
            features[empty] = 0
        elif self.clip_skip:
            features[empty] = self._features([""], clip_skip=0)
        return features

    def _features(self, prompts: Sequence[str], *, clip_skip: int) -> Tensor:
        ids = [self.tokenize(prompts, encoder=i) for i in range(len(self.text_encoders))]
        rows = [row.to(self.device) for row in ids]
        return text_features(self.text_encoders, rows, clip_skip=clip_skip)

    def initial_latents(
        self, seeds: Sequence[int], *, steps: int | None = None, scheduler: Any = None
    ) -> Tensor:
        """Return the start noise of each seed, shape (N, C, h, w), scaled by the scheduler's `init_noise_sigma`.

        Each row is drawn with its own CPU generator, so that it depends neither on other rows nor on the device.

        Args:
            seeds: One for each row.
            steps: Number of denoising steps; the scale of some schedulers (SDXL's own) depends on it. By default the
                longest schedule.
            scheduler: Scheduler whose scale is used instead of the model's.
        """
        shape = (self.unet.config.in_channels, *self._latent_size)
        rows = [torch.randn(shape, generator=Generator().manual_seed(seed)) for seed in seeds]
        base = self.scheduler if scheduler is None else scheduler
        unused = type(base).from_config(
            base.config
        )  # the scale of `base` may be that of an earlier run
        if steps is not None:
            unused.set_timesteps(steps)
        return (torch.stack(rows) * unused.init_noise_sigma).to(self.device, self.dtype)

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
        """Return SDXL's `time_ids`, shape (6,): original size, crop (0, 0), target size."""
        return torch.tensor([*self.size, 0, 0, *self.size])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of `latents` (N, C, h, w): RGB in [0, 1], float32, shape (N, 3, H, W).

        SDXL's decoder overflows in float16. If its setting `force_upcast` is on, it is cast to float32 for this call
        and back; the weights are bit for bit the same afterwards.
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
        on_progress: Progress | None = None,
    ) -> Pictures:
        """Return one picture for each prompt.

        A picture depends only on its prompt and seed: not on the other prompts, and up to 1e-4 not on `batch_size`.

        Args:
            prompts: N prompts, or one.
            seed: One for all prompts, or one for each prompt.
            steps: Number of denoising steps.
            guidance_scale: Weight of the prompt against the empty prompt; by default the model's.
            batch_size: Pictures in one batch.
            on_progress: Called after each step with (steps done, steps in total, `"drawing"`).

        Returns:
            The pictures, on the CPU, with the settings of the run.

        Raises:
            ValueError: There are no prompts, the number of seeds is wrong, or a setting is out of range.
            TypeError: A prompt is not a string.
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

        def count_step(*_: object) -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(done, max(done, steps * len(batches)), "drawing")

        for batch in batches:
            batch_seeds = [seeds[i] for i in batch]
            latents = denoise(
                self,
                self.initial_latents(batch_seeds, steps=steps),
                embeds[rows[batch[0] : batch[-1] + 1]],
                embeds[:1],
                steps=steps,
                guidance_scale=scale,
                on_step=count_step,
                generators=[Generator().manual_seed(s + 1) for s in batch_seeds],
            )
            images.append(self.decode(latents).cpu())
        protocol = self.protocol(steps=steps, guidance_scale=scale)
        return Pictures(torch.cat(images), tuple(texts), tuple(seeds), protocol)

    def protocol(self, *, steps: int, guidance_scale: float) -> dict[str, Any]:
        """Return the settings of a run as a dictionary for JSON."""
        return {
            "model": self.name,
            "text_encoders": len(self.text_encoders),
            "steps": steps,
            "guidance_scale": guidance_scale,
            **({"clip_skip": self.clip_skip} if self.clip_skip else {}),
            "scheduler": type(self.scheduler).__name__,
            "prediction_type": self.scheduler.config.get("prediction_type", "epsilon"),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }


def load(
    source: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    clip_skip: int = 0,
) -> TextToImage:
    """Load a model. Only this function and `scorers.load` may download files.

    Args:
        source: A name from the zoo (`"icons"`), a diffusers folder, a hub id (`"owner/name"`), or a live
            `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, which is used as it is: `device` and `dtype` are
            then ignored.
        device: Device of the weights.
        dtype: Dtype of the weights in memory, whatever it is on disk.
        clip_skip: Number of last layers of the text encoders that are left out, as in diffusers. Encoding, tracing and
            editing then use the layer that the UNet reads.

    Raises:
        UnsupportedModel: A pickle, a folder without a supported pipeline, a damaged file, or a weight is not finite.
        ValueError: The name is unknown.
    """
    if not isinstance(source, str | Path):
        checkpoint.check_pipeline(source)
        return TextToImage(
            source,
            name=str(source.config.get("_name_or_path") or "live pipeline"),
            clip_skip=clip_skip,
        )
    text = str(source)
    if text in _pipelines() or Path(text).is_dir():
        folder = zoo.folder(text) if text in _pipelines() else Path(text)
        pipe, settings = checkpoint.load_folder(folder, dtype=dtype)
    elif Path(text).suffix in (*_PICKLES, ".safetensors"):
        raise UnsupportedModel(_single_file_message(text))
    elif isinstance(source, str) and _is_hub_id(text):
        pipe, settings = checkpoint.load_hub(text, dtype=dtype)
    else:
        raise ValueError(
            f"unknown model {text!r}: it is neither a folder nor a name that ships with the package "
            f"({', '.join(_pipelines()) or 'none'}). Check the spelling, or give a hub id such as 'owner/name'."
        )
    checkpoint.check_pipeline(pipe)
    return TextToImage(pipe.to(device), name=text, **{**settings, "clip_skip": clip_skip})


def _pipelines() -> tuple[str, ...]:
    """Return the names of the text-to-image models in the zoo."""
    return tuple(name for name in zoo.names() if (zoo.folder(name) / "model_index.json").is_file())


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) is not None


def _single_file_message(text: str) -> str:
    if Path(text).suffix in _PICKLES:
        return (
            f"{text!r} is a pickle, which can run any code when it is read: use the model's folder of safetensors "
            "instead, or convert it on an isolated machine."
        )
    return (
        f"{text!r} is a single file without the model's settings: convert it to a folder once with "
        "`StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)` and load the folder."
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
