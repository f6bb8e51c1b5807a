"""`icons`: a small Stable Diffusion of the icon world, from artwork to a pipeline folder.

Four stages, each resumable: a BPE tokenizer of 2,304 entries; a CLIP trained contrastively, whose text tower is then
frozen; an `AutoencoderKL` of 64x64 pictures to 8x8x8 latents; a UNet trained on latents to predict v.

    overpaint train icons --minutes 150                 # two CPU cores, resumable
    overpaint train icons --minutes 20 --device cuda    # the same recipe, wider

Promised on two CPU cores of 2.5 GHz in 150 minutes: the card's figures, in `overpaint/zoo/weights/icons/card.json`.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from overpaint import zoo
from overpaint.train import card, icon_world
from overpaint.train.loop import Progress, fit, save_tensors
from overpaint.train.parts import (
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
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train `icons` and write it to `out` as a Stable Diffusion folder.

    Args:
        out: The pipeline's folder: a new one, or one that a recipe wrote before.
        minutes: Wall time of the three trained stages together, earlier runs in `work` counted in.
        device: `"cpu"` or `"cuda"`; the latter takes the wider recipe.
        resume: Continue from the checkpoints in `work`; where there are none, go on with the UNet of the finished
            model in `out`, or else of the one that ships, if it has this recipe's shape. `False` starts over.
        threads: CPU threads, fixed for the run.
        seed: Of the weights' initialisation and of everything drawn.
        stages: Which stages to run; a stage needs those before it done.
        work: Checkpoints; safe to delete when the folder is written.
        artwork: Where the icon sets are fetched to.
        on_progress: Told about progress every few seconds.

    Raises:
        ValueError: `out` is a folder of something else.
        OSError: The artwork cannot be fetched.
    """
    card.check_target(out)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = CUDA if device.startswith("cuda") else CPU
    work.mkdir(parents=True, exist_ok=True)
    world = icon_world.World(icon_world.fetch(artwork))
    shares = _shares(recipe, work, out, resume=resume)
    if "tokenizer" in stages:
        tokenizer(world, work / "tokenizer", seed=seed)
    options = {"folder": work, "resume": resume, "on_progress": on_progress}
    for stage, share in shares.items():
        if stage in stages:
            run = {"clip": train_clip, "vae": _train_vae, "unet": _train_unet}[stage]
            run(recipe, world, device=device, minutes=minutes * share, seed=seed, **options)
    if "export" not in stages:
        return work
    history = _behind(work)
    _export(recipe, work, out)
    return card.write_card(
        out,
        recipe=asdict(recipe),
        seed=seed,
        device=device,
        trained=card.stages(work, tuple(shares)),
        figures={},
        history=history,
    ).parent


def _shares(recipe: Recipe, work: Path, out: Path, *, resume: bool) -> dict[str, float]:
    """Return the share of the minutes of each stage; a run that goes on from a finished model trains its UNet alone.

    Which of the two a run is stays written in `work`, so that it goes on as it began.
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
    """Say whether `folder` holds a model that this recipe's networks can take over."""
    path = folder / "card.json"
    if not path.is_file() or not (folder / "unet").is_dir():
        return False
    made = json.loads(path.read_text()).get("recipe", {})
    names = ["text_layers", "text_width", "vae_channels", "latent_channels"]
    names += ["unet_channels", "unet_layers"]
    wanted = json.loads(json.dumps(asdict(recipe)))
    return all(made.get(name) == wanted[name] for name in names)


def _behind(work: Path) -> list[dict[str, Any]]:
    """Return the runs behind the model that this one went on from; none where it began at nothing."""
    path = work / "history.json"
    return json.loads(path.read_text()) if path.is_file() else []


def tokenizer(world: icon_world.World, folder: Path, *, seed: int = 0) -> Any:
    """Train the BPE tokenizer once on icon names and captions; return it as a `CLIPTokenizer`."""
    import transformers

    build: Any = transformers.CLIPTokenizer
    if not (folder / "tokenizer.json").exists():
        rng = np.random.default_rng((seed, 1))
        captions = [world.sample(rng).caption for _ in range(400)]
        vocabulary, merges = _byte_pairs(icon_world.captions_corpus(world.sets, captions))
        build(vocab=vocabulary, merges=merges, model_max_length=TOKENS).save_pretrained(folder)
    return build.from_pretrained(folder)


