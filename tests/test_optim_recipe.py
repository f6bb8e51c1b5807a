"""DiffGrad in the training recipes: an option of their loop, kept with the checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overpaint.optim import DiffGrad
from overpaint.train.loop import fit, optimizers, rate


def test_twice_the_rate_of_diffgrad_is_adamw_where_gradients_hardly_change() -> None:
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
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=1e-3) and (one < -0.15).all()


def test_the_rate_rises_and_falls() -> None:
    assert rate(2.0, 0.01) == pytest.approx(1.002, abs=1e-3)
    assert rate(2.0, 0.5) == pytest.approx(1.0)
    assert rate(2.0, 1.0) == pytest.approx(0.0)


def _train(folder: Path, optimizer: str, *, seconds: float, resume: bool = True) -> list[int]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Linear(8, 8), "inside": nn.Linear(8, 8)})
    steps: list[int] = []

    def loss(step: int) -> Tensor:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        steps.append(step)
        return model["inside"](model["embed"](x)).square().mean()

    fit(
        model, loss, stage="toy", folder=folder, minutes=seconds / 60, lr=0.01,
        optimizer=optimizer, resume=resume,  # type: ignore[arg-type]
    )  # fmt: skip
    return steps


def test_a_run_goes_on_with_the_optimiser_that_it_began_with(tmp_path: Path) -> None:
    seen = _train(tmp_path, "diffgrad", seconds=0.2)
    path = tmp_path / "toy.safetensors"
    assert "optimizer.0.0.previous_grad" in load_file(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["optimizer"] == "diffgrad"
    with pytest.raises(
        ValueError, match="must be 'diffgrad' for .*toy.* got 'adamw'. Go on with .*start anew"
    ):
        _train(tmp_path, "adamw", seconds=1)
    assert _train(tmp_path, "diffgrad", seconds=0.6)[0] == len(seen) > 0
    assert _train(tmp_path, "adamw", seconds=0.1, resume=False)[0] == 0


def test_checkpoints_of_before_the_option_are_of_adamw(tmp_path: Path) -> None:
    _train(tmp_path, "adamw", seconds=0.1)
    path = tmp_path / "toy.safetensors"
    with safe_open(path, framework="pt") as file:
        progress = file.metadata()["progress"]
    save_file(load_file(path), path, {"progress": progress})
    with pytest.raises(ValueError, match="must be 'adamw' .* got 'diffgrad'"):
        _train(tmp_path, "diffgrad", seconds=0.2)
    assert len(_train(tmp_path, "adamw", seconds=0.2)) > 0


def test_another_optimiser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="`optimizer` must be one of adamw, diffgrad, got 'sgd'. Leave it out"
    ):
        _train(tmp_path, "sgd", seconds=1)
