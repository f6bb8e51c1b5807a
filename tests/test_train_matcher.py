"""The matcher's recipe: its photographs and their split, the truth of its warps, its store, a run from end to end."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor
from torch.nn import functional as F

from overpaint.errors import MissingExtra
from overpaint.match import Config, Matcher
from overpaint.match import flow as flows
from overpaint.match.conditioning import Features, coarse_conditions, fine_conditions
from overpaint.train import matcher, photographs, programs, scenes, warps

SMOKE = replace(
    matcher.CPU, config=Config.smoke(), batch=2, capacity=8, first_pairs=4, fine_batch=2, fine_capacity=4,
    fine_first_pairs=2, checks=2, check_minutes=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A smooth picture without repetition."""
    noise = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    picture = F.interpolate(noise, (480, 640), mode="bicubic", align_corners=False)[0]
    return (picture.clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture
def no_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the random changes of light, color, blur and noise."""
    monkeypatch.setattr(scenes, "camera", lambda pictures, *_: pictures)


# --- photographs ------------------------------------------------------------------------------------------------------


def test_the_splits_are_disjoint_and_contain_no_scene_of_the_benchmark() -> None:
    splits = (photographs.TRAINING, photographs.VALIDATION, photographs.HELD_OUT)
    names = [name for split in splits for name in split]
    assert len(names) == len(set(names)) == 88
    stems = {Path(name).stem for name in (*photographs.TRAINING, *photographs.VALIDATION)}
    measured = (
        "graf",
        "aloe",
        "motorcycle",
        "left",
        "right",
        "chessboard",
        "box",
        "coffee",
        "china",
    )
    assert not [
        s for s in stems if s.startswith((*measured, "baboon", "grass", "retina", "text_motion"))
    ]
    assert "text" not in stems


def test_photographs_are_rgb_and_at_most_of_the_given_size(tmp_path: Path) -> None:
    grey = photographs.read("skimage/camera.png", tmp_path, side=100)
    assert grey.dtype == torch.uint8 and grey.shape == (3, 100, 100)
    assert torch.equal(grey[0], grey[1])
    wide = photographs.read("sklearn/china.jpg", tmp_path)
    assert wide.shape == (3, 427, 640)  # smaller ones stay
    assert photographs.read("sklearn/china.jpg", tmp_path, side=61).shape == (3, 61, 91)


def test_the_error_for_a_missing_photograph_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no photograph .*apt-get install mate-backgrounds"
    ):
        photographs.locate("mate-backgrounds/nature/Nonesuch.jpg", tmp_path)
    with pytest.raises(ValueError, match=r"no photographs from 'coco': choose from opencv-doc"):
        photographs.locate("coco/1.jpg", tmp_path)
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(
        MissingExtra, match="scikit-image, which is not installed.*pip install scikit-image"
    ):
        photographs.locate("skimage/camera.png", tmp_path)


def test_an_archive_with_another_hash_raises(tmp_path: Path) -> None:
    for name, (version, _) in photographs.PACKAGES.items():
        (tmp_path / f"{name}_{version}_all.deb").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected .*: delete the file"):
        photographs.fetch(tmp_path)


@pytest.mark.parametrize(
    ("output", "is_used"),
    [
        (f"installed {photographs.PACKAGES['opencv-doc'][0]}", True),
        ("installed 4.5.1+dfsg-5", False),
        (f"config-files {photographs.PACKAGES['opencv-doc'][0]}", False),
    ],
)
def test_an_installed_package_is_used_in_the_pinned_version_only(
    output: str, is_used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only program on the path is a dpkg-query that prints `output`; the package's folder exists."""
    query = tmp_path / "bin" / "dpkg-query"
    query.parent.mkdir()
    query.write_text(f"#!/bin/sh\nprintf '%s' '{output}'\n")
    query.chmod(0o755)
    monkeypatch.setenv("PATH", str(query.parent))
    monkeypatch.setitem(photographs._FOLDERS, "opencv-doc", str(tmp_path.relative_to("/")))
    if is_used:
        photographs.fetch(tmp_path / "new", ("opencv-doc",))
        assert not (tmp_path / "new").exists()
        return
    with pytest.raises(FileNotFoundError, match="apt-get is not installed: unpack the package"):
        photographs.fetch(tmp_path / "new", ("opencv-doc",))


def test_a_missing_or_failing_program_raises_with_a_remedy(tmp_path: Path) -> None:
    def messages(program: str) -> programs.Messages:
        return photographs._messages(program, tmp_path, "opencv-doc")

    with pytest.raises(
        FileNotFoundError, match=r"no-such-tool is not installed: unpack the package"
    ):
        programs.run(["no-such-tool"], tmp_path, messages("no-such-tool"))
    with pytest.raises(OSError, match=r"could not fetch or unpack opencv-doc \(.*\): check the"):
        programs.run(["ls", "--nonesuch"], tmp_path, messages("ls"))


# --- warps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", warps.KINDS)
@pytest.mark.usefixtures("no_camera")
def test_the_source_warped_by_the_flow_equals_the_target(kind: str, photo: Tensor) -> None:
    for seed in range(3):
        made = warps.pair(photo, seed, kind, size=96)
        assert torch.equal(made.valid, flows.inside(made.flow))
        valid = made.valid.expand_as(made.target)
        apart = (flows.warp(made.source, made.flow) - made.target).abs()[valid].mean()
        assert apart < 2e-3  # both are interpolated, at other points between pixels
        backwards = (flows.warp(made.source, -made.flow) - made.target).abs()[valid].mean()
        assert backwards > 10 * apart


def test_a_pair_depends_on_the_seed_alone(photo: Tensor) -> None:
    first, again, other = (warps.pair(photo, seed, size=64) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.flow, other.flow)
    both = warps.pairs([photo, photo], [7, 8], size=64)
    assert torch.equal(both.flow, torch.cat([first.flow, other.flow]))


def test_large_flows_are_long_where_valid(photo: Tensor) -> None:
    for seed in range(8):
        made = warps.pair(photo, seed, "large", size=64)
        lengths = made.flow.norm(dim=1, keepdim=True)[made.valid]
        assert lengths.mean() > 0.2 * 64 and made.valid.float().mean() > 0.25


def test_the_test_kinds_use_no_family_of_training(
    photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a family of training")

    for family in ("_homography", "_affine", "_thin_plate", "_layers"):
        monkeypatch.setattr(warps, family, refuse)
    for kind in warps.KINDS[1:]:
        for seed in range(6):
            warps.pair(photo, seed, kind, size=32)
    with pytest.raises(AssertionError, match="a family of training"):
        warps.pair(photo, 0, "training", size=32)


def test_a_homography_maps_corners_to_corners_and_lines_to_lines() -> None:
    corners = torch.tensor([[-1.2, -0.9], [0.8, -1.1], [1.1, 0.7], [-0.6, 1.3]]).double()
    square = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]).double()
    assert torch.allclose(warps.homography(corners, square), corners)
    along = torch.linspace(-1, 1, 9, dtype=torch.float64)
    line = torch.stack([along, 0.3 * along + 0.1], 1)
    moved = warps.homography(corners, line)
    steps = moved.diff(dim=0)
    turn = steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]
    assert turn.abs().max() < 1e-12


