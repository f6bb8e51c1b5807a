"""`icons`: a small Stable Diffusion of the icon world, from artwork to a pipeline folder.

Four stages, each resumable: a BPE tokenizer of 2,304 entries; a CLIP trained contrastively, whose text tower is then
frozen; an `AutoencoderKL` of 64x64 pictures to 8x8x8 latents; a UNet trained on latents to predict v.

    overpaint train icons --minutes 150                 # two CPU cores, resumable
    overpaint train icons --minutes 20 --device cuda    # the same recipe, wider

The results of 150 minutes on two CPU cores of 2.5 GHz are the figures of the card,
`overpaint/zoo/weights/icons/card.json`.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from overpaint import files, zoo
from overpaint.model.sampling import Progress
from overpaint.train import card, icon_world
from overpaint.train.loop import (
    Schedule,
    damage_named,
    fit,
    load_tensors,
    remove_checkpoints,
    save_tensors,
)
from overpaint.train.networks import (
    CPU,
    CUDA,
    TOKENS,
    VOCABULARY,
    Recipe,
    build_clip,
    build_scheduler,
    build_unet,
    build_vae,
)

__all__ = [
    "CPU",
    "CUDA",
    "Recipe",
    "Run",
    "as_pixels",
    "build_clip",
    "build_unet",
    "build_vae",
    "contrast",
    "standardise",
    "tokenizer",
    "train",
    "train_clip",
]

STAGES = ("tokenizer", "clip", "vae", "unet", "export")


@dataclass(frozen=True)
class Run:
    """Settings that the stages of one training share."""

    recipe: Recipe  # sizes and rates
    world: icon_world.World  # draws the pictures
    folder: Path  # checkpoints
    device: str = "cpu"  # or "cuda"
    seed: int = 0  # of the random draws
    on_progress: Progress | None = None  # called with (done, total, label)


def train(
    *,
    out: Path,
    minutes: float = 150.0,
    device: str = "cpu",
    resume: bool = True,
    threads: int = 2,
    seed: int = 0,
    stages: tuple[str, ...] = STAGES,
    work: Path = Path("runs/icons"),
    artwork: Path = Path("runs/artwork"),
    on_progress: Progress | None = None,
) -> Path:
    """Train `icons`, write it to `out` as a Stable Diffusion folder and return that folder.

    Args:
        out: The pipeline's folder: a new one, or one that a recipe wrote before.
        minutes: Wall time of the three trained stages together, including that of earlier runs in `work`.
        device: `"cpu"` or `"cuda"`, which selects the wider recipe.
        resume: Continue from the checkpoints in `work`; if there are none, continue with the UNet of the finished
            model in `out`, or else of the shipped one, if it has this recipe's shape. `False` starts over.
        threads: Number of CPU threads.
        seed: Seed of the initial weights and of all random draws.
        stages: Stages to run; a stage needs the results of those before it.
        work: Folder of the checkpoints; may be deleted when the model is written.
        artwork: Folder that the icon sets are downloaded to.
        on_progress: Called with (done, total, label) every few seconds.

    Raises:
        ValueError: `out` is a folder of something else.
        OSError: The artwork cannot be downloaded.
    """
    out = card.prepare(out)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = CUDA if device.startswith("cuda") else CPU
    work.mkdir(parents=True, exist_ok=True)
    files.remove_drafts_in(work)
    world = icon_world.World(icon_world.fetch(artwork))
    shares = _shares(recipe, work, out, resume=resume)
    if not resume:
        remove_checkpoints(work, [stage for stage in shares if stage in stages])
    run = Run(recipe, world, work, device, seed, on_progress)
    if "tokenizer" in stages:
        tokenizer(world, work / "tokenizer", seed=seed)
    recipes = {"clip": train_clip, "vae": _train_vae, "unet": _train_unet}
    for stage, share in shares.items():
        if stage in stages:
            recipes[stage](run, minutes * share)
    if "export" not in stages:
        return work
    with files.atomic_folder(out) as draft:
        _export(recipe, work, draft)
        trained = card.stages(work, tuple(shares))
        card.save(
            draft, recipe=asdict(recipe), seed=seed, device=device, trained=trained, figures={},
            history=_earlier_runs(work),
        )  # fmt: skip
    return out


def _shares(recipe: Recipe, work: Path, out: Path, *, resume: bool) -> dict[str, float]:
    """Return the part of the minutes of each stage; a run that continues a finished model trains its UNet only.

    The choice is recorded by the file `unet-start.safetensors` in `work`, so that a resumed run makes the same one.
    """
    shares: dict[str, float] = dict(zip(("clip", "vae", "unet"), recipe.shares, strict=True))
    start = work / "unet-start.safetensors"
    if not resume:
        start.unlink(missing_ok=True)
        return shares
    if any((work / f"{stage}.safetensors").exists() for stage in ("clip", "vae")):
        return shares
    if not start.exists():
        finished = next((f for f in (out, zoo.folder("icons")) if _has_shape(f, recipe)), None)
        if finished is None or (work / "unet.safetensors").exists():
            return shares
        _unpack(finished, work)
    return {"unet": 1.0}


def _has_shape(folder: Path, recipe: Recipe) -> bool:
    """Return whether `folder` holds a model with the shapes of this recipe's networks."""
    path = folder / "card.json"
    if not path.is_file() or not (folder / "unet").is_dir():
        return False
    with damage_named(path):
        saved = dict(files.from_json(path.read_bytes()).get("recipe", {}))
    names = ["text_layers", "text_width", "vae_channels", "latent_channels"]
    names += ["unet_channels", "unet_layers"]
    expected = json.loads(json.dumps(asdict(recipe)))
    return all(saved.get(name) == expected[name] for name in names)


