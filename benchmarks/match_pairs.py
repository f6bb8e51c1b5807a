"""The pairs that `quality_match` measures on: none of their photographs was trained on.

Synthetic ones are warped photographs, 256x256 pixels, as they are or corrupted; scenes have a truth of their own. No
two sets share their draws, but for a corrupted one, whose pairs are those of the set that it is a copy of.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from overpaint.match import flow as fields
from overpaint.train import photographs, scenes, warps

__all__ = ["CORRUPTIONS", "FAMILIES", "SCENES", "SIZE", "Case", "case"]

SIZE = 256  # of a synthetic pair, in pixels
CORRUPTIONS = ("noise", "blur", "jpeg")
FAMILIES = {
    "training": ("homography", "affine", "thin plate"),
    "tests": ("B-spline", "lens", "homography of a B-spline"),
}
SCENES = {"graf13": 1, "graf31": 1, "motorcycle": 1, "aloe": 1, "chessboards": 13}
BOARDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14)


@dataclass(frozen=True)
class Case:
    """Two pictures (3, H, W), the flow (2, H, W) and where it is valid (H, W); or at points (N, 2): (2, 1, N).

    `family` is that of the warp, where the warp is of one family and nothing else.
    """

    source: Tensor
    target: Tensor
    truth: Tensor
    valid: Tensor
    photo: str
    points: Tensor | None = None
    family: str = ""


def case(name: str, index: int, folder: Path) -> Case:
    """Return pair `index` of a set."""
    if name in SCENES:
        return scene(name, index, folder)
    kind, _, corruption = name.partition(" + ")
    photo = photographs.HELD_OUT[index % len(photographs.HELD_OUT)]
    picture = photographs.read(photo, folder)
    seed = 100_000 * (1 + warps.KINDS.index(kind)) + index
    made = warps.pair(picture, seed, kind, size=SIZE)
    source, target = made.source[0], made.target[0]
    if corruption:
        rng = np.random.default_rng((seed, CORRUPTIONS.index(corruption)))
        source, target = (corrupted(x, corruption, rng) for x in (source, target))
    drawn = family(picture, seed, kind, made.flow[0])
    return Case(source, target, made.flow[0], made.valid[0, 0], photo, family=drawn)


def family(picture: Tensor, seed: int, kind: str, flow: Tensor) -> str:
    """Return the family that `warps.pair` drew `flow` from; empty if layers, patches or a shift came on top.

    The draws are made once more up to the first warp, which is then compared with the flow.
    """
    names = FAMILIES["training" if kind == "training" else "tests"]
    draws = (
        (warps._homography, warps._affine, warps._thin_plate)
        if kind == "training"
        else (warps._spline, warps._lens, warps._composed)
    )
    generator = torch.Generator().manual_seed(seed)
    warps._scene(scenes.canvas(picture, 2 * SIZE, generator), kind, generator)
    grid = warps._places(SIZE)
    drawn = int(scenes.uniform(generator, 0, len(names)))
    first = (draws[drawn](grid, generator) - grid) * (SIZE / 2)
    return names[drawn] if torch.equal(first.permute(2, 0, 1).float(), flow) else ""


def corrupted(image: Tensor, kind: str, rng: np.random.Generator) -> Tensor:
    """Return a picture with noise, blurred or as a JPEG: severity 3 of ImageNet-C."""
    pixels = image.permute(1, 2, 0).numpy()
    if kind == "noise":
        pixels = np.clip(pixels + rng.normal(0, 0.18, pixels.shape), 0, 1)
        return torch.from_numpy(pixels).permute(2, 0, 1).float()
    shown = Image.fromarray((pixels * 255).round().astype(np.uint8))
    if kind == "blur":
        shown = shown.filter(ImageFilter.GaussianBlur(3))
    else:
        shown.save(buffer := io.BytesIO(), format="JPEG", quality=15)
        shown = Image.open(buffer)
    return loaded(shown)


def loaded(image: Image.Image) -> Tensor:
    """Return a picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def scene(name: str, index: int, folder: Path) -> Case:
    """Return a pair with a truth of its own."""

    def found(path: str) -> str:
        return str(photographs.locate(path, folder))

    def shown(path: str) -> Tensor:
        return loaded(Image.open(found(path)))

    data = "opencv-doc/data"
    if name.startswith("graf"):
        first, second = (shown(f"{data}/graf{n}.png") for n in name[-2:])
        store = cv2.FileStorage(found(f"{data}/H1to3p.xml"), cv2.FILE_STORAGE_READ)
        matrix = torch.from_numpy(np.array(store.getFirstTopLevelNode().mat()))
        matrix = matrix if name == "graf13" else torch.linalg.inv(matrix)
        flow = fields.homography_flow(matrix, (second.shape[1], second.shape[2]))
        return Case(first, second, flow[0], fields.inside(flow)[0, 0], "graf")
    if name == "chessboards":
        return board(shown, data, BOARDS[index])
    if name == "motorcycle":
        left, right = (shown(f"skimage/motorcycle_{side}.png") for side in ("left", "right"))
        shift = np.load(found("skimage/motorcycle_disp.npz"))["arr_0"]
        known = np.isfinite(shift)
    else:
        left, right = (shown(f"{data}/aloe{side}.jpg") for side in "LR")
        shift = np.array(Image.open(found(f"{data}/aloeGT.png")).convert("L"), dtype=float)
        known = shift > 0
    across = torch.from_numpy(np.where(known, -shift, 0.0))
    flow = torch.stack([across, torch.zeros_like(across)])
    inside = fields.inside(flow[None])[0, 0]
    return Case(right, left, flow, inside & torch.from_numpy(known), name)


def board(shown: Callable[[str], Tensor], data: str, number: int) -> Case:
    """Return a chessboard seen from two places: the truth is at its 54 inner corners."""
    right, left = (shown(f"{data}/{side}{number:02d}.jpg") for side in ("right", "left"))
    corners = []
    for image in (right, left):
        grey = (image[0] * 255).byte().numpy()
        ok, at = cv2.findChessboardCorners(grey, (9, 6))
        assert ok, f"no chessboard in pair {number}"
        stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.01)
        at = cv2.cornerSubPix(
            grey, np.ascontiguousarray(at, dtype=np.float32), (5, 5), (-1, -1), stop
        )
        corners.append(torch.from_numpy(at.reshape(-1, 2)))
    truth = (corners[0] - corners[1]).T[:, None]
    return Case(right, left, truth, torch.ones(1, truth.shape[2]).bool(), str(number), corners[1])
