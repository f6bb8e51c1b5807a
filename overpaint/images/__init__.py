"""Read pictures, store generated pictures with their prompts and seeds, and draw charts."""

from overpaint.images.pictures import Pictures

__all__ = ["Pictures"]