def _earlier_runs(work: Path) -> list[dict[str, Any]]:
    """Return the runs that trained the model which this run continues; empty if it started from random weights."""
    path = work / "history.json"
    if not path.is_file():
        return []
    with damage_named(path):
        return [dict(run) for run in files.from_json(path.read_bytes())]


def tokenizer(world: icon_world.World, folder: Path, *, seed: int = 0) -> Any:
    """Return a `CLIPTokenizer`, loaded from `folder` or trained on icon names and captions and saved there."""
    import transformers

    build: Any = transformers.CLIPTokenizer
    if not (folder / "tokenizer.json").exists():
        rng = np.random.default_rng((seed, 1))
        captions = [world.sample(rng).caption for _ in range(400)]
        vocabulary, merges = _byte_pairs(icon_world.captions_corpus(world.sets, captions))
        _save_tokenizer(build(vocab=vocabulary, merges=merges, model_max_length=TOKENS), folder)
    return build.from_pretrained(folder)


def _save_tokenizer(tokens: Any, folder: Path) -> None:
    """Write a tokenizer's folder as a whole; an incomplete one of a killed run is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    with files.atomic(folder) as draft:
        tokens.save_pretrained(draft)


def _byte_pairs(lines: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a BPE vocabulary and its merges, trained with CLIP's pre-tokenizer.

    Numbered as in CLIP: bytes, bytes + `</w>`, merges, two special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    byte_pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    byte_pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - 256,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    byte_pairs.train_from_iterator((line.lower() for line in lines), trainer)
    merges = [tuple(pair) for pair in json.loads(byte_pairs.to_str())["model"]["merges"]]
    names = alphabet + [letter + "</w>" for letter in alphabet]
    seen = set(names)
    used = []
    for left, right in merges:
        if left + right not in seen and len(names) < VOCABULARY - 2:
            seen.add(left + right)
            names.append(left + right)
            used.append((left, right))
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: index for index, name in enumerate(names)}, used


def train_clip(run: Run, minutes: float) -> Any:
    """Return the trained CLIP, whose text tower is the UNet's text encoder."""
    recipe, device = run.recipe, run.device
    tokens = tokenizer(run.world, run.folder / "tokenizer", seed=run.seed)
    model = build_clip(recipe, len(tokens)).to(device)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((run.seed, 2, step))
        generator = torch.Generator().manual_seed(step)
        pictures = [run.world.sample(rng) for _ in range(recipe.clip_batch)]
        pixels = as_pixels(pictures)
        pixels = (pixels + 0.05 * torch.randn(pixels.shape, generator=generator)).to(device)
        ids = tokens(
            [p.caption for p in pictures], padding="longest", return_tensors="pt"
        ).input_ids
        result = model(input_ids=ids.to(device), pixel_values=pixels)
        return contrast(result.logits_per_text, [p.caption for p in pictures])

    schedule = Schedule(minutes, recipe.clip_lr, ema_decay=recipe.clip_ema, muon=False)
    clip: Any = fit(
        model, loss, schedule, stage="clip", folder=run.folder, on_progress=run.on_progress
    )
    save_tensors(dict(clip.text_model.state_dict()), run.folder / "text-final.safetensors")
    return clip


