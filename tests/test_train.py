"""The training recipes: the icon world on artwork made here, the loop's resume, the folding of latents."""

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from overpaint import zoo
from overpaint.train import card, icon_world, icons, judge
from overpaint.train.loop import fit, save_tensors
from overpaint.train.muon import orthogonalise


@pytest.fixture(scope="module")
def world() -> icon_world.World:
    """A world whose every icon is a dot, so that no artwork is needed."""
    dot = {"body": '<circle cx="8" cy="8" r="7" fill="#123456"/>'}
    names = [
        *icon_world.OBJECTS.values(),
        *icon_world.ACTIONS.values(),
        *icon_world.FLAGS.values(),
        *icon_world.LOGOS,
    ]
    icon_set = {"icons": dict.fromkeys(names, dot), "width": 16, "height": 16}
    return icon_world.World({name: icon_set for name in icon_world.PACKAGES})


@pytest.fixture(scope="module")
def pictures(world: icon_world.World) -> list[icon_world.Picture]:
    rng = np.random.default_rng(0)
    return [world.sample(rng) for _ in range(1500)]


def test_training_never_shows_a_held_out_pair(pictures: list[icon_world.Picture]) -> None:
    singles = {(p.object, p.style) for p in pictures if p.object in icon_world.OBJECTS}
    assert len(singles) > 300
    assert not singles & icon_world.held_out()
    assert not {(p.object, p.color) for p in pictures} & icon_world.held_out_colors()


def test_held_out_pairs_are_a_tenth_and_never_move() -> None:
    kept = icon_world.held_out()
    assert len(kept) == len(icon_world.OBJECTS) * len(icon_world.STYLES) // 10
    digest = hashlib.sha256(repr(sorted(kept)).encode()).hexdigest()
    assert digest[:12] == "732f0e8764ec"  # the shipped weights were trained without exactly these


def test_captions_name_what_the_picture_shows(pictures: list[icon_world.Picture]) -> None:
    for picture in pictures:
        others = [
            s for s in icon_world.STYLES if f"{s} style" in picture.caption and s != picture.style
        ]
        assert not others
        if picture.object in icon_world.OBJECTS and "thing" not in picture.caption:
            assert picture.object in picture.caption


def test_background_is_the_named_color(world: icon_world.World) -> None:
    pixels = world.single("cat", "noto", "blue", np.random.default_rng(0))
    assert tuple(pixels[0, 0]) == icon_world.COLORS["blue"]
    assert tuple(pixels[32, 32]) == (0x12, 0x34, 0x56)


def test_an_archive_with_another_hash_is_refused(tmp_path: Path) -> None:
    name, (version, _) = next(iter(icon_world.PACKAGES.items()))
    (tmp_path / f"iconify-json-{name}-{version}.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected .* Delete the file"):
        icon_world.fetch(tmp_path)


def test_equal_captions_share_the_contrastive_target() -> None:
    logits = torch.tensor([[20.0, 20.0, 0.0], [20.0, 20.0, 0.0], [0.0, 0.0, 20.0]])
    # By hand: rows 0 and 1 put half on each twin, ln 2 each; row 2 is certain.
    assert icons.contrast(logits, ["a", "a", "b"]).item() == pytest.approx(
        2 / 3 * np.log(2), abs=1e-5
    )


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 10)])
def test_orthogonalise_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (found * (u @ v)).sum() / (found.norm() * (u @ v).norm()) > 0.97


def test_folding_leaves_pictures_alone_and_makes_latents_standard(world: icon_world.World) -> None:
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


def _regression(seen: list[int]) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)

    def loss(step: int) -> Tensor:
        seen.append(step)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        time.sleep(0.002)
        return (model(x) - x.flip(1)).square().mean()

    return model, loss


