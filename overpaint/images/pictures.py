"""Pictures: generated images with the prompts, seeds and settings that produced them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from overpaint import files

__all__ = ["Pictures", "is_blank"]


@dataclass(frozen=True)
class Pictures:
    """Generated pictures.

    Attributes:
        images: RGB in [0, 1], float32 on the CPU, shape (N, 3, H, W).
        prompts: The prompt of each picture.
        seeds: The seed of each picture's start noise.
        protocol: Model, steps, guidance, scheduler, versions.
    """

    images: Tensor
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    protocol: dict[str, Any] = field(default_factory=dict[str, Any])

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        height, width = self.images.shape[-2:]
        prompts = list(dict.fromkeys(self.prompts))
        more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
        first = f" of {prompts[0]!r}{more}" if prompts else ""
        pictures = "picture" if len(self) == 1 else "pictures"
        return f"<{len(self)} {pictures}, {width}x{height}{first}>"

    def pil(self) -> list[Image.Image]:
        """Return the pictures as PIL images."""
        pixels = (self.images.permute(0, 2, 3, 1) * 255).round().byte().numpy()  # (N, H, W, 3)
        return [Image.fromarray(rgb) for rgb in pixels]

    def grid(self, columns: int = 8) -> Image.Image:
        """Return one image of all pictures in rows of `columns`, on white, two pixels apart.

        Raises:
            ValueError: `columns` is not positive.
        """
        if columns < 1:
            raise ValueError(f"`columns` must be at least 1, got {columns}.")
        tiles = self.pil()
        width, height = (side + 2 for side in tiles[0].size)
        columns = min(columns, len(tiles))
        sheet = Image.new(
            "RGB", (columns * width - 2, -(-len(tiles) // columns) * height - 2), "white"
        )
        for i, tile in enumerate(tiles):
            sheet.paste(tile, (i % columns * width, i // columns * height))
        return sheet

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write `0000.png` and so on, and `pictures.json` with prompts, seeds and protocol; return the PNGs' paths.

        Each file is written atomically; the folder is created.
        """
        folder = files.user_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        paths = tuple(folder / f"{i:04d}.png" for i in range(len(self)))
        for path, image in zip(paths, self.pil(), strict=True):
            with files.atomic(path) as draft:
                image.save(draft, format="PNG")
        facts = {"prompts": self.prompts, "seeds": self.seeds, "protocol": self.protocol}
        files.write_json(folder / "pictures.json", facts)
        return paths


def is_blank(images: Tensor) -> Tensor:
    """Return which of `images` (N, 3, H, W) have only one color, like the output of a safety checker; bool (N,).

    A score of such a picture is meaningless.
    """
    flat = images.flatten(2)
    return (flat.amax(2) - flat.amin(2)).amax(1) < 1 / 255
