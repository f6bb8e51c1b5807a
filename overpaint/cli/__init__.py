"""The command line: one file a verb."""

from overpaint.cli.app import main

__all__ = ["main"]
