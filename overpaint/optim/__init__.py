"""The optimiser DiffGrad with the interface of `torch.optim`, and its friction."""

from overpaint.optim.diffgrad import DiffGrad
from overpaint.optim.friction_variants import friction

__all__ = ["DiffGrad", "friction"]
