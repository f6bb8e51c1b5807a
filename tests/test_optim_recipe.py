"""DiffGrad as the optimiser of a training: its rate, checkpoints, and resumed runs."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overpaint.optim import DiffGrad
from overpaint.train.loop import Schedule, fit, optimizers, rate


def test_diffgrad_at_twice_the_rate_equals_adamw_if_gradients_hardly_change() -> None:
    ends = []
    for outer in ("adamw", "diffgrad"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Linear(4, 4)})
        before = [p.detach().clone() for p in model.parameters()]
        (first,) = optimizers(model, lr=0.01, decay=0.0, outer=outer)
        assert isinstance(first, DiffGrad) == (outer == "diffgrad")
        for _ in range(20):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e-4)
            first.step()
        ends.append([p - old for p, old in zip(model.parameters(), before, strict=True)])
    for first, second in zip(*ends, strict=True):
        assert torch.allclose(first, second, rtol=1e-3) and (first < -0.15).all()


def test_the_rate_rises_and_falls() -> None:
    assert rate(2.0, 0.01) == pytest.approx(1.002, abs=1e-3)
    assert rate(2.0, 0.5) == pytest.approx(1.0)
    assert rate(2.0, 1.0) == pytest.approx(0.0)


def _train(folder: Path, optimizer: str, *, steps: int) -> list[int]:
    """Train up to `steps` steps in all, and return the numbers of the new steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Linear(8, 8), "inside": nn.Linear(8, 8)})
    done: list[int] = []

    def loss(step: int) -> Tensor:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        done.append(step)
        return model["inside"](model["embed"](x)).square().mean()

    schedule = Schedule(minutes=1, lr=0.01, steps=steps, optimizer=optimizer)  # type: ignore[arg-type]
    fit(model, loss, schedule, stage="toy", folder=folder)
    return done


def test_a_run_is_resumed_with_the_same_optimiser(tmp_path: Path) -> None:
    assert _train(tmp_path, "diffgrad", steps=5) == [0, 1, 2, 3, 4]
    path = tmp_path / "toy.safetensors"
    assert "optimizer.0.0.previous_grad" in load_file(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["optimizer"] == "diffgrad"
    with pytest.raises(ValueError, match="must be 'diffgrad' for .*toy.* got 'adamw'"):
        _train(tmp_path, "adamw", steps=8)
    assert _train(tmp_path, "diffgrad", steps=8) == [5, 6, 7]
    path.unlink()
    assert _train(tmp_path, "adamw", steps=2) == [0, 1]


def test_checkpoints_without_an_optimiser_are_adamws(tmp_path: Path) -> None:
    _train(tmp_path, "adamw", steps=2)
    path = tmp_path / "toy.safetensors"
    with safe_open(path, framework="pt") as file:
        progress = file.metadata()["progress"]
    save_file(load_file(path), path, {"progress": progress})
    with pytest.raises(ValueError, match="must be 'adamw' .* got 'diffgrad'"):
        _train(tmp_path, "diffgrad", steps=4)
    assert _train(tmp_path, "adamw", steps=4) == [2, 3]


def test_an_unknown_optimiser_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`optimizer` must be one of adamw, diffgrad, got 'sgd'"):
        _train(tmp_path, "sgd", steps=1)
