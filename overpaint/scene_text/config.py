"""Sizes and switches of a lettering model."""

from dataclasses import asdict, dataclass, field
from typing import Any

from overpaint.errors import check_settings
from overpaint.scene_text.line import Line

__all__ = ["CODECS", "LAYOUTS", "MODES", "PREDICTIONS", "Config"]

CODECS = ("luma", "rgb", "autoencoder")
LAYOUTS = ("both", "features", "bias", "none")
MODES = ("decoupled", "branch")
PREDICTIONS = ("sample", "v_prediction")

_LARGEST = {
    "channels": 4096, "layers": 16, "groups": 256, "head_width": 4096, "text_length": 256, "text_width": 4096,
    "instruction_length": 256, "instruction_width": 4096, "instruction_layers": 48, "subcolumns": 16,
    "feature_width": 1024, "latent_channels": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Sizes and switches of a lettering model; the defaults are those of `overpaint train lettering`.

    Raises:
        ValueError: A size or switch is out of range.
    """

    line: Line = field(default_factory=Line)
    # Latents: "luma" and half-size chroma, "rgb" pixels, or those of an "autoencoder".
    codec: str = "luma"
    prediction: str = "sample"  # the clean latents x, or the velocity: "v_prediction"
    mode: str = "decoupled"  # keys and values of their own for the characters, or whole transformers: "branch"
    layout: str = "both"  # letter widths enter as input "features", as attention "bias", as "both" or not: "none"
    characters: bool = True  # False: no character attention; an ablation
    instructions: bool = True  # False: no instruction attention; an ablation

    # Of the levels of the UNet; multiples of `groups` and `head_width`.
    # (96, 160) would need 12.7 MB in half precision; the zoo has 12 MB for this model.
    channels: tuple[int, ...] = (80, 160)
    layers: int = 1  # ResNet blocks in a level
    middle: bool = False  # a middle block below the last level
    groups: int = 16  # of the group normalisation
    head_width: int = 40  # channels of an attention head

    text_length: int = 16  # characters that the encoder holds
    text_width: int = 64  # of its tokens
    both_ends: bool = True  # number characters from the end too
    instruction_length: int = 40  # tokens of an instruction
    instruction_width: int = 96  # of its tokens
    instruction_layers: int = 2  # of its transformer
    pieces: tuple[str, ...] = ()  # parts of words of the instruction's tokenizer
    fonts: tuple[str, ...] = ()  # names of the fonts that instructions may name
    colors: tuple[str, ...] = ()  # names of the colors

    subcolumns: int = 2  # features of letters for each column of latents
    feature_width: int = 24  # of the letter's embedding among these features
    latent_channels: int = 8  # of the autoencoder

    def __post_init__(self) -> None:
        """Check types and ranges, so that no file can make a model of any size."""
        for name, choices in (
            ("codec", CODECS), ("prediction", PREDICTIONS), ("mode", MODES), ("layout", LAYOUTS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}: leave it out for "
                    f"{choices[0]}."
                )
        check_settings(self, _LARGEST, "take it from `Config()`")
        if any(n % self.groups or n % self.head_width for n in self.channels):
            raise ValueError(
                f"`channels` must be multiples of `groups` and `head_width`, got {self.channels}, {self.groups} and "
                f"{self.head_width}: take those of `Config()`."
            )
        if not self.characters and not self.instructions:
            raise ValueError("`characters` and `instructions` are both off: switch one on.")
        if self.line.width % (4 << (len(self.channels) - 1)):
            raise ValueError(
                f"`line.width` must be a multiple of {4 << (len(self.channels) - 1)} for {len(self.channels)} levels, "
                f"got {self.line.width}: take 128."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.line.height // 4, self.line.width // 4

    @property
    def latents(self) -> int:
        """Channels of the latents."""
        return {"luma": 24, "rgb": 48, "autoencoder": self.latent_channels}[self.codec]

    @property
    def has_layout(self) -> bool:
        """True if letter widths enter the network."""
        return self.layout != "none" and self.characters

    @property
    def layout_features(self) -> int:
        """Number of input channels that hold the layout."""
        used = self.has_layout and self.layout in ("both", "features")
        return self.subcolumns * (self.feature_width + 6) if used else 0

    @classmethod
    def smoke(cls) -> "Config":
        """Return the smallest configuration that has every part, for tests."""
        return cls(
            line=Line(width=64), channels=(16, 32), groups=8, head_width=16, text_width=16, text_length=8,
            instruction_width=16, instruction_layers=1, feature_width=8, pieces=("write", "red", "font"),
            fonts=("Roboto",), colors=("red",),
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """Return the configuration of `as_json`.

        Raises:
            TypeError: A value is missing or unknown, or has another type.
            ValueError: A value is out of range.
        """
        lists = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**{**lists, "line": Line(**values["line"])})
