"""The command line: one file for each verb."""

import os
import signal
import sys
from typing import Any, NoReturn

__all__ = ["main"]

_STOPPED = "overpaint: stopped by Ctrl-C\n"


def main() -> None:
    """Run the command line and exit with its code: 130 for Ctrl-C, also while the libraries are imported."""
    try:
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:  # else Ctrl-C is ignored, as after nohup
            signal.signal(signal.SIGINT, _leave)
        from overpaint.cli import app

        signal.signal(signal.SIGINT, before)
        app.main()
    except KeyboardInterrupt:
        sys.stderr.write(_STOPPED)
        sys.exit(130)


def _leave(_number: int, _frame: Any) -> NoReturn:
    """Exit at once: an exception inside an import could be swallowed, or printed by the interpreter."""
    os.write(2, _STOPPED.encode())
    os._exit(130)
