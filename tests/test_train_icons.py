"""The recipe of `icons`: its latents, and what a run starts from, trains and continues."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import icon_worlds
import numpy as np
import pytest
import tiny_icons
import torch
from tiny_icons import TINY

import overpaint
from overpaint.train import icons, loop, text_tower
from overpaint.train.icon_scenes import Scenes
from overpaint.train.loop import load_tensors, save_tensors

WHOLE = dict(zip(("clip", "vae", "unet"), TINY.shares, strict=True))
STANDARDISE = icons.standardise
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(icon_worlds.build())


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Return the recipe at a tiny size, one step a stage, as a function of the folder for `model` and `work`."""
    packages = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        tiny_icons.shrink(patch, packages)
        patch.setattr(icons, "Schedule", tiny_icons.one_step)
        patch.setattr(icons, "standardise", lambda *_, **__: None)

        def run(root: Path, **options) -> Path:
            folders = {"out": root / "model", "work": root / "work", "artwork": root}
            return icons.train(**folders, packages=packages, threads=1, **options)

        yield run


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with `model` and `work` of a finished training that started from random weights."""
    root = tmp_path_factory.mktemp("finished")
    train(root)
    return root


@pytest.fixture
def continued(finished: Path, tmp_path: Path) -> Path:
    """Return a folder with the finished model and no checkpoints."""
    shutil.copytree(finished / "model", tmp_path / "model")
    return tmp_path


def card(root: Path) -> dict:
    return json.loads((root / "model" / "card.json").read_text())


def weights(root: Path, part: str) -> dict[str, torch.Tensor]:
    """Return the weights of a part of the model in half precision."""
    (path,) = (root / "model" / part).glob("*.safetensors")
    return load_tensors(path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


def halved(path: Path) -> dict[str, torch.Tensor]:
    return {name: value.half() for name, value in load_tensors(path).items()}


def test_standardise_keeps_pictures_and_gives_latents_mean_0_and_std_1(scenes: Scenes) -> None:
    torch.manual_seed(0)
    vae = icons.build_vae(TINY).eval()
    rng = np.random.default_rng((0, 4))
    pixels = text_tower.as_pixels([scenes.small(rng) for _ in range(64)])
    with torch.no_grad():
        before = vae.encode(pixels[:8]).latent_dist
        drawn = vae.decode(before.mean).sample
        icons.standardise(vae, scenes, seed=0, device="cpu", batches=1)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
        after = vae.encode(pixels[:8]).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, drawn, atol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    scale = before.std / after.std  # one factor a channel, for the mean and the deviation alike
    assert torch.allclose(scale, scale.mean((0, 2, 3), keepdim=True).expand_as(scale), rtol=1e-3)


def test_a_training_from_random_weights_has_no_history(finished: Path) -> None:
    saved = card(finished)
    assert saved["history"] == [] and list(saved["stages"]) == ["clip", "vae", "unet"]
    assert saved["recipe"]["merges"] == tiny_icons.MERGES
    assert not (finished / "work" / "unet-start.safetensors").exists()
    for part, name in (("unet", "unet"), ("vae", "vae"), ("text_encoder", "text")):
        trained = halved(finished / "work" / f"{name}-final.safetensors")
        exported = weights(finished, part)
        names = {k.removeprefix("text_model.") for k in exported}
        assert names >= set(trained) and all(
            torch.equal(v, exported.get(k, exported.get(f"text_model.{k}")))
            for k, v in trained.items()
        )


def test_a_finished_model_of_the_same_shapes_goes_on_with_its_unet(
    train: Train, finished: Path, continued: Path
) -> None:
    train(continued)
    start = continued / "work"
    assert json.loads((start / "start.json").read_text()) == {"text": True}
    assert same(weights(continued, "text_encoder"), weights(finished, "text_encoder"))
    assert same(weights(continued, "vae"), weights(finished, "vae"))
    assert same(halved(start / "unet-start.safetensors"), weights(finished, "unet"))
    saved, before = card(continued), card(finished)
    assert list(saved["stages"]) == ["unet-attention", "unet"]
    assert [run["stages"] for run in saved["history"]] == [before["stages"]]
    assert not (start / "clip.safetensors").exists() and not (start / "vae.safetensors").exists()


def reads_text_anew(path: Path, finished: Path) -> bool:
    """Return whether the UNet's keys and values of the text are drawn anew, and all else is the finished one's."""
    begun, old = halved(path), weights(finished, "unet")
    anew = {name for name in old if ".attn2.to_k." in name or ".attn2.to_v." in name}
    drawn = [not torch.allclose(begun[name], old[name], atol=1e-3) for name in anew]
    kept = [{n: t for n, t in part.items() if n not in anew} for part in (begun, old)]
    return len(drawn) > 0 and all(drawn) and same(*kept)


def test_a_new_text_tower_is_trained_beside_the_old_unet(
    train: Train, finished: Path, continued: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icons, "CPU", replace(TINY, text_layers=2))
    train(continued)
    start = continued / "work"
    assert json.loads((start / "start.json").read_text()) == {"text": False}
    assert list(card(continued)["stages"]) == ["clip", "vae", "unet-attention", "unet"]
    assert len(card(continued)["history"]) == 1
    assert same(halved(start / "vae-start.safetensors"), weights(finished, "vae"))
    assert reads_text_anew(start / "unet-start.safetensors", finished)
    moved = weights(continued, "vae")
    distance = sum(float((moved[k] - v).abs().sum()) for k, v in weights(finished, "vae").items())
    assert 0 < distance / sum(v.numel() for v in moved.values()) < 0.01  # a step from the old one
    assert len(weights(continued, "text_encoder")) > len(weights(finished, "text_encoder"))


@pytest.mark.parametrize(
    "other", [{"unet_channels": (64,)}, {"text_width": 64}, {"latent_channels": 4}]
)
def test_a_model_of_other_shapes_is_no_start(
    other: dict, train: Train, finished: Path, tmp_path: Path
) -> None:
    recipe = replace(TINY, **other)
    assert icons._same_shapes(finished / "model", recipe) == set()
    assert icons._shares(recipe, tmp_path, finished / "model", resume=True) == WHOLE
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_compared_by_the_card(finished: Path, tmp_path: Path) -> None:
    model = finished / "model"
    assert icons._same_shapes(model, TINY) == {"unet", "text"}
    assert icons._same_shapes(model, replace(TINY, merges=300)) == {"unet"}
    assert icons._same_shapes(model, replace(TINY, text_layers=2)) == {"unet"}
    assert icons._same_shapes(model, replace(TINY, held_out="draw 1")) == {"unet"}
    assert icons._same_shapes(model, replace(TINY, unet_lr=1.0)) == {"unet", "text"}
    assert icons._same_shapes(tmp_path, TINY) == set()
    (tmp_path / "unet").mkdir()
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(ValueError, match=r"the training's file '.*card.json' is damaged"):
        icons._same_shapes(tmp_path, TINY)


def test_a_resumed_run_trains_the_same_stages(train: Train, finished: Path, tmp_path: Path) -> None:
    model, work = finished / "model", tmp_path / "work"
    work.mkdir()
    assert icons._shares(TINY, work, model, resume=True) == {"unet": 1.0}
    (work / "unet.safetensors").touch()  # as a killed run leaves it
    assert icons._shares(TINY, work, model, resume=True) == {"unet": 1.0}
    assert icons._earlier_runs(work)[-1]["stages"] == card(finished)["stages"]
    assert icons._shares(TINY, work, model, resume=False) == WHOLE
    assert {p.name for p in work.iterdir()} <= {
        "unet.safetensors", "tokenizer", "text-final.safetensors", "vae-final.safetensors",
    }  # fmt: skip
    assert icons._earlier_runs(work) == []
    (work / "clip.safetensors").touch()
    assert icons._shares(TINY, work, model, resume=True) == WHOLE


def test_a_run_killed_while_it_unpacks_a_model_unpacks_it_again(
    train: Train, finished: Path, tmp_path: Path
) -> None:
    recipe = replace(TINY, text_layers=2)
    assert icons._shares(recipe, tmp_path, finished / "model", resume=True) == WHOLE
    (tmp_path / "start.json").unlink()
    (tmp_path / "unet-start.safetensors").write_bytes(b"half")
    assert icons._shares(recipe, tmp_path, finished / "model", resume=True) == WHOLE
    assert reads_text_anew(tmp_path / "unet-start.safetensors", finished)


def test_a_damaged_record_of_the_start_is_named(tmp_path: Path) -> None:
    (tmp_path / "start.json").write_text("[")
    with pytest.raises(ValueError, match=r"the training's file '.*start.json' is damaged"):
        icons._shares(TINY, tmp_path, tmp_path / "model", resume=True)


def test_a_finished_run_is_not_trained_again_and_a_new_one_starts_over(
    train: Train, continued: Path
) -> None:
    train(continued)
    work = continued / "work"
    stamps = {p: p.stat().st_mtime_ns for p in work.glob("*.safetensors") if "final" not in p.name}
    assert {"unet", "unet-attention", "unet-start", "latents-small", "latents-large"} == {
        p.stem for p in stamps
    }
    before = weights(continued, "unet")
    train(continued)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert same(weights(continued, "unet"), before)
    train(continued, resume=False)
    assert card(continued)["history"] == []
    assert list(card(continued)["stages"]) == ["clip", "vae", "unet"]
    assert not (work / "unet-attention.safetensors").exists()
    assert not same(weights(continued, "unet"), before)


def test_the_first_part_of_the_unets_training_moves_its_cross_attention_only(
    train: Train, continued: Path
) -> None:
    train(continued, stages=("unet",))
    start = load_tensors(continued / "work" / "unet-start.safetensors")
    saved = load_tensors(continued / "work" / "unet-attention.safetensors")
    trained = {k[6:]: v for k, v in saved.items() if k.startswith("model.")}
    assert set(trained) == set(start)
    moved = {name for name, value in trained.items() if not torch.equal(value, start[name])}
    attention = {name for name in start if "attn2" in name}
    assert moved <= attention and len(moved) > len(attention) / 2
    final = load_tensors(continued / "work" / "unet-final.safetensors")
    assert {n for n, value in final.items() if not torch.equal(value, start[n])} > attention


def test_latents_have_two_sizes_and_are_computed_again_for_other_networks(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tower, "MERGES", tiny_icons.MERGES)
    packages = tmp_path / "packages"
    tiny_icons.language_packages.write(packages, monkeypatch)
    tokens = text_tower.tokenizer(packages, tmp_path / "tokenizer")
    run = icons.Run(replace(TINY, pictures=5, scenes=3), scenes, packages, tmp_path)

    def networks(seed: int) -> None:
        torch.manual_seed(seed)
        tower = icons.build_clip(TINY, len(tokens)).text_model
        save_tensors(dict(tower.state_dict()), tmp_path / "text-final.safetensors")
        save_tensors(dict(icons.build_vae(TINY).state_dict()), tmp_path / "vae-final.safetensors")

    def stamps() -> list[int]:
        names = ("latents-small", "latents-large")
        return [(tmp_path / f"{name}.safetensors").stat().st_mtime_ns for name in names]

    networks(0)
    first = icons._latents(run)
    assert first["small"]["latents"].shape == (5, 8, 8, 8)
    assert first["large"]["latents"].shape == (3, 8, 16, 16)
    for data, number in ((first["small"], 5), (first["large"], 3)):
        assert len(data["rows"]) == number and data["rows"].min() > 0  # row 0 is the empty prompt
        assert data["features"].shape == (int(data["rows"].max()) + 1, 32, 32)
    assert torch.equal(first["small"]["features"][0], first["large"]["features"][0])
    before = stamps()
    again = icons._latents(run)
    assert stamps() == before
    assert all(same(first[name], again[name]) for name in first)
    networks(1)
    other = icons._latents(run)
    assert not any(torch.equal(first[n]["latents"], other[n]["latents"]) for n in first)


def test_features_are_the_states_of_the_captions(
    train: Train, finished: Path, scenes: Scenes, tmp_path: Path
) -> None:
    run = icons.Run(replace(TINY, pictures=4, scenes=1), scenes, tmp_path, tmp_path, seed=3)
    for name in ("text-final.safetensors", "vae-final.safetensors"):
        shutil.copy(finished / "work" / name, tmp_path)
    shutil.copytree(finished / "work" / "tokenizer", tmp_path / "tokenizer")
    data = icons._latents(run)["small"]
    vae, text, tokens = icons._frozen(TINY, tmp_path)
    rng = np.random.default_rng((3, 5, False))
    pictures = [scenes.small(rng) for _ in range(4)]
    with torch.no_grad():
        latents = vae.encode(text_tower.as_pixels(pictures)).latent_dist.mean
    assert torch.allclose(data["latents"].float(), latents, atol=1e-2)
    for row, picture in zip(data["rows"], pictures, strict=True):
        ids = tokens(picture.caption, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            (state,) = text(ids.input_ids).last_hidden_state
        assert torch.allclose(data["features"][row].float(), state, atol=1e-2)


@pytest.mark.slow
def test_a_training_of_seconds_gives_a_model_that_draws_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_icons.shrink(monkeypatch, tmp_path / "packages")
    monkeypatch.setattr(icons, "Schedule", loop.Schedule)
    monkeypatch.setattr(icons, "standardise", STANDARDISE)
    labels = []
    folder = icons.train(
        out=tmp_path / "model", work=tmp_path / "work", packages=tmp_path / "packages", artwork=tmp_path,
        minutes=0.2, threads=1, on_progress=lambda done, total, label: labels.append(label),
    )  # fmt: skip
    stages = card(tmp_path)["stages"]
    assert all(stages[name]["steps"] > 3 for name in ("clip", "vae", "unet"))
    assert {"pictures, small", "pictures, large"} <= set(labels)
    assert not {p.name for p in tmp_path.iterdir()} - {"model", "work", "packages"}
    model = overpaint.load(folder)
    for size in (64, 128):
        pictures = model.generate("draw me a fox", seed=0, steps=2, height=size, width=size)
        assert pictures.images.shape == (1, 3, size, size)
        assert pictures.images.isfinite().all() and pictures.images.std() > 0
