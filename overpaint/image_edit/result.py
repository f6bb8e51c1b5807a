"""The result of an edit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from overpaint import files

__all__ = ["Edited"]


@dataclass(frozen=True, eq=False)
class Edited:
    """An edited picture, and what it was made from.

    Attributes:
        picture: The result, RGB in [0, 1], float32, shape (3, H, W), of the size of the picture that was edited.
        raw: The same as the model draws it: without the detail that the autoencoder loses, and with changes in the
            whole crop. Pixels outside of the crop are those of the picture.
        pasted: The edit in pixels alone, which the model starts from: a copy of the object over the filled hole.
        masks: `source`, the object (in moves), `target`, where it goes, `changed`, all pixels that may differ; bool,
            (H, W).
        box: The crop that was inverted: first column and row, last column and row, each last one plus 1.
        latents: Clean latents of the edited crop, shape (C, h, w); `None` without `Settings.diffusion`.
        initial_latents: Latents that denoising started from.
        log: For each step its number, timestep, repeats, whether the bank and noise were on, `prediction_rms`, and
            with guidance `energies` and `change_rms`, the root mean square of what it subtracted from the latents.
        protocol: Model, settings, versions, memory of the bank.
    """

    picture: Tensor
    raw: Tensor
    pasted: Tensor
    masks: Mapping[str, Tensor]
    box: tuple[int, int, int, int]
    latents: Tensor | None
    initial_latents: Tensor | None
    log: tuple[dict[str, Any], ...]
    protocol: dict[str, Any]

    def __repr__(self) -> str:
        height, width = self.picture.shape[-2:]
        changed = float(self.masks["changed"].float().mean())
        return f"<Edited picture of {width}x{height} pixels ({self.protocol['task']}), {100 * changed:.1f} % changed>"

    def pil(self) -> Image.Image:
        """Return the picture as a PIL image."""
        return _pil(self.picture)

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write `picture.png`, `raw.png`, `pasted.png`, `mask.png` and `edit.json`; return their paths by name.

        Each file is written atomically; the folder is created.
        """
        folder = files.user_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {
            "picture": self.picture,
            "raw": self.raw,
            "pasted": self.pasted,
            "mask": self.masks["changed"],
        }
        paths = {name: folder / f"{name}.png" for name in pictures}
        for name, values in pictures.items():
            with files.atomic(paths[name]) as draft:
                _pil(values.float().expand(3, -1, -1)).save(draft, format="PNG")
        paths["edit"] = folder / "edit.json"
        files.write_json(paths["edit"], {**self.protocol, "box": self.box, "log": self.log})
        return paths


def _pil(values: Tensor) -> Image.Image:
    pixels = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels)
