"""Causal tracing of the text encoder and of the UNet, and prompt swaps: the effect of each state on the picture."""

from overpaint.model.sampling import Drawing
from overpaint.trace import screening
from overpaint.trace.corruption import Noise
from overpaint.trace.effects import Effects
from overpaint.trace.prompt_swaps import pick_window, prompt_swap, smallest_window
from overpaint.trace.selection import TextStates, UNetStates
from overpaint.trace.states import ROLES, WINDOWS
from overpaint.trace.text_encoder_trace import text_encoder
from overpaint.trace.unet_trace import unet

__all__ = [
    "ROLES",
    "WINDOWS",
    "Drawing",
    "Effects",
    "Noise",
    "TextStates",
    "UNetStates",
    "pick_window",
    "prompt_swap",
    "screening",
    "smallest_window",
    "text_encoder",
    "unet",
]
