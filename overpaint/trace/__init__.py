"""Where does a model keep a concept? Causal tracing of the text encoder and of the UNet, and prompt swaps."""

from overpaint.trace import screen
from overpaint.trace.corrupt import ROLES
from overpaint.trace.effects import Effects
from overpaint.trace.encoder import text_encoder
from overpaint.trace.lockstep import WINDOWS, unet
from overpaint.trace.swap import pick_window, smallest_window, swap

__all__ = [
    "ROLES",
    "WINDOWS",
    "Effects",
    "pick_window",
    "screen",
    "smallest_window",
    "swap",
    "text_encoder",
    "unet",
]
