"""TextToImage: a text-to-image model, its parts, and generation of pictures.

The diffusers pipeline is `model.pipe`; its `__call__`, safety checker and progress bars are not used. If the model was
opened from a folder, each part is loaded when it is first used.
"""

from collections.abc import Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor

from overpaint.errors import UnsupportedModel, check_seed
from overpaint.files import public_name
from overpaint.images.pictures import Pictures
from overpaint.model.checks import check_drawable, check_request, seeds_for
from overpaint.model.offload import run_device
from overpaint.model.pipeline_folder import PipelineFolder
from overpaint.model.sampling import Progress, denoise
from overpaint.model.text_encoding import check_clip_skip, text_features
from overpaint.model.token_spans import check_text
from overpaint.probes.text import warn_of_cuts

__all__ = ["TextToImage"]


class TextToImage:
    """A Stable Diffusion pipeline (versions 1 and 2, and SDXL) and its parts.

    Attributes:
        name: The zoo name, folder or hub id that it was loaded from.
        guidance_scale: Default guidance scale of `generate`: 7.5, or 5 for SDXL, as in diffusers.
        held_out: (object, style) pairs that training never showed, if known.
        clip_skip: Number of last layers of the text encoders that are left out, as in diffusers; see `text_features`.
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
        """Wrap a diffusers pipeline, which is not copied, or a `PipelineFolder`.

        Raises:
            ValueError: `clip_skip` is negative, or leaves no layer.
        """
        self._source = pipe
        self.name = name
        self.held_out = held_out
        default = 7.5 if len(self.structure.text_encoders) == 1 else 5.0
        self.guidance_scale = default if guidance_scale is None else guidance_scale
        check_clip_skip(self.structure.text_encoders, clip_skip)
        self.clip_skip = clip_skip
        self._warned: set[str] = set()  # prompts whose cut words were named in a warning

    def __repr__(self) -> str:
        pipe = self._structure
        encoders = len(self.structure.text_encoders)
        kind = "text encoder alone" if self.structure.unet is None else type(pipe).__name__
        size = "" if self.structure.unet is None else f", pictures of {self.size[1]}x{self.size[0]}"
        return f"<TextToImage {self.name!r}: {kind}, {encoders} text encoder{'s' if encoders > 1 else ''}{size}>"

    def with_clip_skip(self, clip_skip: int) -> "TextToImage":
        """Return a model of the same pipeline, not copied, whose text features leave out the last `clip_skip` layers.

        Raises:
            ValueError: `clip_skip` is negative, or leaves no layer.
        """
        model = TextToImage(
            self._source,
            name=self.name,
            guidance_scale=self.guidance_scale,
            held_out=self.held_out,
            clip_skip=clip_skip,
        )
        model._warned = self._warned
        return model

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline with all parts loaded.

        Raises:
            UnsupportedModel: This is a text encoder alone, or a part cannot be read.
        """
        if not isinstance(self._source, PipelineFolder):
            return self._source
        if self.structure.unet is None:
            raise self._encoder_alone()
        return self._source.whole()

    @property
    def folder(self) -> PipelineFolder | None:
        """The folder that the model was loaded from; `None` for a live pipeline."""
        return self._source if isinstance(self._source, PipelineFolder) else None

    @property
    def structure(self) -> Any:
        """The text encoders and UNet, for their modules and settings: weights not loaded are on the meta device."""
        pipe = self._structure
        encoders = (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
        return SimpleNamespace(
            text_encoders=tuple(e for e in encoders if e is not None),
            unet=getattr(pipe, "unet", None),
        )

    def components(self) -> dict[str, Any]:
        """Return the parts of the pipeline by name, to read their classes and settings; no weights are loaded."""
        names = (
            "text_encoder", "text_encoder_2", "unet", "vae", "tokenizer", "tokenizer_2", "scheduler",
        )  # fmt: skip
        parts = {name: getattr(self._structure, name, None) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def text_encoder(self) -> Any:
        """The `CLIPTextModel`; the first one if there are two."""
        return self._part("text_encoder")

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """All text encoders: one, and in SDXL also a `CLIPTextModelWithProjection`."""
        if len(self.structure.text_encoders) == 1:
            return (self.text_encoder,)
        return (self.text_encoder, self._part("text_encoder_2"))

    @property
    def tokenizer(self) -> Any:
        """The `CLIPTokenizer`; the first one if there are two."""
        return self._structure.tokenizer

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """The tokenizer of each text encoder; SDXL's two use different padding tokens."""
        if len(self.structure.text_encoders) == 1:
            return (self.tokenizer,)
        return (self.tokenizer, self._structure.tokenizer_2)

    @property
    def unet(self) -> Any:
        """The `UNet2DConditionModel`."""
        return self._part("unet")

    @property
    def vae(self) -> Any:
        """The `AutoencoderKL`."""
        return self._part("vae")

    @property
    def scheduler(self) -> Any:
        """The scheduler; every run creates a new one with its settings."""
        if self.structure.unet is None:
            raise self._encoder_alone()
        return self._structure.scheduler

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        side = self._settings_of("unet").sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self._scale, width * self._scale

    @property
    def guidance_reads_zeros(self) -> bool:
        """True if guidance without a negative prompt reads zeros instead of the empty prompt's features.

        It does for SDXL, unless the pipeline's setting `force_zeros_for_empty_prompt` is off.
        """
        setting = self._structure.config.get("force_zeros_for_empty_prompt", True)
        return bool(setting) and len(self.structure.text_encoders) == 2

    @property
    def device(self) -> torch.device:
        """Device of the UNet's weights; if there is no UNet, of the text encoder's."""
        part = "text_encoder" if self.structure.unet is None else "unet"
        if self.folder is not None and not self.folder.is_loaded(part):
            return self.folder.device
        return run_device(self._part(part))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the UNet's weights; if there is no UNet, of the text encoder's."""
        part = "text_encoder" if self.structure.unet is None else "unet"
        if self.folder is not None and not self.folder.is_loaded(part):
            return self.folder.dtype_of(part)
        return next(self._part(part).parameters()).dtype

    @property
    def _structure(self) -> Any:
        """The pipeline; weights that are not loaded are on the meta device."""
        return self._source.structure if isinstance(self._source, PipelineFolder) else self._source

    @property
    def _scale(self) -> int:
        """Pixels for each latent."""
        return 2 ** (len(self._settings_of("vae").block_out_channels) - 1)

    def _part(self, name: str) -> Any:
        if isinstance(self._source, PipelineFolder):
            if not hasattr(self._structure, name):
                raise self._encoder_alone()
            return self._source.part(name)
        return getattr(self._source, name)

    def _settings_of(self, name: str) -> Any:
        part = getattr(self._structure, name, None)
        if part is None:
            raise self._encoder_alone()
        return part.config

    def _encoder_alone(self) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.name!r} is a text encoder alone, which can be edited but neither drawn with nor exported: load the "
            "folder of the whole pipeline."
        )

    def tokenize(self, prompts: Sequence[str], *, encoder: int = 0) -> Tensor:
        """Return the token ids of `prompts` for a text encoder, padded or cut to L tokens, int64, shape (N, L).

        A `CutPromptWarning` names the words of each prompt that are cut off, once for each prompt.

        Raises:
            TypeError: A prompt is not one text.
            ValueError: A prompt is not Unicode text.
        """
        check_text(*prompts)
        tokenizer = self.tokenizers[encoder]
        encoded = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        full = encoded.attention_mask[:, -1].bool().tolist()
        long = [prompt for prompt, is_full in zip(prompts, full, strict=True) if is_full]
        warn_of_cuts(tokenizer, long, self._warned)
        return encoded.input_ids

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
        if self.guidance_reads_zeros:
            features[empty] = 0
        elif self.clip_skip:
            features[empty] = self._features([""], clip_skip=0)
        return features

    def _features(self, prompts: Sequence[str], *, clip_skip: int) -> Tensor:
        ids = [self.tokenize(prompts, encoder=i) for i in range(len(self.text_encoders))]
        rows = [
            row.to(run_device(encoder))
            for row, encoder in zip(ids, self.text_encoders, strict=True)
        ]
        return text_features(self.text_encoders, rows, clip_skip=clip_skip)

    def initial_latents(
        self,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        scheduler: Any = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the initial noise of each seed, shape (N, C, h, w), scaled by the scheduler's `init_noise_sigma`.

        Each row is drawn with its own CPU generator, so that it depends neither on other rows nor on the device.

        Args:
            seeds: One for each row.
            steps: Number of denoising steps; the scale of some schedulers (SDXL's own) depends on it. By default the
                longest schedule.
            scheduler: Scheduler whose scale is used instead of the model's.
            size: Height and width of the pictures in pixels; by default the model's.

        Raises:
            UnsupportedModel: The UNet also takes a mask or a picture.
            ValueError: A seed is out of range.
        """
        height, width = self.size if size is None else size
        settings = self._settings_of("unet")
        check_drawable(settings, self.name)
        shape = (settings.in_channels, height // self._scale, width // self._scale)
        checked = [check_seed(seed, "seeds") for seed in seeds]
        rows = [torch.randn(shape, generator=Generator().manual_seed(seed)) for seed in checked]
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
            "time_ids": self._time_ids(latents).to(embeds).expand(len(embeds), -1),
        }
        return self.unet(
            latents, t, encoder_hidden_states=embeds[:, :-1], added_cond_kwargs=added
        ).sample

    def _time_ids(self, latents: Tensor) -> Tensor:
        """Return SDXL's `time_ids`, shape (6,): original size, crop (0, 0), target size."""
        height, width = (self._scale * side for side in latents.shape[-2:])
        return torch.tensor([height, width, 0, 0, height, width])

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
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
        batch_size: int = 32,
        on_progress: Progress | None = None,
    ) -> Pictures:
        """Return one picture for each prompt.

        A picture depends only on its prompt and seed, not on the other prompts. A change of `batch_size` changes its
        numbers by up to 1e-4.

        Args:
            prompts: N prompts, or one.
            negative_prompt: One for all prompts, or one for each; the guidance uses its features instead of the empty
                prompt's. As in diffusers, `clip_skip` does not apply to it.
            seed: One for all prompts, or one for each prompt.
            steps: Number of denoising steps.
            guidance_scale: Weight of the prompt against the negative prompt; by default the model's.
            height: Height in pixels, a multiple of 8; by default the model's.
            width: Width in pixels, a multiple of 8; by default the model's.
            clip_skip: Number of last layers of the text encoders that are left out; by default the model's.
            batch_size: Pictures in one batch.
            on_progress: Called after each step with (steps done, steps in total, `"drawing"`).

        Returns:
            The pictures, on the CPU, with the settings of the run.

        Raises:
            ValueError: There are no prompts, the number of seeds is wrong, or a setting is out of range.
            TypeError: A prompt is not a string.
            UnsupportedModel: The UNet also takes a mask or a picture, or this is a text encoder alone.
        """
        model = self if clip_skip is None else self.with_clip_skip(clip_skip)
        check_drawable(self._settings_of("unet"), self.name)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = seeds_for(seed, len(texts))
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        check_request(texts, seeds, scale, steps=steps, batch_size=batch_size)
        size = self._checked_size(height, width)
        embeds, negative = model._embeds(texts, negative_prompt, batch_size)
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
            rows = slice(batch[0], batch[-1] + 1)
            latents = denoise(
                self,
                self.initial_latents(batch_seeds, steps=steps, size=size),
                embeds[rows],
                negative if len(negative) == 1 else negative[rows],
                steps=steps,
                guidance_scale=scale,
                on_step=count_step,
                generators=[Generator().manual_seed(s + 1) for s in batch_seeds],
            )
            images.append(self.decode(latents).cpu())
        protocol = model.protocol(steps=steps, guidance_scale=scale)
        if negative_prompt is not None:
            listed = negative_prompt if isinstance(negative_prompt, str) else list(negative_prompt)
            protocol["negative_prompt"] = listed
        return Pictures(torch.cat(images), tuple(texts), tuple(seeds), protocol)

    def _embeds(
        self, texts: Sequence[str], negative: str | Sequence[str] | None, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return the text features of the prompts, (N, L, D), and of the negative prompts, (1, L, D) or (N, L, D)."""
        distinct = list(dict.fromkeys(["", *texts]))
        embeds = torch.cat([self.encode(part) for part in _slices(distinct, batch_size)])
        rows = torch.tensor([distinct.index(text) for text in texts], device=embeds.device)
        if negative is None:
            return embeds[rows], embeds[:1]
        others = [negative] if isinstance(negative, str) else list(negative)
        if not all(isinstance(text, str) for text in others):
            raise TypeError(f"`negative_prompt` must be a string or strings, got {negative!r}.")
        if len(others) not in (1, len(texts)):
            raise ValueError(
                f"{len(others)} negative prompts for {len(texts)} prompts: give one for all, or one for each prompt."
            )
        with torch.no_grad():
            parts = [self._features(part, clip_skip=0) for part in _slices(others, batch_size)]
        return embeds[rows], torch.cat(parts)

    def _checked_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the size in pixels, the model's where none is given."""
        sides = [
            self.size[0] if height is None else height,
            self.size[1] if width is None else width,
        ]
        for name, side, request in zip(("height", "width"), sides, (height, width), strict=True):
            if request is not None and (
                not isinstance(side, int) or isinstance(side, bool) or side < 8 or side % 8
            ):
                raise ValueError(
                    f"`{name}` must be a multiple of 8 of at least 8 pixels, got {side!r}: the model's own is "
                    f"{self.size[name == 'width']}."
                )
        return sides[0], sides[1]

    def protocol(self, *, steps: int, guidance_scale: float) -> dict[str, Any]:
        """Return the settings of a run as a dictionary for JSON."""
        return {
            "model": public_name(self.name),
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


def _slices(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
