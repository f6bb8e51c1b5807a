"""The command line: one file for each verb."""

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

_STOPPED = "overpaint: stopped by Ctrl-C\n"
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # file name of its frames


def main() -> None:
    """Run the command line and exit with its code: 130 for Ctrl-C, also while a library is imported."""
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is signal.default_int_handler:  # else Ctrl-C is ignored, as after nohup
            sys.unraisablehook = _leave_if_swallowed
            signal.signal(signal.SIGINT, _interrupt)
        from overpaint.cli import app

        app.main()
    except KeyboardInterrupt:
        sys.stderr.write(_STOPPED)
        sys.exit(130)
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing reads an exception from here on


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`; inside an import, where it could be swallowed or become another error, exit at once.

    Raises:
        KeyboardInterrupt: No import is running.
    """
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            _leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave_if_swallowed(unraisable: "sys.UnraisableHookArgs") -> None:
    """Exit if the interpreter is about to drop a `KeyboardInterrupt`, as in a destructor or a callback."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)


def _leave() -> None:
    """Exit at once. Drafts of files, which the next run removes, may stay."""
    cursor = _SHOW_CURSOR if os.isatty(2) else ""
    os.write(2, (cursor + _STOPPED).encode())
    os._exit(130)
