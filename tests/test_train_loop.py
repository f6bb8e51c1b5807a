"""The training loop: resuming from a checkpoint, also after a kill."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from overpaint.train import loop
from overpaint.train.loop import Schedule, fit, remove_checkpoints


def _regression(seen: list[int]) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)

    def loss(step: int) -> Tensor:
        seen.append(step)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.flip(1)).square().mean()

    return model, loss


def _progress(folder: Path) -> dict[str, float]:
    with safe_open(folder / "toy.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["progress"])


def test_a_run_continues_at_its_checkpoint(tmp_path: Path) -> None:
    seen: list[int] = []
    for steps in (3, 7):
        model, loss = _regression(seen)
        fit(model, loss, Schedule(1.0, 0.01, steps, ema_decay=0.9), stage="toy", folder=tmp_path)
        assert seen == list(range(steps))
    remove_checkpoints(tmp_path, ["toy"])
    model, loss = _regression(seen := [])
    fit(model, loss, Schedule(1.0, 0.01, 1), stage="toy", folder=tmp_path)
    assert seen == [0]


def test_the_minutes_include_those_before_a_resume(tmp_path: Path) -> None:
    seen: list[int] = []
    model, loss = _regression(seen)
    fit(model, loss, Schedule(0.02 / 60, 0.01), stage="toy", folder=tmp_path)
    first, spent = len(seen), _progress(tmp_path)["spent"]
    assert first > 0 and spent >= 0.02
    model, loss = _regression(seen)
    fit(model, loss, Schedule(0.02 / 60, 0.01), stage="toy", folder=tmp_path)
    assert len(seen) == first  # nothing is left to do
    fit(model, loss, Schedule((spent + 0.02) / 60, 0.01), stage="toy", folder=tmp_path)
    assert seen == list(range(len(seen))) and len(seen) > first


def test_a_run_killed_at_any_step_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    schedule = Schedule(1.0, 0.01, 6, ema_decay=0.9, muon=False)
    model, loss = _regression([])
    whole = fit(model, loss, schedule, stage="whole", folder=tmp_path).state_dict()
    for killed_at in range(1, 6):
        remove_checkpoints(tmp_path, ["toy"])
        model, loss = _regression([])

        def kill(step: int, loss: Callable[[int], Tensor] = loss, at: int = killed_at) -> Tensor:
            if step == at:
                raise KeyboardInterrupt
            return loss(step)

        with pytest.raises(KeyboardInterrupt):
            fit(model, kill, schedule, stage="toy", folder=tmp_path)
        model, loss = _regression([])
        resumed = fit(model, loss, schedule, stage="toy", folder=tmp_path).state_dict()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_killed_process_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; import torch; from torch import nn\n"
        "from overpaint.train import loop\n"
        "loop.CHECKPOINT_SECONDS = 0.0\n"
        "model = nn.Linear(64, 64)\n"
        "def loss(step):\n"
        "    if step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return model(torch.ones(1, 64)).square().mean()\n"
        "schedule = loop.Schedule(10, 0.1)\n"
        "loop.fit(model, loss, schedule, stage='toy', folder=Path(sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert _progress(tmp_path)["step"] == 3
    assert load_file(tmp_path / "toy.safetensors")["model.weight"].shape == (64, 64)


def test_the_time_in_which_a_process_was_stopped_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LONGEST_STEP_SECONDS", 0.01)
    model, loss = _regression([])

    def slow(step: int) -> Tensor:
        time.sleep(0.1)
        return loss(step)

    fit(model, slow, Schedule(1.0, 0.01, 3), stage="toy", folder=tmp_path)
    assert 0.01 <= _progress(tmp_path)["spent"] <= 0.03 + 1e-6


def test_progress_is_called_with_thousandths_and_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PROGRESS_SECONDS", -1.0)
    calls: list[tuple[int, int, str]] = []
    model, loss = _regression([])
    fit(
        model, loss, Schedule(1.0, 0.01, 4), stage="toy", folder=tmp_path,
        on_progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert [call[:2] for call in calls] == [(250, 1000), (500, 1000), (750, 1000), (1000, 1000)]
    assert calls[0][2].startswith("toy, loss ")


def test_a_loss_that_is_not_finite_raises(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(FloatingPointError, match="the loss became nan: resume from the checkpoint"):
        fit(
            model, lambda _: model(torch.full((1, 2), torch.nan)).sum(), Schedule(1.0, 0.01, 1),
            stage="toy", folder=tmp_path,
        )  # fmt: skip
