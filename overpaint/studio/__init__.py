"""The web page: trace, click, paint over, judge by eye, take the change away. Needs the extra `studio` (Gradio)."""

from overpaint.studio.app import Studio

__all__ = ["Studio"]
