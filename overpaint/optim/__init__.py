"""DiffGrad in `torch.optim`'s interface, and the friction that makes the difference to Adam."""

from overpaint.optim.diffgrad import DiffGrad
from overpaint.optim.friction_variants import friction

__all__ = ["DiffGrad", "friction"]
