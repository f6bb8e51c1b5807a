"""`icons`: a small Stable Diffusion of the icon world, from artwork to a pipeline folder.

Four stages, each resumable: CLIP's first 16,000 merges as tokenizer; a CLIP trained on captioned pictures and on
everyday language, whose text tower is then frozen; an `AutoencoderKL` of 64x64 pictures to 8x8x8 latents, and of
128x128 ones to 16x16x8; a UNet trained on latents to predict v, every fifth batch on scenes of 128x128 pixels.

    overpaint train icons --minutes 150                 # two CPU cores, resumable
    overpaint train icons --minutes 20 --device cuda    # the same recipe, wider

The shipped weights began as those of the recipe before this one. Their card,
`overpaint/zoo/weights/icons/card.json`, has both runs and the figures.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from overpaint import files, zoo
from overpaint.model.sampling import Progress
from overpaint.train import captions, card, icon_world, language, text_tower
from overpaint.train.icon_scenes import Scenes
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
    Recipe,
    build_clip,
    build_scheduler,
    build_unet,
    build_vae,
)
from overpaint.train.text_tower import as_pixels

__all__ = [
    "CPU",
    "CUDA",
    "Recipe",
    "Run",
    "build_clip",
    "build_unet",
    "build_vae",
    "standardise",
    "train",
    "train_clip",
]

_ATTENTION = 0.06  # part of the UNet's minutes in which only its cross-attention is trained
STAGES = ("tokenizer", "clip", "vae", "unet", "export")


@dataclass(frozen=True)
class Run:
    """Settings that the stages of one training share."""

    recipe: Recipe  # sizes and rates
    scenes: Scenes  # draws the pictures
    packages: Path  # of tokenizer, texts and teacher
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
    packages: Path = Path("runs/packages"),
    on_progress: Progress | None = None,
) -> Path:
    """Train `icons`, write it to `out` as a Stable Diffusion folder and return that folder.

    Args:
        out: The pipeline's folder: a new one, or one that a recipe wrote before.
        minutes: Wall time of the three trained stages together, including that of earlier runs in `work`.
        device: `"cpu"` or `"cuda"`, which selects the wider recipe.
        resume: Continue from the checkpoints in `work`; if there are none, continue with the finished model in `out`,
            or else with the shipped one: with its UNet alone, or, if its text tower has another shape or read words
            that are held out now, with its VAE and UNet beside a new tower. `False` starts over.
        threads: Number of CPU threads.
        seed: Seed of the initial weights and of all random draws.
        stages: Stages to run; a stage needs the results of those before it.
        work: Folder of the checkpoints; may be deleted when the model is written.
        artwork: Folder that the icon sets are downloaded to.
        packages: Folder that tokenizer, texts and teacher are downloaded to; 104 MB.
        on_progress: Called with (done, total, label) every few seconds.

    Raises:
        ValueError: `out` is a folder of something else, or a downloaded file has another SHA-256 than the pinned one.
        OSError: The artwork or a package cannot be downloaded.
    """
    out = card.prepare(out)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = CUDA if device.startswith("cuda") else CPU
    work.mkdir(parents=True, exist_ok=True)
    files.remove_drafts_in(work)
    language.fetch(packages)
    words = captions.Captions(kinds=language.kinds_of_objects(packages))
    scenes = Scenes(icon_world.World(icon_world.fetch(artwork)), words)
    shares = _shares(recipe, work, out, resume=resume)
    if not resume:
        remove_checkpoints(work, [stage for stage in shares if stage in stages])
    run = Run(recipe, scenes, packages, work, device, seed, on_progress)
    if "tokenizer" in stages:
        text_tower.tokenizer(packages, work / "tokenizer", recipe.merges)
    recipes = {"clip": train_clip, "vae": _train_vae, "unet": _train_unet}
    for stage, share in shares.items():
        if stage in stages:
            recipes[stage](run, minutes * share)
    if "export" not in stages:
        return work
    with files.atomic_folder(out) as draft:
        _export(recipe, work, draft)
        attention = ["unet-attention"] if (work / "unet-attention.safetensors").exists() else []
        trained = card.stages(work, (*(s for s in shares if s != "unet"), *attention, "unet"))
        card.save(
            draft, recipe=asdict(recipe), seed=seed, device=device, trained=trained, figures={},
            history=_earlier_runs(work), sources=[*card.icon_sources(), *language.sources()],
        )  # fmt: skip
    return out


def _shares(recipe: Recipe, work: Path, out: Path, *, resume: bool) -> dict[str, float]:
    """Return the part of the minutes of each stage, and write what the stages start from.

    A run that continues a finished model of the same shapes and held-out words trains its UNet only. If only its text
    tower has others, a new tower is trained, and VAE and UNet start from the finished ones. The choice is recorded by
    `start.json` in `work`, so that a resumed run makes the same one.
    """
    shares: dict[str, float] = dict(zip(("clip", "vae", "unet"), recipe.shares, strict=True))
    record = work / "start.json"
    if not resume:
        for name in ("start.json", "history.json"):
            (work / name).unlink(missing_ok=True)
        remove_checkpoints(work, ("vae-start", "unet-start", "unet-attention"))
        return shares
    if not record.exists():
        begun = any((work / f"{stage}.safetensors").exists() for stage in shares)
        models = () if begun else (out, zoo.folder("icons"))
        for folder in models:
            same = _same_shapes(folder, recipe)
            if "unet" in same:
                _unpack(folder, work, with_text="text" in same)
                break
        else:
            return shares
    with damage_named(record):
        start = dict(files.from_json(record.read_bytes()))
    return {"unet": 1.0} if start.get("text") else shares


def _same_shapes(folder: Path, recipe: Recipe) -> set[str]:
    """Return which parts of the model in `folder` can be continued: `"unet"` (with its VAE), `"text"`.

    Their shapes are those of the recipe; the text tower has read the same words too.
    """
    path = folder / "card.json"
    if not path.is_file() or not (folder / "unet").is_dir():
        return set()
    with damage_named(path):
        saved = dict(files.from_json(path.read_bytes()).get("recipe", {}))
    expected = json.loads(json.dumps(asdict(recipe)))
    unet = ("text_width", "vae_channels", "latent_channels", "unet_channels", "unet_layers")
    if any(saved.get(name) != expected[name] for name in unet):
        return set()
    same = all(saved.get(name) == expected[name] for name in ("text_layers", "merges", "held_out"))
    return {"unet", "text"} if same else {"unet"}


def _earlier_runs(work: Path) -> list[dict[str, Any]]:
    """Return the runs that trained the model which this run continues; empty if it started from random weights."""
    path = work / "history.json"
    if not path.is_file():
        return []
    with damage_named(path):
        return [dict(run) for run in files.from_json(path.read_bytes())]


def train_clip(run: Run, minutes: float) -> Any:
    """Return the trained CLIP, whose text tower is the UNet's text encoder."""
    recipe = run.recipe
    tokens = text_tower.tokenizer(run.packages, run.folder / "tokenizer", recipe.merges)
    data = text_tower.texts(run.packages, run.folder, tokens, recipe.text_width)
    model = text_tower.network(recipe, tokens, data).to(run.device)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((run.seed, 2, step))
        return text_tower.draw_loss(
            model, tokens, run.scenes, data, rng, recipe.clip_batch, run.device
        )

    schedule = Schedule(minutes, recipe.clip_lr, ema_decay=recipe.clip_ema, muon=False)
    trained: Any = fit(
        model, loss, schedule, stage="clip", folder=run.folder, on_progress=run.on_progress
    )
    save_tensors(
        dict(trained["clip"].text_model.state_dict()), run.folder / "text-final.safetensors"
    )
    return trained["clip"]


