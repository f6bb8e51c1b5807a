"""Write a run's saved results as one self-contained HTML page, with the same figures as JSON beside it."""

from overpaint.report import drift_section
from overpaint.report.page import to_card, write

__all__ = ["drift_section", "to_card", "write"]