def test_a_thin_plate_interpolates_its_points_and_is_exact_for_affine_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(9, 2, generator=generator, dtype=torch.float64) * 2 - 1
    offsets = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    assert (warps.thin_plate(points, offsets, points) - points - offsets).abs().max() < 1e-9
    matrix, places = (
        torch.tensor([[0.2, -0.3], [0.1, 0.4]]).double(),
        3 * torch.randn(5, 2).double(),
    )
    moved = warps.thin_plate(points, points @ matrix + 0.5, places)
    assert torch.allclose(moved, places + places @ matrix + 0.5)
    still = warps.thin_plate(points, torch.zeros_like(points), places)
    assert torch.equal(still, places)


def test_a_spline_field_equals_scipys() -> None:
    offsets = torch.randn(6, 6, 2, generator=torch.Generator().manual_seed(0)).double()
    grid = warps._grid(16)
    moved = (warps.spline(offsets, grid) - grid).numpy()
    knots = (np.arange(6 + 4) - 3 + 0.0) / 3 * 2 - 1  # six control points: three spans from -1 to 1
    rows = BSpline(knots, offsets.numpy(), 3)(grid[:, 0, 1].numpy())  # (H, 6, 2)
    for row, values in zip(rows, moved, strict=True):
        assert np.allclose(BSpline(knots, row, 3)(grid[0, :, 0].numpy()), values, atol=1e-12)