def _byte_pairs(lines: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train merges with CLIP's own splitting; numbering as in CLIP: bytes, bytes + `</w>`, merges, two specials."""
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
    kept = []
    for left, right in merges:
        if left + right not in seen and len(names) < VOCABULARY - 2:
            seen.add(left + right)
            names.append(left + right)
            kept.append((left, right))
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: index for index, name in enumerate(names)}, kept


def train_clip(
    recipe: Recipe,
    world: icon_world.World,
    *,
    device: str,
    minutes: float,
    seed: int,
    folder: Path,
    resume: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Any:
    """Train the CLIP; its text tower is what the UNet will read."""
    tokens = tokenizer(world, folder / "tokenizer", seed=seed)
    model = build_clip(recipe, len(tokens)).to(device)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((seed, 2, step))
        pictures = [world.sample(rng) for _ in range(recipe.clip_batch)]
        pixels = as_pixels(pictures).to(device)
        pixels = pixels + 0.05 * torch.randn(pixels.shape, generator=torch.manual_seed(step)).to(
            device
        )
        ids = tokens(
            [p.caption for p in pictures], padding="longest", return_tensors="pt"
        ).input_ids
        result = model(input_ids=ids.to(device), pixel_values=pixels)
        return contrast(result.logits_per_text, [p.caption for p in pictures])

    done = fit(
        model, loss, stage="clip", folder=folder, minutes=minutes, lr=recipe.clip_lr, ema_decay=0.99, muon=False,
        resume=resume, on_progress=on_progress,
    )  # fmt: skip
    tower: Any = done.text_model
    save_tensors(dict(tower.state_dict()), folder / "text-final.safetensors")
    return done


def as_pixels(pictures: list[icon_world.Picture]) -> Tensor:
    """Stack pictures to (B, 3, 64, 64), range [-1, 1]."""
    stack = torch.from_numpy(np.stack([p.pixels for p in pictures]))
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1


def contrast(logits: Tensor, captions: list[str]) -> Tensor:
    """CLIP's symmetric cross-entropy; equal captions share the target."""
    index = {caption: i for i, caption in enumerate(captions)}
    same = torch.tensor([index[c] for c in captions], device=logits.device)
    target = (same[:, None] == same[None]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def _train_vae(
    recipe: Recipe,
    world: icon_world.World,
    *,
    device: str,
    minutes: float,
    seed: int,
    folder: Path,
    resume: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Any:
    model = build_vae(recipe).to(device, memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((seed, 3, step))
        generator = torch.Generator().manual_seed(step)
        pixels = as_pixels([world.sample(rng) for _ in range(recipe.vae_batch)])
        pixels = pixels.to(device, memory_format=torch.channels_last)
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        # A little more noise than the posterior's own: the decoder must forgive what a sampler gets wrong.
        drawn = model.decode(posterior.mean + (posterior.std + 0.05) * noise).sample
        difference = drawn - pixels
        edges = sum(difference.diff(dim=d).abs().mean() for d in (2, 3))
        return (
            difference.abs().mean()
            + difference.square().mean()
            + 0.5 * edges
            + 3e-5 * posterior.kl().mean() / 64
        )

    done = fit(
        model, loss, stage="vae", folder=folder, minutes=minutes, lr=recipe.vae_lr, weight_decay=0.0, ema_decay=0.99,
        resume=resume, on_progress=on_progress,
    )  # fmt: skip
    standardise(done, world, seed=seed, device=device)
    save_tensors(dict(done.state_dict()), folder / "vae-final.safetensors")
    return done


@torch.no_grad()
def standardise(
    vae: Any, world: icon_world.World, *, seed: int, device: str, batches: int = 24
) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions, so that latents have mean 0, std 1."""
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


def _train_unet(
    recipe: Recipe,
    world: icon_world.World,
    *,
    device: str,
    minutes: float,
    seed: int,
    folder: Path,
    resume: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Any:
    data = _latents(recipe, world, folder, seed=seed, device=device)
    latents, features, rows = (data[k].to(device) for k in ("latents", "features", "rows"))
    model = build_unet(recipe)
    if resume and (folder / "unet-start.safetensors").exists():
        model.load_state_dict(load_file(folder / "unet-start.safetensors"))
    model = model.to(device, memory_format=torch.channels_last)
    alphas = build_scheduler().alphas_cumprod.to(device)
    batch = recipe.unet_batch

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pick = torch.randint(len(latents), (batch,), generator=generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator).to(device)
        # Stratified: one timestep from each of `batch` equal parts of the schedule.
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
        # All of the schedule counts alike: min-SNR weights starve the noisy steps, where shapes are decided.
        return (out.float() - velocity).square().mean()

    done = fit(
        model, loss, stage="unet", folder=folder, minutes=minutes, lr=recipe.unet_lr, ema_decay=0.998,
        resume=resume, on_progress=on_progress,
    )  # fmt: skip
    save_tensors(dict(done.state_dict()), folder / "unet-final.safetensors")
    return done


@torch.no_grad()
def _latents(
    recipe: Recipe, world: icon_world.World, folder: Path, *, seed: int, device: str
) -> dict[str, Tensor]:
    """Draw and encode the training pictures once: latents (P, 8, 8, 8), features (U, 32, D), rows (P,) into features.

    Row 0 of `features` is the empty prompt.
    """
    path = folder / "latents.safetensors"
    key = _key(folder, recipe.pictures, seed)
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_of") == key:
                return load_file(path)
    vae, text, tokens = _frozen(recipe, folder)
    vae, text = vae.to(device), text.to(device)
    rng = np.random.default_rng((seed, 5))
    latents, rows, captions = [], [], {"": 0}
    for start in range(0, recipe.pictures, 256):
        pictures = [world.sample(rng) for _ in range(min(256, recipe.pictures - start))]
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
    """Return a hash of all that the latents and features depend on: both networks, how many, the seed."""
    digest = hashlib.sha256(f"{pictures} {seed}".encode())
    for name in ("text-final", "vae-final"):
        digest.update((folder / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()


def _frozen(recipe: Recipe, folder: Path) -> tuple[Any, Any, Any]:
    """Return the trained `AutoencoderKL`, `CLIPTextModel` and tokenizer, in evaluation mode."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel(build_clip(recipe, len(tokens)).config.text_config)
    _tower(text).load_state_dict(load_file(folder / "text-final.safetensors"))
    vae = build_vae(recipe)
    vae.load_state_dict(load_file(folder / "vae-final.safetensors"))
    return vae.eval(), text.eval(), tokens


def _tower(text: Any) -> Any:
    """Return the tower itself: transformers 5 dropped the `text_model.` level of `CLIPTextModel`, 4.x has it."""
    return getattr(text, "text_model", text)


def _unpack(folder: Path, work: Path) -> None:
    """Lay the parts of the pipeline in `folder` out in `work` as if its stages had just ended."""
    import diffusers

    build: Any = diffusers.StableDiffusionPipeline
    pipe = build.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.tokenizer.save_pretrained(work / "tokenizer")
    save_tensors(dict(_tower(pipe.text_encoder).state_dict()), work / "text-final.safetensors")
    save_tensors(dict(pipe.vae.state_dict()), work / "vae-final.safetensors")
    (work / "history.json").write_text(json.dumps(card.history(folder)))
    save_tensors(dict(pipe.unet.state_dict()), work / "unet-start.safetensors")


def _export(recipe: Recipe, work: Path, out: Path) -> None:
    """Write the pipeline folder in fp16, beside `out` first."""
    import diffusers

    build: Any = diffusers.StableDiffusionPipeline
    vae, text, tokens = _frozen(recipe, work)
    net = build_unet(recipe)
    net.load_state_dict(load_file(work / "unet-final.safetensors"))
    pipe = build(
        vae=vae, text_encoder=text, tokenizer=tokens, unet=net, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with card.replacing(out) as beside:
        pipe.to(torch.float16).save_pretrained(beside, safe_serialization=True)
        settings = {"guidance_scale": 4.0, "held_out": sorted(icon_world.held_out())}
        (beside / "overpaint.json").write_text(json.dumps(settings, indent=1) + "\n")
