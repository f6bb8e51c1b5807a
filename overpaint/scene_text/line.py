"""The fixed line that a region is rectified to: its size and where the letters stand."""

from dataclasses import dataclass

__all__ = ["Line"]


@dataclass(frozen=True)
class Line:
    """Sizes of the picture of one line, in pixels.

    Raises:
        ValueError: The sizes are not in order from top to bottom, or not multiples of 8.
    """

    height: int = 32  # of the picture; a multiple of 8
    width: int = 128  # of the picture; a multiple of 8
    top: int = 3  # first row of the region that is rewritten
    bottom: int = 29  # row after the last row of that region
    capital: float = 7.0  # upper edge of a capital letter
    baseline: float = 22.0  # lower edge of a capital letter
    margin: int = 6  # least distance of the region from the left and right edge

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.height % 8 or self.width % 8 or not 8 <= self.height <= self.width <= 4096:
            raise ValueError(
                f"`height` and `width` must be multiples of 8 with `height` <= `width`, got {self.height} and "
                f"{self.width}: take 32 and 128."
            )
        if not 0 <= self.top <= self.capital < self.baseline <= self.bottom <= self.height:
            raise ValueError(
                f"`top`, `capital`, `baseline` and `bottom` must ascend from 0 to `height`, got {self.top}, "
                f"{self.capital}, {self.baseline} and {self.bottom}: take those of `Line()`."
            )
        if not 0 <= self.margin <= self.width // 4:
            raise ValueError(
                f"`margin` must be 0 to a quarter of `width`, got {self.margin}: take 6."
            )
