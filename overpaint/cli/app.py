"""The command line: registers the verbs and turns exceptions into exit codes.

Exit codes: 0 success, 1 a bug in overpaint, 2 bad input, 130 Ctrl-C. An error is one line on stderr. With `--json`
stdout holds one JSON object and nothing else.
"""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from overpaint import __version__
from overpaint.cli.apply import apply
from overpaint.cli.demo import demo
from overpaint.cli.diff import diff
from overpaint.cli.edit import edit
from overpaint.cli.evaluate import evaluate
from overpaint.cli.export import export
from overpaint.cli.generate import generate
from overpaint.cli.image import image
from overpaint.cli.letter import letter
from overpaint.cli.load import load
from overpaint.cli.match import match
from overpaint.cli.report import report
from overpaint.cli.show import show
from overpaint.cli.sites import sites
from overpaint.cli.studio import studio
from overpaint.cli.trace import trace
from overpaint.cli.train import train
from overpaint.errors import CutPromptWarning

__all__ = ["app", "main"]

_LONGEST_NAME = 200  # characters of a file's name in a message
_NEXT = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EACCES: "check who may read and write it",
    errno.ENOSPC: "free some space, or name another disk",
}

app = typer.Typer(
    name="overpaint",
    help="Find where a text-to-image model stores a concept, and edit it.",
    add_completion=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (
    demo, load, generate, sites, trace, edit, show, diff, apply, export, evaluate, report, match, image, letter, studio,
    train,
):  # fmt: skip
    app.command()(verb)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Find where a text-to-image model stores a concept, and edit it."""
    if version:
        sys.stdout.write(f"overpaint {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments`, by default those of the process, and exit with its code."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("always", CutPromptWarning)
        show = warnings.showwarning
        warnings.showwarning = lambda message, *details: _print_warning(
            message, *details, show=show
        )
        return _run_verb(arguments)


def _run_verb(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=arguments, standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except TyperException as error:
        return _print_error(error.format_message())
    except OSError as error:
        _print_traceback()
        return _print_error(_describe(error))
    except (ValueError, ImportError) as error:
        _print_traceback()
        return _print_error(str(error))
    except Exception as error:
        _print_traceback()
        text = f"{type(error).__name__}: {error} (a fault of overpaint: set OVERPAINT_TRACEBACK=1 to see where)"
        return _print_error(text, code=1)
    if code == 130:
        return _print_error("stopped by Ctrl-C", code=130)
    return code if isinstance(code, int) else 0


def _describe(error: OSError) -> str:
    """Return the message of `error` without its number, and with the next step where the system gave the message."""
    if error.strerror is None or error.filename is None:
        return str(error)
    name = str(error.filename)
    named = repr(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…")
    if error.errno is None or error.strerror != os.strerror(error.errno):
        return f"{error.strerror}: {named}"
    return f"{named}: {error.strerror}: {_NEXT.get(error.errno, 'name another file or folder')}."


def _print_error(text: str, *, code: int = 2) -> int:
    """Write `text` as one line on stderr and return the exit code."""
    sys.stderr.write(f"overpaint: {' '.join(text.split())}\n")
    return code


def _print_warning(message: Warning | str, *details: Any, show: Callable[..., None]) -> None:
    """Write a warning of this package as one line on stderr; show another as Python does."""
    if isinstance(message, CutPromptWarning):
        sys.stderr.write(f"overpaint: warning: {' '.join(str(message).split())}\n")
    else:
        show(message, *details)


def _print_traceback() -> None:
    if os.environ.get("OVERPAINT_TRACEBACK"):
        traceback.print_exc()