def test_unknown_kinds_fills_and_shapes_raise(photo: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"unknown kind 'hard': choose from training, plain"):
        warps.pair(photo, 0, "hard")
    picture = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"unknown fill 'gold': choose 'flat'"):
        scenes.add_patches(picture, generator, fill="gold", shape="box")
    with pytest.raises(ValueError, match=r"unknown shape 'ring': choose 'box' or 'blob'"):
        scenes.add_patches(picture, generator, fill="flat", shape="ring")


@pytest.mark.parametrize("fill", ["flat", "shaded", "tiles", "pattern"])
@pytest.mark.parametrize("shape", ["box", "blob"])
def test_patches_cover_a_part_of_the_picture(fill: str, shape: str) -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    painted = scenes.add_patches(picture, torch.Generator().manual_seed(2), fill=fill, shape=shape)
    covered = (painted != picture).any(1).float().mean()
    assert 0.005 < covered < 0.9
    assert painted.min() >= 0 and painted.max() <= 1


def test_a_camera_of_strength_0_changes_nothing() -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(min=1e-3)
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(scenes.camera(picture, generator, 0.0), picture, atol=1e-6)
    assert (scenes.camera(picture, generator, 1.0) - picture).abs().mean() > 0.01


def test_blur_of_a_point_is_a_gaussian_of_sum_1() -> None:
    point = torch.zeros(1, 3, 31, 31)
    point[..., 15, 15] = 1
    blurred = scenes._blur(point, 1.5)[0, 0]
    away = torch.arange(31.0) - 15
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert (blurred.sum(0) * away**2).sum().sqrt() == pytest.approx(1.5, rel=0.07)  # cut at 2.5


# --- the recipe -------------------------------------------------------------------------------------------------------