def _train_vae(run: Run, minutes: float) -> Any:
    """Return the trained autoencoder, whose latents have mean 0 and standard deviation 1.

    Of an autoencoder that is continued, the decoder alone is trained: the UNet knows the latents.
    """
    recipe, device = run.recipe, run.device
    begun = run.folder / "vae-start.safetensors"
    model = _start(build_vae(recipe), begun)
    model = model.to(device, memory_format=torch.channels_last)
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(not begun.exists())

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((run.seed, 3, step))
        generator = torch.Generator().manual_seed(step)
        small = step % 2 == 0
        draw, rows = (run.scenes.small, 1) if small else (run.scenes.large, 2)
        pixels = as_pixels([draw(rng) for _ in range(max(1, recipe.vae_batch // rows))])
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
    if not begun.exists():
        standardise(vae, run.scenes, seed=run.seed, device=device)
    save_tensors(dict(vae.state_dict()), run.folder / "vae-final.safetensors")
    return vae


@torch.no_grad()
def standardise(vae: Any, scenes: Scenes, *, seed: int, device: str, batches: int = 24) -> None:
    """Fold each latent channel's mean and std into the 1x1 convolutions, so that latents have mean 0 and std 1."""
    rng = np.random.default_rng((seed, 4))
    latents = torch.cat(
        [
            vae.encode(
                as_pixels([scenes.small(rng) for _ in range(64)]).to(device)
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


def _start(model: Any, path: Path) -> Any:
    """Return `model` with the weights that a training continues from, if there are any."""
    if path.exists():
        model.load_state_dict(load_tensors(path))
    return model


def _train_unet(run: Run, minutes: float) -> Any:
    """Return the trained UNet: the cross-attention learns the text features first, then everything is trained."""
    recipe, device, folder = run.recipe, run.device, run.folder
    sets = _latents(run)
    model = _start(build_unet(recipe), folder / "unet-start.safetensors")
    model = model.to(device, memory_format=torch.channels_last)
    alphas = build_scheduler().alphas_cumprod.to(device)

    @sdpa_kernel(SDPBackend.MATH)  # a fifth faster for latents as small as these
    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        # Every fifth batch shows scenes of 128 pixels, half as many.
        large = step % 5 == 4
        data, batch = sets["large" if large else "small"], recipe.unet_batch // (2 if large else 1)
        rows = torch.randint(len(data["latents"]), (batch,), generator=generator)
        clean = data["latents"][rows].to(device).float()
        noise = torch.randn(clean.shape, generator=generator).to(device)
        # Stratified: one timestep in each of `batch` equal parts of the schedule.
        t = (
            (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * len(alphas)
        ).long()
        drop = torch.rand(batch, generator=generator) < recipe.drop_caption
        context = data["features"][torch.where(drop, 0, data["rows"][rows])].to(device).float()
        a = alphas[t.to(device)].view(-1, 1, 1, 1)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            out = model(
                noisy.contiguous(memory_format=torch.channels_last), t.to(device), context
            ).sample
        # No weights: those of min-SNR are too small for the noisy steps, which determine the shapes.
        return (out.float() - velocity).square().mean()

    if (folder / "unet-start.safetensors").exists():
        if not (folder / "unet.safetensors").exists():
            _train_attention(run, model, loss, minutes * _ATTENTION)
        minutes *= 1 - _ATTENTION
    schedule = Schedule(minutes, recipe.unet_lr, ema_decay=recipe.unet_ema)
    unet = fit(model, loss, schedule, stage="unet", folder=folder, on_progress=run.on_progress)
    save_tensors(dict(unet.state_dict()), folder / "unet-final.safetensors")
    return unet


def _train_attention(run: Run, model: Any, loss: Callable[[int], Tensor], minutes: float) -> None:
    """Train the cross-attention of the UNet, in place, while its other weights stay."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn2" in name)
    schedule = Schedule(minutes, run.recipe.unet_lr)
    fit(
        model, loss, schedule, stage="unet-attention", folder=run.folder, on_progress=run.on_progress
    )  # fmt: skip
    model.requires_grad_(True)


@torch.no_grad()
def _latents(run: Run) -> dict[str, dict[str, Tensor]]:
    """Return the training pictures of both sizes as latents, with the features of their captions.

    Returns:
        For `"small"` and `"large"` pictures: `latents` (P, 8, S, S), S = 8 or 16; `features` (U, 32, D), of which row 0
        is the empty prompt; `rows` (P,), the row of `features` of each picture.
    """
    vae, text, tokens = _frozen(run.recipe, run.folder)
    text = text.to(run.device)
    result = {}
    for name in ("small", "large"):
        latents, texts = _encoded_pictures(run, vae, name)
        number = {caption: i for i, caption in enumerate(dict.fromkeys(["", *texts]))}
        result[name] = {
            "latents": latents,
            "features": _features(text, tokens, list(number), run.device),
            "rows": torch.tensor([number[caption] for caption in texts]),
        }
    return result


@torch.no_grad()
def _encoded_pictures(
    run: Run, vae: Any, name: Literal["small", "large"]
) -> tuple[Tensor, list[str]]:
    """Return the latents (P, 8, S, S) and captions of the training pictures of one size, computed once and saved."""
    recipe = run.recipe
    draw, total = (
        (run.scenes.small, recipe.pictures)
        if name == "small"
        else (run.scenes.large, recipe.scenes)
    )
    path = run.folder / f"latents-{name}.safetensors"
    digest = hashlib.sha256(f"{total} {run.seed} {recipe.held_out}".encode())
    for part in (vae.encoder, vae.quant_conv):  # the latents do not depend on the decoder
        for tensor in part.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    key = digest.hexdigest()
    if path.exists():
        with damage_named(path), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("made_of") == key:
                return file.get_tensor("latents"), json.loads(metadata["captions"])
    vae = vae.to(run.device)
    rng = np.random.default_rng((run.seed, 5, name == "large"))
    latents, texts = [], []
    for start in range(0, total, 128):
        pictures = [draw(rng) for _ in range(min(128, total - start))]
        pixels = as_pixels(pictures).to(run.device)
        latents.append(vae.encode(pixels).latent_dist.mean.half().cpu())
        texts += [p.caption for p in pictures]
        if run.on_progress:
            run.on_progress(min(start + 128, total), total, f"pictures, {name}")
    stack = torch.cat(latents)
    save_tensors({"latents": stack}, path, {"made_of": key, "captions": json.dumps(texts)})
    return stack, texts


def _features(text: Any, tokens: Any, prompts: list[str], device: str) -> Tensor:
    """Return the states of the text tower, float16 (N, 32, D)."""
    states = []
    for start in range(0, len(prompts), 512):
        ids = tokens(
            prompts[start : start + 512],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        states.append(text(ids.input_ids.to(device)).last_hidden_state.half().cpu())
    return torch.cat(states)


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


def _unpack(folder: Path, work: Path, *, with_text: bool) -> None:
    """Write the parts of the pipeline in `folder` to `work`, for a training to continue from.

    With `with_text` the text tower and the VAE count as finished stages. Without it only the starts of VAE and UNet
    are written, and the UNet's keys and values of the text are drawn anew. `start.json` comes last: it marks that all
    parts are there.
    """
    import diffusers

    build: Any = diffusers.StableDiffusionPipeline
    pipe = build.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    vae = dict(pipe.vae.state_dict())
    save_tensors(vae, work / ("vae-final.safetensors" if with_text else "vae-start.safetensors"))
    if with_text:
        shutil.rmtree(work / "tokenizer", ignore_errors=True)
        with files.atomic(work / "tokenizer") as draft:
            pipe.tokenizer.save_pretrained(draft)
        save_tensors(dict(_tower(pipe.text_encoder).state_dict()), work / "text-final.safetensors")
    files.write_json(work / "history.json", card.history(folder))
    if not with_text:  # nothing is left of how the earlier text tower's features were read
        for name, module in pipe.unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                module.reset_parameters()
    save_tensors(dict(pipe.unet.state_dict()), work / "unet-start.safetensors")
    files.write_json(work / "start.json", {"text": with_text})


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
