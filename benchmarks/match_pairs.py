"""The pairs that `quality_match` measures on, of photographs that are held out of training.

Synthetic pairs are warped photographs, 256x256 pixels, clean or corrupted; scenes have ground truth. Sets are drawn
independently, except that a corrupted set consists of the pairs of its clean set.
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

from overpaint.match import flow as flows
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

    `family` is that of the warp if it is of one family, without layers, patches or shift.
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
    pair = warps.pair(picture, seed, kind, size=SIZE)
    source, target = pair.source[0], pair.target[0]
    if corruption:
        rng = np.random.default_rng((seed, CORRUPTIONS.index(corruption)))
        source, target = (corrupted(x, corruption, rng) for x in (source, target))
    drawn = family(picture, seed, kind, pair.flow[0])
    return Case(source, target, pair.flow[0], pair.valid[0, 0], photo, family=drawn)


def family(picture: Tensor, seed: int, kind: str, flow: Tensor) -> str:
    """Return the family that `warps.pair` drew `flow` from; empty if it added layers, patches or a shift.

    Repeats the random draws up to the first warp, and compares that with the flow.
    """
    names = FAMILIES["training" if kind == "training" else "tests"]
    draws = (
        (warps._homography, warps._affine, warps._thin_plate)
        if kind == "training"
        else (warps._spline, warps._lens, warps._spline_and_homography)
    )
    generator = torch.Generator().manual_seed(seed)
    warps._scene(scenes.crop(picture, 2 * SIZE, generator), kind, generator)
    grid = warps._grid(SIZE)
    drawn = int(scenes.uniform(generator, 0, len(names)))
    first = (draws[drawn](grid, generator) - grid) * (SIZE / 2)
    return names[drawn] if torch.equal(first.permute(2, 0, 1).float(), flow) else ""


def corrupted(image: Tensor, kind: str, rng: np.random.Generator) -> Tensor:
    """Return a picture with noise, blur or JPEG artefacts, severity 3 of ImageNet-C."""
    pixels = image.permute(1, 2, 0).numpy()
    if kind == "noise":
        pixels = np.clip(pixels + rng.normal(0, 0.18, pixels.shape), 0, 1)
        return torch.from_numpy(pixels).permute(2, 0, 1).float()
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    if kind == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(3))
    else:
        picture.save(buffer := io.BytesIO(), format="JPEG", quality=15)
        picture = Image.open(buffer)
    return loaded(picture)


def loaded(image: Image.Image) -> Tensor:
    """Return a picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def scene(name: str, index: int, folder: Path) -> Case:
    """Return a pair of photographs with ground truth."""

    def path_of(path: str) -> str:
        return str(photographs.locate(path, folder))

    def read(path: str) -> Tensor:
        return loaded(Image.open(path_of(path)))

    data = "opencv-doc/data"
    if name.startswith("graf"):
        first, second = (read(f"{data}/graf{n}.png") for n in name[-2:])
        store = cv2.FileStorage(path_of(f"{data}/H1to3p.xml"), cv2.FILE_STORAGE_READ)
        matrix = torch.from_numpy(np.array(store.getFirstTopLevelNode().mat()))
        matrix = matrix if name == "graf13" else torch.linalg.inv(matrix)
        flow = flows.homography_flow(matrix, (second.shape[1], second.shape[2]))
        return Case(first, second, flow[0], flows.inside(flow)[0, 0], "graf")
    if name == "chessboards":
        return board(read, data, BOARDS[index])
    if name == "motorcycle":
        left, right = (read(f"skimage/motorcycle_{side}.png") for side in ("left", "right"))
        shift = np.load(path_of("skimage/motorcycle_disp.npz"))["arr_0"]
        known = np.isfinite(shift)
    else:
        left, right = (read(f"{data}/aloe{side}.jpg") for side in "LR")
        shift = np.array(Image.open(path_of(f"{data}/aloeGT.png")).convert("L"), dtype=float)
        known = shift > 0
    across = torch.from_numpy(np.where(known, -shift, 0.0))
    flow = torch.stack([across, torch.zeros_like(across)])
    inside = flows.inside(flow[None])[0, 0]
    return Case(right, left, flow, inside & torch.from_numpy(known), name)


def board(read: Callable[[str], Tensor], data: str, number: int) -> Case:
    """Return two views of a chessboard; the ground truth is at its 54 inner corners."""
    right, left = (read(f"{data}/{side}{number:02d}.jpg") for side in ("right", "left"))
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
