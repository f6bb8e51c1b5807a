"""The web page: trace, edit and compare in a browser, and download the change. Needs the extra `studio` (Gradio)."""

from overpaint.studio.app import Studio

__all__ = ["Studio"]
