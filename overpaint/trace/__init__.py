"""Where does a model keep a concept? Causal tracing of the text encoder and of the UNet."""

from overpaint.trace.corrupt import ROLES
from overpaint.trace.effects import Effects
from overpaint.trace.encoder import text_encoder
from overpaint.trace.lockstep import unet

__all__ = ["ROLES", "Effects", "text_encoder", "unet"]
