"""Where does a model keep a concept? Causal tracing of the text encoder and of the UNet, and prompt swaps."""

from overpaint.trace import screening
from overpaint.trace.corruption import ROLES
from overpaint.trace.effects import Effects
from overpaint.trace.prompt_swaps import pick_window, smallest_window, swap
from overpaint.trace.text_encoder_trace import text_encoder
from overpaint.trace.unet_trace import WINDOWS, unet

__all__ = [
    "ROLES",
    "WINDOWS",
    "Effects",
    "pick_window",
    "screening",
    "smallest_window",
    "swap",
    "text_encoder",
    "unet",
]
