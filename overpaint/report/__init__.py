"""Write saved results as one self-contained HTML page, with the same figures as JSON beside it."""

from overpaint.report.page import save, save_card

__all__ = ["save", "save_card"]
