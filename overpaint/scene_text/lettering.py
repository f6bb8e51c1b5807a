"""A lettering model: its network, stored in a folder, and the writing of words on lines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint import files, zoo
from overpaint.errors import UnsupportedModel, check_seed
from overpaint.scene_text.config import Config
from overpaint.scene_text.diffusion import Guidance, sample
from overpaint.scene_text.network import Network, Place

__all__ = ["Lettering"]


@dataclass(frozen=True, eq=False)
class Lettering:
    """A network that writes words on lines, in evaluation mode, float32.

    Attributes:
        network: The network.
    """

    network: Network

    @property
    def config(self) -> Config:
        """Sizes and switches."""
        return self.network.config

    @classmethod
    def build(cls, config: Config, *, seed: int = 0) -> "Lettering":
        """Return an untrained model.

        Args:
            config: Sizes and switches.
            seed: Seed of the random weights. The global generator does not change.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(Network(config).eval())

    @classmethod
    def load(cls, source: str | Path = "lettering") -> "Lettering":
        """Load a model by its name in the zoo or from a folder, on the CPU.

        Raises:
            ValueError: There is no such model, or a file is missing.
            UnsupportedModel: The files are damaged, or weights and configuration do not fit.
        """
        folder = (
            zoo.folder("lettering") if source == "lettering" else files.user_path(source, "source")
        )
        if source == "lettering" and not (folder / "config.json").is_file():
            raise ValueError(
                "the lettering model is not shipped with this version yet: train it with `overpaint train lettering` "
                "(about 15 hours on one core), then name its folder, runs/lettering/model."
            )
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"no lettering model at {str(source)!r}: {name} is missing. Name the folder of a model, or train "
                    "one with `overpaint train lettering`."
                )
        config = _load_config(folder / "config.json")
        path = folder / "model.safetensors"
        _check_shapes(config, path)
        model = cls.build(config)
        weights = load_file(path)
        model.network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        )
        return model

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, in half precision; each file is written atomically."""
        folder = files.user_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (x.half() if x.is_floating_point() else x).detach().cpu().clone().contiguous()
            for name, x in self.network.state_dict().items()
        }
        with files.atomic(folder / "model.safetensors") as draft:
            save_file(tensors, draft)
        files.write_json(folder / "config.json", self.config.as_json())

    def write(
        self,
        images: Tensor,
        mask: Tensor,
        words: Sequence[str],
        instructions: Sequence[str],
        place: Place,
        *,
        steps: int = 20,
        guidance: Guidance | None = None,
        seed: int = 0,
        solver: str = "ddim",
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return lines with the words written under the mask, RGB in [0, 1], (B, 3, H, W); the rest is unchanged.

        Args:
            images: Lines of the size of `config.line`, RGB in [0, 1], (B, 3, H, W).
            mask: True where the word is to be written, bool (B, H, W).
            words: B words.
            instructions: B instructions.
            place: Where the words stand.
            steps: Denoising steps, at least 1.
            guidance: Scales of guidance; by default none.
            seed: Seed of the noise. Row i has the same noise in any batch.
            solver: `"ddim"` or `"dpm"`.
            on_step: Called after each step with the number of finished steps.

        Raises:
            ValueError: `steps`, `seed` or the size of the pictures is out of range.
        """
        check_seed(seed)
        line, device = self.config.line, self.network.unet.device
        if tuple(images.shape[1:]) != (3, line.height, line.width):
            raise ValueError(
                f"`images` must be lines of shape (B, 3, {line.height}, {line.width}), got {tuple(images.shape)}: use "
                "`rewrite` for pictures of other sizes."
            )
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        generator = torch.Generator().manual_seed(seed)
        shape = (self.config.latents, *self.config.grid)
        noise = torch.stack(
            [torch.randn(shape, generator=generator) for _ in range(len(images))]
        ).to(device)
        texts = self.network.texts(list(words), list(instructions))
        place = Place(
            *(v.float().to(device) for v in (place.start, place.end, place.capital, place.baseline))
        )
        selected = mask[:, None].float().to(device)
        written = sample(
            self.network, images.float().to(device) * 2 - 1, selected, texts, place, steps=steps,
            guidance=guidance or Guidance(), noise=noise, solver=solver, on_step=on_step,
        )  # fmt: skip
        return torch.where(
            mask[:, None].to(device), (written + 1) / 2, images.float().to(device)
        ).cpu()


def _load_config(path: Path) -> Config:
    try:
        values = files.from_json(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        return Config.from_json(values)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UnsupportedModel(
            f"{str(path)!r} is no configuration of a lettering model ({str(error)[:200]}): it must be what "
            "`Lettering.save` writes. Save the model again with this version."
        ) from error


def _check_shapes(config: Config, path: Path) -> None:
    """Raise unless the weights have the shapes of `config`, before memory is taken for them."""
    try:
        with torch.device("meta"):
            shapes = {k: list(v.shape) for k, v in Network(config).state_dict().items()}
        with safe_open(path, framework="pt") as file:
            stored = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise _unfit(path, str(error)[:200]) from error
    if stored != shapes:
        raise _unfit(path, "names or shapes differ")


def _unfit(path: Path, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights in {str(path)!r} do not fit the configuration beside them: {reason}. Save the model again, or "
        "install the package anew."
    )
