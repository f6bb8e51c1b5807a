"""The icon world: held-out pairs, captions, colors, and the download of the artwork."""

import hashlib
from pathlib import Path

import icon_worlds
import numpy as np
import pytest

from overpaint.train import icon_world


@pytest.fixture(scope="module")
def world() -> icon_world.World:
    return icon_worlds.build()


class Blocks(icon_world.World):
    """A world in which every icon is a block of the color of its name, which no renderer draws."""

    def icon(self, name: str, set_: str, size: int) -> np.ndarray:
        color = icon_worlds.color_of(f"{set_}:{name}")
        return np.full((size, size, 4), [*(c / 255 for c in color), 1], np.float32)


@pytest.mark.parametrize(
    ("hold_out", "expected"), [(True, "36f2346a6d71"), (False, "ac49d7a21fea")]
)
def test_a_seed_draws_the_pictures_that_the_shipped_judge_was_trained_on(
    hold_out: bool, expected: str
) -> None:
    world, rng = Blocks(icon_worlds.build().sets, hold_out=hold_out), np.random.default_rng(0)
    digest = hashlib.sha256()
    for _ in range(400):
        picture = world.sample(rng)
        digest.update(picture.pixels.tobytes())
        digest.update(
            repr((picture.caption, picture.object, picture.style, picture.color)).encode()
        )
    assert digest.hexdigest()[:12] == expected


@pytest.fixture(scope="module")
def pictures(world: icon_world.World) -> list[icon_world.Picture]:
    rng = np.random.default_rng(0)
    return [world.sample(rng) for _ in range(1500)]


def test_training_pictures_show_no_held_out_pair(pictures: list[icon_world.Picture]) -> None:
    singles = {(p.object, p.style) for p in pictures if p.object in icon_world.OBJECTS}
    assert len(singles) > 300
    assert not singles & icon_world.held_out()
    assert not {(p.object, p.color) for p in pictures} & icon_world.held_out_colors()


def test_held_out_pairs_are_a_fixed_tenth() -> None:
    pairs = icon_world.held_out()
    assert len(pairs) == len(icon_world.OBJECTS) * len(icon_world.STYLES) // 10
    digest = hashlib.sha256(repr(sorted(pairs)).encode()).hexdigest()
    assert digest[:12] == "732f0e8764ec"  # the shipped weights were trained without exactly these


def test_captions_name_object_and_style_of_the_picture(pictures: list[icon_world.Picture]) -> None:
    for picture in pictures:
        others = [
            s for s in icon_world.STYLES if f"{s} style" in picture.caption and s != picture.style
        ]
        assert not others
        if picture.object in icon_world.OBJECTS and "thing" not in picture.caption:
            assert picture.object in picture.caption


def test_the_background_has_the_named_color(world: icon_world.World) -> None:
    pixels = world.single("cat", "noto", "blue", np.random.default_rng(0))
    assert tuple(pixels[0, 0]) == icon_world.COLORS["blue"]
    assert tuple(pixels[32, 32]) == (0x12, 0x34, 0x56)


def test_an_archive_with_another_hash_raises(tmp_path: Path) -> None:
    name, (version, _) = next(iter(icon_world.PACKAGES.items()))
    (tmp_path / f"iconify-json-{name}-{version}.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected .*: delete the file and run"):
        icon_world.fetch(tmp_path)


def test_without_npm_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_incomplete_download_leaves_no_archive(
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