def _progress(folder: Path) -> dict[str, float]:
    with safe_open(folder / "toy.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["progress"])


def test_a_run_continues_where_its_checkpoint_stands(tmp_path: Path) -> None:
    seen: list[int] = []
    model, loss = _regression(seen)
    fit(model, loss, stage="toy", folder=tmp_path, minutes=0.5 / 60, lr=0.01, ema_decay=0.9)  # type: ignore[arg-type]
    first = len(seen)
    model, loss = _regression(seen)
    minutes = (_progress(tmp_path)["spent"] + 0.2) / 60
    fit(model, loss, stage="toy", folder=tmp_path, minutes=minutes, lr=0.01, ema_decay=0.9)  # type: ignore[arg-type]
    assert seen == list(range(len(seen)))
    assert len(seen) > first


def test_a_killed_run_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = (
        "import torch, sys; from pathlib import Path; from overpaint.train import loop; from torch import nn\n"
        "loop.CHECKPOINT_SECONDS = 0.0\n"
        "model = nn.Linear(64, 64)\n"
        "loop.fit(model, lambda s: model(torch.ones(1, 64)).square().mean(), stage='toy',"
        " folder=Path(sys.argv[1]), minutes=10, lr=0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "toy.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    progress = _progress(tmp_path)
    seen: list[int] = []
    model = nn.Linear(64, 64)

    def loss(step: int) -> Tensor:
        seen.append(step)
        return model(torch.ones(1, 64)).square().mean()

    minutes = (progress["spent"] + 0.2) / 60
    fit(model, loss, stage="toy", folder=tmp_path, minutes=minutes, lr=0.1)
    assert seen[0] == progress["step"] > 0


def test_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
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
    (work / "unet.safetensors").touch()  # a checkpoint, then a kill
    assert icons._shares(icons.CPU, work, tmp_path / "out", resume=True) == {"unet": 1.0}
    assert (
        icons._behind(work)[-1]["stages"]
        == json.loads((shipped / "card.json").read_text())["stages"]
    )
    assert icons._shares(icons.CPU, work, tmp_path / "out", resume=False) == whole
    assert not (work / "unet-start.safetensors").exists()
    (work / "clip.safetensors").touch()
    assert icons._shares(icons.CPU, work, tmp_path / "out", resume=True) == whole


def test_latents_are_drawn_again_for_other_networks(
    tmp_path: Path, world: icon_world.World
) -> None:
    recipe = replace(icons.CPU, pictures=3, vae_channels=(8, 8, 8, 8), text_layers=1, text_width=32)
    tokens = icons.tokenizer(world, tmp_path / "tokenizer")
    options = {"seed": 0, "device": "cpu"}

    def networks(seed: int) -> None:
        torch.manual_seed(seed)
        tower = icons.build_clip(recipe, len(tokens)).text_model
        save_tensors(dict(tower.state_dict()), tmp_path / "text-final.safetensors")
        save_tensors(dict(icons.build_vae(recipe).state_dict()), tmp_path / "vae-final.safetensors")

    networks(0)
    first = icons._latents(recipe, world, tmp_path, **options)
    stamp = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    again = icons._latents(recipe, world, tmp_path, **options)
    assert (tmp_path / "latents.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(first["latents"], again["latents"])
    networks(1)
    assert not torch.equal(
        icons._latents(recipe, world, tmp_path, **options)["latents"], first["latents"]
    )


def test_a_model_takes_the_place_of_another_only_when_it_is_done(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with card.replacing(out) as beside:
        (beside / "card.json").write_text("1")
    assert (out / "card.json").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), card.replacing(out) as beside:
        (beside / "card.json").write_text("2")
        raise KeyboardInterrupt
    assert (out / "card.json").read_text() == "1"
    with card.replacing(out) as beside:
        (beside / "card.json").write_text("3")
    assert (out / "card.json").read_text() == "3"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    for train in (icons.train, judge.train):
        with pytest.raises(ValueError, match="holds something else than a model of ours"):
            train(out=tmp_path, minutes=0.0, work=tmp_path / "w", artwork=tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


def test_without_npm_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="the artwork comes from npm, which is not installed"
    ):
        icon_world.fetch(tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no such host' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(
        OSError,
        match=r"npm could not fetch @iconify-json/twemoji\S* \(no such host\): check the connection",
    ):
        icon_world.fetch(tmp_path)


def test_without_git_a_card_names_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card.commit() == ""


def test_half_an_archive_is_not_left_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (version, _), folder = icon_world.PACKAGES["twemoji"], tmp_path / "artwork"
    archive = folder / f"iconify-json-twemoji-{version}.tgz"
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\necho half > {archive.name}\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(OSError, match=r"npm could not fetch .* \(no reason given\)"):
        icon_world.fetch(folder)
    assert list(folder.iterdir()) == []
    npm.write_text(f"#!/bin/sh\necho whole > {archive.name}\n")
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected"):
        icon_world.fetch(folder)
    assert list(folder.iterdir()) == [archive]
    assert archive.read_text() == "whole\n"
