"""Sizes and switches of a matcher."""

from dataclasses import dataclass

from overpaint.errors import check_settings

__all__ = ["Config"]

# the largest value of each size, or of each entry of a tuple of at most eight
_LARGEST = {
    "image": 4096, "grid": 512, "channels": 4096, "layers": 16, "attention": 512, "sr_grid": 1024,
    "sr_channels": 4096, "sr_layers": 16, "sr_attention": 1024, "head_width": 4096, "groups": 4096,
    "radius": 32, "steps": 1000,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Sizes and switches of a matcher; the defaults are those of the shipped one."""

    image: int = 256  # side of the square that both pictures are resized to; a multiple of 32
    grid: int = 32  # side of the coarse flow; an eighth of `image`
    channels: tuple[int, ...] = (48, 80, 128)  # of the coarse U-Net's levels; multiples of `groups`
    layers: int = 1  # ResNet blocks in a level of the coarse U-Net
    attention: int = 16  # largest side at which the coarse U-Net has attention
    sr_grid: int = 64  # side of the fine flow
    sr_channels: tuple[int, ...] = (32, 64, 96)  # of the fine U-Net's levels
    sr_layers: int = 1  # ResNet blocks in a level of the fine U-Net
    sr_attention: int = 16  # largest side at which the fine U-Net has attention
    head_width: int = 16  # channels of an attention head
    groups: int = 16  # of the group normalisation
    radius: int = 4  # of the windows of local cost, in cells
    steps: int = 5  # noise levels T
    # Factor on the diffused flow. At 1, as in the paper, noise exceeds the flow at nearly every level, since most flows
    # are about a tenth of a picture.
    flow_scale: float = 4.0
    backbone: str = "xfeat"  # or "vgg16"
    residual: bool = True  # add the network's output to the initial flow
    local: bool = True  # the network reads the local cost
    hints: bool = True  # the network reads four more channels: best cosine, trust, and the coordinates x and y
    diffusion: bool = True  # False: no noise, and one prediction instead of samples; a control
    robust: bool = True  # loss: root of the squared error instead of the square
    align_corners: bool = (
        False  # True: resize flows as the reference code does, half a cell off at the borders
    )

    def __post_init__(self) -> None:
        """Check types and ranges, so that no file can make a matcher of any size."""
        check_settings(self, _LARGEST, "take it from `Config.tiny()`")
        if type(self.flow_scale) not in (int, float) or not 0 < self.flow_scale < 1e6:
            raise ValueError(f"`flow_scale` must be positive and finite, got {self.flow_scale!r}.")

    @classmethod
    def tiny(cls) -> "Config":
        """Return the configuration for training on two CPU cores: a flow of 32x32, refined to 64x64."""
        return cls()

    @classmethod
    def smoke(cls) -> "Config":
        """Return the smallest configuration that has every part, for tests."""
        return cls(image=128, grid=16, channels=(16, 32), sr_grid=32, sr_channels=(16, 32))

    @classmethod
    def base(cls) -> "Config":
        """Return the configuration for a GPU: a flow of 64x64 from pictures of 512x512, refined to 128x128."""
        return cls(
            image=512, grid=64, channels=(64, 128, 192, 256), layers=2, sr_grid=128,
            sr_attention=32, head_width=32, groups=32,
        )  # fmt: skip

    @classmethod
    def full(cls) -> "Config":
        """Return the paper's configuration: two U-Nets of 121 million parameters on VGG-16, a flow of 256x256."""
        widths = (128, 256, 384, 512)
        return cls(
            image=512, grid=64, channels=widths, layers=3, sr_grid=256, sr_channels=widths,
            sr_layers=3, sr_attention=64, head_width=128, groups=32, flow_scale=1.0,
            backbone="vgg16", hints=False, robust=False, align_corners=True,
        )  # fmt: skip

    @property
    def stack_channels(self) -> int:
        """Channels of `Conditions.stack`."""
        return (2 * self.radius + 1) ** 2 + 4 * self.hints
