"""The recipe of `icons`: its loss, latents, and the stages that a resumed run trains."""

import json
from dataclasses import replace
from pathlib import Path

import icon_worlds
import numpy as np
import pytest
import torch

from overpaint import zoo
from overpaint.train import icon_world, icons
from overpaint.train.loop import save_tensors


@pytest.fixture(scope="module")
def world() -> icon_world.World:
    return icon_worlds.build()


def test_equal_captions_share_the_contrastive_target() -> None:
    logits = torch.tensor([[20.0, 20.0, 0.0], [20.0, 20.0, 0.0], [0.0, 0.0, 20.0]])
    # By hand: rows 0 and 1 put half on each twin, ln 2 each; row 2 is certain.
    assert icons.contrast(logits, ["a", "a", "b"]).item() == pytest.approx(
        2 / 3 * np.log(2), abs=1e-5
    )


def test_standardise_keeps_pictures_and_gives_latents_mean_0_and_std_1(
    world: icon_world.World,
) -> None:
    torch.manual_seed(0)
    vae = icons.build_vae(replace(icons.CPU, vae_channels=(8, 8, 8, 8))).eval()
    rng = np.random.default_rng((0, 4))
    pixels = icons.as_pixels([world.sample(rng) for _ in range(64)])
    with torch.no_grad():
        before = vae.encode(pixels[:8]).latent_dist
        drawn = vae.decode(before.mean).sample
        icons.standardise(vae, world, seed=0, device="cpu", batches=1)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
        after = vae.encode(pixels[:8]).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, drawn, atol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    scale = before.std / after.std  # one factor a channel, for the mean and the deviation alike
    assert torch.allclose(scale, scale.mean((0, 2, 3), keepdim=True).expand_as(scale), rtol=1e-3)


def test_a_resumed_run_trains_the_same_stages(tmp_path: Path) -> None:
    shipped = zoo.folder("icons")
    work = tmp_path / "work"
    work.mkdir()
    whole = dict(zip(("clip", "vae", "unet"), icons.CPU.shares, strict=True))
    assert icons._shares(icons.CUDA, work, tmp_path / "out", resume=True) == dict(
        zip(("clip", "vae", "unet"), icons.CUDA.shares, strict=True)
    )  # the shipped weights have another shape
    assert list(work.iterdir()) == []
    assert icons._shares(icons.CPU, work, tmp_path / "out", resume=True) == {"unet": 1.0}
    assert (work / "unet-start.safetensors").exists()
    (work / "unet.safetensors").touch()  # as a killed run leaves it
    assert icons._shares(icons.CPU, work, tmp_path / "out", resume=True) == {"unet": 1.0}
    assert (
        icons._earlier_runs(work)[-1]["stages"]
        == json.loads((shipped / "card.json").read_text())["stages"]
    )
    assert icons._shares(icons.CPU, work, tmp_path / "out", resume=False) == whole
    assert not (work / "unet-start.safetensors").exists()
    (work / "clip.safetensors").touch()
    assert icons._shares(icons.CPU, work, tmp_path / "out", resume=True) == whole


def test_latents_are_computed_again_for_other_networks(
    tmp_path: Path, world: icon_world.World
) -> None:
    recipe = replace(icons.CPU, pictures=3, vae_channels=(8, 8, 8, 8), text_layers=1, text_width=32)
    tokens = icons.tokenizer(world, tmp_path / "tokenizer")
    run = icons.Run(recipe, world, tmp_path)

    def networks(seed: int) -> None:
        torch.manual_seed(seed)
        tower = icons.build_clip(recipe, len(tokens)).text_model
        save_tensors(dict(tower.state_dict()), tmp_path / "text-final.safetensors")
        save_tensors(dict(icons.build_vae(recipe).state_dict()), tmp_path / "vae-final.safetensors")

    networks(0)
    first = icons._latents(run)
    stamp = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    again = icons._latents(run)
    assert (tmp_path / "latents.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(first["latents"], again["latents"])
    networks(1)
    assert not torch.equal(icons._latents(run)["latents"], first["latents"])
