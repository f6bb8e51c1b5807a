"""A matcher: frozen features and two denoisers of flows, on disk a folder."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from overpaint import zoo
from overpaint.errors import UnsupportedModel
from overpaint.match import backbone
from overpaint.match.conditioning import Config
from overpaint.match.denoiser import Denoiser

__all__ = ["Matcher"]


@dataclass(frozen=True, eq=False)
class Matcher:
    """The parts that match two pictures, in evaluation mode, float32.

    Attributes:
        backbone: Pictures to features; frozen.
        coarse: The denoiser of the coarse flow.
        fine: The denoiser of the fine flow, or None: then the coarse one is all there is.
        config: Sizes and switches.
    """

    backbone: nn.Module
    coarse: Denoiser
    fine: Denoiser | None
    config: Config

    @classmethod
    def build(cls, config: Config, *, seed: int = 0) -> "Matcher":
        """Return an untrained matcher: its answer is where each place's most alike one lies.

        Args:
            config: Sizes and switches.
            seed: Of the random weights, the backbone's too. The global generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            features = backbone.build(config.backbone)
            coarse, fine = Denoiser(config).eval(), Denoiser(config, "fine").eval()
        for part in (coarse, fine):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on CPUs
        return cls(features, coarse, fine, config)

    @classmethod
    def load(cls, source: str | Path = "matcher") -> "Matcher":
        """Load a matcher by zoo name or from a folder, on the CPU.

        Raises:
            ValueError: No such matcher, its weights are missing, or they are not a matcher's.
        """
        folder = zoo.folder("matcher") if source == "matcher" else Path(source)
        if not folder.is_dir():
            raise ValueError(f"unknown matcher {str(source)!r}: name a folder, or 'matcher'.")
        for name in ("config.json", "backbone.safetensors", "coarse.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"the matcher at {str(folder)!r} has no {name}: "
                    "install the package anew, or train one with `overpaint train matcher`."
                )
        matcher = cls.build(_read_config(folder / "config.json"))
        _fill(matcher.backbone, folder / "backbone.safetensors")
        _fill(matcher.coarse, folder / "coarse.safetensors")
        fine = matcher.fine if (folder / "fine.safetensors").is_file() else None
        if fine is not None:
            _fill(fine, folder / "fine.safetensors")
        return cls(matcher.backbone, matcher.coarse, fine, matcher.config)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and the weights, the denoisers' in half precision, the backbone's as they are.

        Each file is written beside its place and then moved there, so that none is ever half written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"backbone": self.backbone, "coarse": self.coarse, "fine": self.fine}
        for name, part in parts.items():
            path = folder / f"{name}.safetensors"
            if part is None:
                path.unlink(missing_ok=True)
                continue
            beside = path.with_suffix(".part")
            save_file(_tensors(part, half=name != "backbone"), beside)
            os.replace(beside, path)
        beside = folder / "config.json.part"
        beside.write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        os.replace(beside, folder / "config.json")


def _read_config(path: Path) -> Config:
    try:
        found = json.loads(path.read_text())
        known = {field.name for field in fields(Config)}
        if not isinstance(found, dict) or set(found) - known:
            raise ValueError(f"unknown entries {sorted(set(found) - known)}")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
        }
        return Config(**values)
    except (ValueError, TypeError) as error:
        raise UnsupportedModel(
            f"{str(path)!r} is no matcher's configuration ({error}): it must be what `Matcher.save` writes. "
            "Save the matcher again with this version."
        ) from error


def _fill(module: nn.Module, path: Path) -> None:
    try:
        tensors = load_file(path)
        module.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise UnsupportedModel(
            f"the weights in {str(path)!r} do not fit the configuration beside them: {str(error)[:200]}. "
            "Save the matcher again, or install the package anew."
        ) from error


def _tensors(module: nn.Module, *, half: bool) -> dict[str, torch.Tensor]:
    return {
        name: (x.half() if half and x.is_floating_point() else x).detach().cpu().contiguous()
        for name, x in module.state_dict().items()
    }
