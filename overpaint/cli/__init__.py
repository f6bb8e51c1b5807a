"""The command line: one file a verb."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code: 130 for Ctrl-C, also while the libraries are imported."""
    try:
        from overpaint.cli import app

        app.main()
    except KeyboardInterrupt:
        sys.stderr.write("overpaint: stopped by Ctrl-C\n")
        sys.exit(130)