def _features(side: int, seed: int) -> Tensor:
    return torch.randn(1, 8, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("coins", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_augmented_conditions_equal_those_of_augmented_pictures(
    stage: str, coins: tuple[int, int, int]
) -> None:
    config = Config.smoke()
    side = config.grid if stage == "coarse" else config.sr_grid
    flow = 0.1 * torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(3))

    def conditions(turn: bool) -> dict[str, Tensor]:
        maps = [_turned_map(_features(side, seed), coins if turn else (0, 0, 0)) for seed in (1, 2)]
        source, target = (Features(m, m) for m in maps)
        if stage == "coarse":
            result = coarse_conditions(config, source, target)
        else:
            start = _turned_flow(flow, coins) if turn else flow
            result = fine_conditions(config, source, target, start)
        truth = _turned_flow(flow, coins) if turn else flow
        valid = _turned_map(_features(side, 4)[:, :1] > 0, coins if turn else (0, 0, 0)).float()
        return {"initial": result.initial, "stack": result.stack, "truth": truth, "valid": valid}

    generator = _thrown(coins)
    made = matcher.augment(conditions(False), generator, config)
    for name, value in conditions(True).items():
        assert torch.allclose(made[name], value, atol=2e-4), name


def _thrown(coins: tuple[int, int, int]) -> torch.Generator:
    """Return a generator whose next three coins are `coins`."""
    for seed in range(200):
        thrown = torch.rand(3, generator=torch.Generator().manual_seed(seed)) < 0.5
        if tuple(thrown.int().tolist()) == coins:
            return torch.Generator().manual_seed(seed)
    raise AssertionError


def _turned_map(values: Tensor, coins: tuple[int, int, int]) -> Tensor:
    values = values.flip(3) if coins[0] else values
    values = values.flip(2) if coins[1] else values
    return values.transpose(2, 3) if coins[2] else values


def _turned_flow(flow: Tensor, coins: tuple[int, int, int]) -> Tensor:
    x, y = _turned_map(flow, coins).split(1, dim=1)
    x, y = (-x if coins[0] else x), (-y if coins[1] else y)
    return torch.cat([y, x] if coins[2] else [x, y], 1)


def test_the_store_holds_the_last_pairs_in_half_precision() -> None:
    store = matcher.Store(3)
    for number in range(5):
        store.add({"a": torch.full((1, 2), float(number)), "b": torch.full((1,), number + 0.1)})
    assert len(store) == 3
    drawn = store.draw(60, torch.Generator().manual_seed(0))
    assert drawn["a"].dtype == torch.float32
    assert set(drawn["a"][:, 0].tolist()) == {2.0, 3.0, 4.0}
    assert torch.allclose(drawn["b"], drawn["a"][:, 0] + 0.1, atol=2e-3)


def test_jitter_applies_to_half_of_the_pairs_up_to_its_limit() -> None:
    noise = matcher._jitter(torch.Size((64, 2, 16, 16)), 2.0, torch.Generator().manual_seed(0))
    spread = noise.flatten(1).std(1)
    assert 20 < int((spread == 0).sum()) < 44
    assert 0.5 < spread.max() < 3


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on pictures of scikit-image only."""
    monkeypatch.setattr(photographs, "PACKAGES", {})
    monkeypatch.setattr(photographs, "TRAINING", ("skimage/camera.png", "skimage/coins.png"))
    monkeypatch.setattr(photographs, "VALIDATION", ("skimage/astronaut.png",))


@pytest.mark.usefixtures("few")
def test_a_run_writes_a_matcher_with_its_card_and_can_be_resumed(tmp_path: Path) -> None:
    options = {"recipe": SMOKE, "work": tmp_path / "work", "photos": tmp_path, "seed": 3}
    out = matcher.train(out=tmp_path / "model", steps=(3, 2), diffusion=False, **options)  # type: ignore[arg-type]
    trained = Matcher.load(out)
    assert trained.config == replace(SMOKE.config, diffusion=False)
    assert trained.fine is not None
    card = json.loads((out / "card.json").read_text())
    assert card["seed"] == 3 and card["recipe"]["config"]["diffusion"] is False
    steps = {stage: card["stages"][stage]["steps"] for stage in ("coarse", "fine")}
    assert steps == {"coarse": 3, "fine": 2}
    checks = (tmp_path / "work" / "checks.jsonl").read_text()
    lines = [json.loads(line) for line in checks.splitlines()]
    assert [line["stage"] for line in lines] == ["coarse", "fine"]
    assert lines[0]["coarse_given"] == pytest.approx(card["figures"]["coarse_given"], abs=1e-4)
    assert Matcher.load(tmp_path / "work" / "zoo").fine is not None

    again = matcher.train(out=tmp_path / "model", steps=(3, 2), diffusion=False, **options)  # type: ignore[arg-type]
    card = json.loads((again / "card.json").read_text())
    assert {stage: card["stages"][stage]["steps"] for stage in steps} == steps  # all were done


@pytest.mark.usefixtures("few")
def test_rows_of_the_fine_stage_and_errors_of_an_untrained_network(tmp_path: Path) -> None:
    run = matcher._Run(replace(SMOKE, jitter=0.0), tmp_path, tmp_path, 0, "cpu")
    rows = run.rows("fine", 2, torch.Generator().manual_seed(0))
    side = SMOKE.config.sr_grid
    assert rows["stack"].shape == (2, SMOKE.config.stack_channels, side, side)
    assert rows["truth"].abs().max() <= 1 and set(rows["valid"].unique().tolist()) <= {0.0, 1.0}
    errors = run.errors("coarse")
    # An untrained network returns the initial flow after any number of steps.
    assert errors["coarse_steps_1"] == pytest.approx(errors["coarse_given"], rel=1e-5)
    assert errors["coarse_steps_5"] == pytest.approx(errors["coarse_given"], rel=1e-5)


def test_a_folder_of_something_else_and_steps_for_one_stage_raise(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a model of ours"):
        matcher.train(out=tmp_path)
    with pytest.raises(
        ValueError,
        match=r"`steps` must be one positive number for each of coarse and fine, got \[7\]",
    ):
        matcher.train(out=tmp_path / "new", steps=(7,))
