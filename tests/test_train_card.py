"""Cards and folders of trained models, and trainings that are killed before any rename."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_icons
from test_train_matcher import SMOKE
from tiny_icons import TINY

from overpaint import files
from overpaint.train import card, icons, judge, matcher, photographs

FOLDERS = {
    "icons": {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "overpaint.json"},
    "judge": {"model.safetensors", "heads.safetensors", "labels.json"},
    "matcher": {"config.json", "coarse.safetensors", "fine.safetensors"},
}
SMALL = replace(SMOKE.config, image=64, grid=8, channels=(16,), sr_grid=16, sr_channels=(16,))
TINY_MATCHER = replace(
    SMOKE, config=SMALL, batch=1, first_pairs=1, fine_batch=1, fine_first_pairs=1, checks=1
)


@pytest.fixture
def recipes(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Callable[[Path], Path]]:
    """Return the three recipes, made so small that each trains one step a stage, as functions of a folder."""
    packages = tmp_path_factory.mktemp("packages")
    for module in (icons, judge, matcher):
        monkeypatch.setattr(module, "Schedule", tiny_icons.one_step)
    tiny_icons.shrink(monkeypatch, packages)
    monkeypatch.setattr(icons, "standardise", lambda *_, **__: None)
    monkeypatch.setattr(judge, "RECIPE", TINY)
    monkeypatch.setattr(judge, "real_accuracy", lambda *_, **__: {"object": 0.5})
    monkeypatch.setattr(photographs, "PACKAGES", {})
    monkeypatch.setattr(photographs, "TRAINING", ("skimage/camera.png",))
    monkeypatch.setattr(photographs, "VALIDATION", ("skimage/coins.png",))

    def options(root: Path) -> dict[str, Any]:
        return {"out": root / "model", "work": root / "work", "threads": 1}

    return {
        "icons": lambda root: icons.train(artwork=root, packages=packages, **options(root)),
        "judge": lambda root: judge.train(artwork=root, **options(root)),
        "matcher": lambda root: matcher.train(recipe=TINY_MATCHER, photos=root, **options(root)),
    }


@pytest.mark.parametrize("name", ["icons", "judge", "matcher"])
def test_a_training_killed_before_any_rename_is_resumed(
    name: str, recipes: dict[str, Callable[[Path], Path]], tmp_path: Path
) -> None:
    """The folders are copied before each rename, which is what a kill would leave, and a training resumes each copy."""
    train, root, copies = recipes[name], tmp_path / "root", []
    (root / "model").mkdir(parents=True)
    (root / "model" / "card.json").write_text(json.dumps({"old": True}))
    rename = os.replace

    def copy_and_rename(source: Any, target: Any) -> None:
        if "zoo" not in Path(target).parts:  # the present matcher, which no training reads
            copies.append(tmp_path / f"{len(copies)}")
            shutil.copytree(root, copies[-1])
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", copy_and_rename)
        patch.setattr(files.os, "getpid", lambda: 2**22 + 1)  # of no running process
        train(root)
    assert len(copies) > 5
    for copy in (*copies, root):
        model = copy / "model"
        if model.exists():  # the old model or the new one, complete
            saved = json.loads((model / "card.json").read_text())
            assert "old" in saved or set(saved["sha256"]) >= FOLDERS[name]
        assert train(copy) == model.resolve()
        saved = json.loads((model / "card.json").read_text())
        assert set(saved["sha256"]) >= FOLDERS[name]
        assert {p.name for p in copy.iterdir()} == {"model", "work"}


def test_a_killed_run_that_started_over_does_not_resume_the_run_before(
    recipes: dict[str, Callable[[Path], Path]], tmp_path: Path
) -> None:
    recipes["matcher"](tmp_path)
    before = (tmp_path / "work" / "fine.safetensors").read_bytes()

    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matcher, "fit", kill)
        with pytest.raises(KeyboardInterrupt):
            matcher.train(
                recipe=TINY_MATCHER, photos=tmp_path, out=tmp_path / "model", work=tmp_path / "work",
                threads=1, resume=False, seed=1,
            )  # fmt: skip
    assert not (tmp_path / "work" / "fine.safetensors").exists() and before


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    for train in (icons.train, judge.train):
        with pytest.raises(ValueError, match="holds something else than a model of ours"):
            train(out=tmp_path, minutes=0.0, work=tmp_path / "w", artwork=tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


def test_figures_are_added_to_a_card(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"seed": 1, "figures": {"a": 1.0, "b": 2.0}}))
    card.add_figures(tmp_path, {"b": 3.0})
    saved = json.loads((tmp_path / "card.json").read_text())
    assert saved == {"seed": 1, "figures": {"a": 1.0, "b": 3.0}}


def test_without_git_a_card_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card.commit() == ""
