"""Networks that compute the features to match: XFeat's dense part, frozen, and VGG-16 for the paper's full size.

Source: Potje et al., 2024 (XFeat), https://arxiv.org/abs/2404.19174; Simonyan and Zisserman, 2015 (VGG),
https://arxiv.org/abs/1409.1556; Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, which uses VGG-16.
Deviations: XFeat instead of VGG, since its licence allows to ship the weights, which are a twelfth of the size. Its
authors trained them for matching, on MegaDepth and warped pictures of COCO.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from overpaint import zoo
from overpaint.files import user_path

__all__ = ["VGG", "Backbone", "build", "load"]


class Backbone(nn.Module):
    """XFeat's dense features of grey pictures; 0.63 million parameters.

    Each picture is first normalised to mean 0 and variance 1, so that brightness and contrast do not change the
    features. The parameters have the names of the authors' file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(1)
        self.skip1 = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(1, 24, 1))
        self.block1 = _blocks((1, 4, 1), (4, 8, 2), (8, 8, 1), (8, 24, 2))
        self.block2 = _blocks((24, 24, 1), (24, 24, 1))
        self.block3 = _blocks((24, 64, 2), (64, 64, 1), (64, 64, 0))
        self.block4 = _blocks((64, 64, 2), (64, 64, 1), (64, 64, 1))
        self.block5 = _blocks((64, 128, 2), (128, 128, 1), (128, 128, 1), (128, 64, 0))
        self.block_fusion = _blocks((64, 64, 1), (64, 64, 1))
        self.block_fusion.append(nn.Conv2d(64, 64, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features at an eighth and at a quarter of the size, not normalised.

        Args:
            images: RGB or grey, shape (B, 3, H, W) or (B, 1, H, W), float; H and W multiples of 32.

        Returns:
            Shapes (B, 64, H / 8, W / 8) and (B, 24, H / 4, W / 4).

        Raises:
            ValueError: A side is not a multiple of 32.
        """
        _check(images)
        grey = self.norm(images.mean(1, keepdim=True))
        fine = self.block2(self.block1(grey) + self.skip1(grey))
        eighth = self.block3(fine)
        sixteenth = self.block4(eighth)
        deep = self.block5(sixteenth)
        size = eighth.shape[2:]
        total = eighth + _up(sixteenth, size) + _up(deep, size)
        return self.block_fusion(total), fine


class VGG(nn.Module):
    """VGG-16 up to its fourth pooling layer, as in the paper. Built without weights.

    The parameters have the names of torchvision's file (`features.0.weight` and so on), so that its tensors load with
    `strict=False`; the classifier and the last block are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for count, channels in ((2, 64), (2, 128), (3, 256), (3, 512)):
            for _ in range(count):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features at an eighth and at half of the size.

        The first are four maps concatenated, each at unit length and then halved, so that a dot product is the mean of
        the four maps' cosines. Two maps are of the picture, at strides 4 and 8; two are of the picture at half the
        size, at strides 8 and 16.

        Args:
            images: RGB in [0, 1], shape (B, 3, H, W), H and W multiples of 32.

        Returns:
            Shapes (B, 1152, H / 8, W / 8) and (B, 64, H / 2, W / 2).

        Raises:
            ValueError: A side is not a multiple of 32.
        """
        _check(images)
        size = (images.shape[2] // 8, images.shape[3] // 8)
        half, quarter, eighth, _ = self._pools(images)
        _, _, small_eighth, small_sixteenth = self._pools(F.avg_pool2d(images, 2))
        maps = (small_sixteenth, small_eighth, eighth, quarter)
        return torch.cat([F.normalize(_up(m, size), dim=1, eps=1e-5) / 2 for m in maps], 1), half

    def _pools(self, images: Tensor) -> list[Tensor]:
        mean = images.new_tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        x = (images - mean) / images.new_tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        pools = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(x)
        return pools


def build(name: str = "xfeat") -> Backbone | VGG:
    """Return a backbone with random weights, frozen, in evaluation mode.

    Args:
        name: `"xfeat"` or `"vgg16"`.

    Raises:
        ValueError: There is no such backbone.
    """
    if name not in ("xfeat", "vgg16"):
        raise ValueError(f"unknown backbone {name!r}: choose 'xfeat' or 'vgg16'.")
    return (Backbone() if name == "xfeat" else VGG()).eval().requires_grad_(False)


def load(path: str | Path | None = None) -> Backbone:
    """Return XFeat with the shipped weights, or with those of the safetensors file `path`.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    place = zoo.folder("matcher") / "backbone.safetensors"
    path = place if path is None else user_path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {str(path)!r}: give the path of a backbone.safetensors, or install the package anew."
        )
    module = build("xfeat")
    assert isinstance(module, Backbone)
    module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return module


class _Block(nn.Module):
    """A convolution, batch normalisation without scale and shift, and a ReLU."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        kernel, stride = (3, stride) if stride else (1, 1)
        convolution = nn.Conv2d(width, channels, kernel, stride, kernel // 2, bias=False)
        self.layer = nn.Sequential(convolution, nn.BatchNorm2d(channels, affine=False), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _blocks(*shapes: tuple[int, int, int]) -> nn.Sequential:
    """Return a sequence of blocks of (channels in, channels out, stride); stride 0 means a kernel of one pixel."""
    return nn.Sequential(*(_Block(*shape) for shape in shapes))


def _up(x: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _check(images: Tensor) -> None:
    h, w = images.shape[2:]
    if h % 32 or w % 32 or not h or not w:
        raise ValueError(f"sides must be multiples of 32, got {h}x{w}: resize the pictures first.")
