"""A matcher: a frozen backbone and two denoisers of flows, stored in a folder."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from overpaint import files, zoo
from overpaint.errors import UnsupportedModel
from overpaint.match import backbone
from overpaint.match.config import Config
from overpaint.match.denoiser import Denoiser

__all__ = ["Matcher"]


@dataclass(frozen=True, eq=False)
class Matcher:
    """The networks that match two pictures, in evaluation mode, float32.

    Attributes:
        backbone: Computes features of pictures; frozen.
        coarse: Denoiser of the coarse flow.
        fine: Denoiser of the fine flow; without it the coarse flow is the result.
        config: Sizes and switches.
    """

    backbone: nn.Module
    coarse: Denoiser
    fine: Denoiser | None
    config: Config

    @classmethod
    def build(cls, config: Config, *, seed: int = 0) -> "Matcher":
        """Return an untrained matcher. Its flow points to the most similar cell of the source.

        Args:
            config: Sizes and switches.
            seed: Seed of the random weights, the backbone's included. The global generator does not change.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            features = backbone.build(config.backbone)
            coarse, fine = Denoiser(config).eval(), Denoiser(config, "fine").eval()
        for part in (coarse, fine):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 20 % faster on CPUs
        return cls(features, coarse, fine, config)

    @classmethod
    def load(cls, source: str | Path = "matcher") -> "Matcher":
        """Load a matcher by its name in the zoo or from a folder, on the CPU.

        Raises:
            ValueError: There is no such matcher, a file is missing, or the weights do not fit the configuration.
        """
        folder = zoo.folder("matcher") if source == "matcher" else files.user_path(source, "source")
        if not folder.is_dir():
            raise ValueError(f"unknown matcher {str(source)!r}: name a folder, or 'matcher'.")
        for name in ("config.json", "backbone.safetensors", "coarse.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"the matcher at {str(folder)!r} has no {name}: "
                    "install the package anew, or train one with `overpaint train matcher`."
                )
        config = _load_config(folder / "config.json")
        _check_sizes(config, folder)
        matcher = cls.build(config)
        _load_weights(matcher.backbone, folder / "backbone.safetensors")
        _load_weights(matcher.coarse, folder / "coarse.safetensors")
        fine = matcher.fine if (folder / "fine.safetensors").is_file() else None
        if fine is not None:
            _load_weights(fine, folder / "fine.safetensors")
        return cls(matcher.backbone, matcher.coarse, fine, matcher.config)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and the weights: the denoisers' in half precision, the backbone's in full.

        Each file is written atomically.
        """
        folder = files.user_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"backbone": self.backbone, "coarse": self.coarse, "fine": self.fine}
        for name, part in parts.items():
            path = folder / f"{name}.safetensors"
            if part is None:
                path.unlink(missing_ok=True)
                continue
            with files.atomic(path) as draft:
                save_file(_tensors(part, half=name != "backbone"), draft)
        files.write_json(folder / "config.json", asdict(self.config))


def _load_config(path: Path) -> Config:
    try:
        entries = files.from_json(path.read_bytes())
        names = {field.name for field in fields(Config)}
        if not isinstance(entries, dict) or set(entries) - names:
            raise ValueError(f"unknown entries {sorted(set(entries) - names)}")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()
        }
        return Config(**values)
    except (ValueError, TypeError) as error:
        raise UnsupportedModel(
            f"{str(path)!r} is no matcher's configuration ({error}): it must be what `Matcher.save` writes. "
            "Save the matcher again with this version."
        ) from error


def _check_sizes(config: Config, folder: Path) -> None:
    """Raise unless the weights have the shapes of `config`, before memory is taken for them."""
    try:
        with torch.device("meta"):
            parts = {"coarse": Denoiser(config), "fine": Denoiser(config, "fine")}
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise UnsupportedModel(
            f"no matcher can be built from {str(folder / 'config.json')!r} ({str(error)[:200]}): take a configuration "
            "that `Matcher.save` wrote."
        ) from error
    for name, part in parts.items():
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            continue
        shapes = {key: list(value.shape) for key, value in part.state_dict().items()}
        try:
            with safe_open(path, framework="pt") as file:
                stored = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise _unfit(path, error) from error
        if stored != shapes:
            raise _unfit(path, "names or shapes differ")


def _unfit(path: Path, reason: object) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights in {str(path)!r} do not fit the configuration beside them: {str(reason)[:200]}. "
        "Save the matcher again, or install the package anew."
    )


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        tensors = load_file(path)
        module.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise _unfit(path, error) from error


def _tensors(module: nn.Module, *, half: bool) -> dict[str, torch.Tensor]:
    return {
        name: (x.half() if half and x.is_floating_point() else x).detach().cpu().contiguous()
        for name, x in module.state_dict().items()
    }