def as_pixels(pictures: list[icon_world.Picture]) -> Tensor:
    """Return pictures as one tensor, (B, 3, 64, 64), in [-1, 1]."""
    stack = torch.from_numpy(np.stack([p.pixels for p in pictures]))
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1


def contrast(logits: Tensor, captions: list[str]) -> Tensor:
    """Return CLIP's symmetric cross-entropy; equal captions share the target."""
    index = {caption: i for i, caption in enumerate(captions)}
    same = torch.tensor([index[c] for c in captions], device=logits.device)
    target = (same[:, None] == same[None]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def _train_vae(run: Run, minutes: float) -> Any:
    """Return the trained autoencoder, whose latents have mean 0 and standard deviation 1."""
    recipe, device = run.recipe, run.device
    model = build_vae(recipe).to(device, memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((run.seed, 3, step))
        generator = torch.Generator().manual_seed(step)
        pixels = as_pixels([run.world.sample(rng) for _ in range(recipe.vae_batch)])
        pixels = pixels.to(device, memory_format=torch.channels_last)
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        # More noise than the posterior's, so that the decoder tolerates the errors of a sampler.
        drawn = model.decode(posterior.mean + (posterior.std + 0.05) * noise).sample
        difference = drawn - pixels
        edges = sum(difference.diff(dim=d).abs().mean() for d in (2, 3))
        return (
            difference.abs().mean()
            + difference.square().mean()
            + 0.5 * edges
            + 3e-5 * posterior.kl().mean() / 64
        )

    schedule = Schedule(minutes, recipe.vae_lr, weight_decay=0.0, ema_decay=recipe.vae_ema)
    vae = fit(model, loss, schedule, stage="vae", folder=run.folder, on_progress=run.on_progress)
    standardise(vae, run.world, seed=run.seed, device=device)
    save_tensors(dict(vae.state_dict()), run.folder / "vae-final.safetensors")
    return vae


@torch.no_grad()
def standardise(
    vae: Any, world: icon_world.World, *, seed: int, device: str, batches: int = 24
) -> None:
    """Fold each latent channel's mean and std into the 1x1 convolutions, so that latents have mean 0 and std 1."""
    rng = np.random.default_rng((seed, 4))
    latents = torch.cat(
        [
            vae.encode(
                as_pixels([world.sample(rng) for _ in range(64)]).to(device)
            ).latent_dist.mean
            for _ in range(batches)
        ]
    )
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    outer.bias += (outer.weight[:, :, 0, 0] * mean).sum(1)
    outer.weight *= std[None, :, None, None]
    inner.weight[:channels] /= std[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / std
    inner.bias[channels:] -= 2 * std.log()  # the log-variance follows the scale


def _train_unet(run: Run, minutes: float) -> Any:
    """Return the trained UNet."""
    recipe, device, folder = run.recipe, run.device, run.folder
    data = _latents(run)
    latents, features, rows = (data[k].to(device) for k in ("latents", "features", "rows"))
    model = build_unet(recipe)
    if (folder / "unet-start.safetensors").exists():
        model.load_state_dict(load_tensors(folder / "unet-start.safetensors"))
    model = model.to(device, memory_format=torch.channels_last)
    alphas = build_scheduler().alphas_cumprod.to(device)
    batch = recipe.unet_batch

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        pick = torch.randint(len(latents), (batch,), generator=generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator).to(device)
        # Stratified: one timestep in each of `batch` equal parts of the schedule.
        t = (
            (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * len(alphas)
        ).long()
        drop = torch.rand(batch, generator=generator) < recipe.drop_caption
        context = features[torch.where(drop, 0, rows.cpu()[pick]).to(device)].float()
        clean, a = latents[pick.to(device)].float(), alphas[t.to(device)].view(-1, 1, 1, 1)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            out = model(
                noisy.contiguous(memory_format=torch.channels_last), t.to(device), context
            ).sample
        # No weights: those of min-SNR are too small for the noisy steps, which determine the shapes.
        return (out.float() - velocity).square().mean()

    schedule = Schedule(minutes, recipe.unet_lr, ema_decay=recipe.unet_ema)
    unet = fit(model, loss, schedule, stage="unet", folder=folder, on_progress=run.on_progress)
    save_tensors(dict(unet.state_dict()), folder / "unet-final.safetensors")
    return unet


@torch.no_grad()
def _latents(run: Run) -> dict[str, Tensor]:
    """Return the encoded training pictures, computed once and saved.

    Returns:
        `latents` (P, 8, 8, 8); `features` (U, 32, D), of which row 0 is the empty prompt; `rows` (P,), the row of
        `features` of each picture.
    """
    recipe, folder, seed, device = run.recipe, run.folder, run.seed, run.device
    path = folder / "latents.safetensors"
    key = _key(folder, recipe.pictures, seed)
    if path.exists():
        with damage_named(path), safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_of") == key:
                return load_tensors(path)
    vae, text, tokens = _frozen(recipe, folder)
    vae, text = vae.to(device), text.to(device)
    rng = np.random.default_rng((seed, 5))
    latents, rows, captions = [], [], {"": 0}
    for start in range(0, recipe.pictures, 256):
        pictures = [run.world.sample(rng) for _ in range(min(256, recipe.pictures - start))]
        pixels = as_pixels(pictures).to(device)
        latents.append(vae.encode(pixels).latent_dist.mean.half().cpu())
        rows += [captions.setdefault(p.caption, len(captions)) for p in pictures]
    texts = list(captions)
    features = []
    for start in range(0, len(texts), 512):
        ids = tokens(
            texts[start : start + 512], padding="max_length", truncation=True, return_tensors="pt"
        )
        features.append(text(ids.input_ids.to(device)).last_hidden_state.half().cpu())
    data = {
        "latents": torch.cat(latents),
        "features": torch.cat(features),
        "rows": torch.tensor(rows),
    }
    save_tensors(data, path, {"made_of": key})
    return data


def _key(folder: Path, pictures: int, seed: int) -> str:
    """Return a hash of everything that determines latents and features: both networks, number of pictures, seed."""
    digest = hashlib.sha256(f"{pictures} {seed}".encode())
    for name in ("text-final", "vae-final"):
        digest.update((folder / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()


def _frozen(recipe: Recipe, folder: Path) -> tuple[Any, Any, Any]:
    """Return the trained `AutoencoderKL`, `CLIPTextModel` and tokenizer, in evaluation mode."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel(build_clip(recipe, len(tokens)).config.text_config)
    _tower(text).load_state_dict(load_tensors(folder / "text-final.safetensors"))
    vae = build_vae(recipe)
    vae.load_state_dict(load_tensors(folder / "vae-final.safetensors"))
    return vae.eval(), text.eval(), tokens


def _tower(text: Any) -> Any:
    """Return the module with the layers: `text_model` in transformers 4, the `CLIPTextModel` itself in 5."""
    return getattr(text, "text_model", text)


def _unpack(folder: Path, work: Path) -> None:
    """Write the parts of the pipeline in `folder` to `work`, as its finished stages would.

    `unet-start.safetensors` comes last: it marks that all parts are there.
    """
    import diffusers

    build: Any = diffusers.StableDiffusionPipeline
    pipe = build.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    _save_tokenizer(pipe.tokenizer, work / "tokenizer")
    save_tensors(dict(_tower(pipe.text_encoder).state_dict()), work / "text-final.safetensors")
    save_tensors(dict(pipe.vae.state_dict()), work / "vae-final.safetensors")
    files.write_json(work / "history.json", card.history(folder))
    save_tensors(dict(pipe.unet.state_dict()), work / "unet-start.safetensors")


def _export(recipe: Recipe, work: Path, folder: Path) -> None:
    """Write the pipeline to `folder`, in half precision."""
    import diffusers

    build: Any = diffusers.StableDiffusionPipeline
    vae, text, tokens = _frozen(recipe, work)
    unet = build_unet(recipe)
    unet.load_state_dict(load_tensors(work / "unet-final.safetensors"))
    pipe = build(
        vae=vae, text_encoder=text, tokenizer=tokens, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    settings = {"guidance_scale": 4.0, "held_out": sorted(icon_world.held_out())}
    files.write_json(folder / "overpaint.json", settings)
