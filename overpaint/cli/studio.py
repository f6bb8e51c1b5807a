"""`overpaint studio`: the loop in a browser."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from overpaint.cli.options import Device, not_empty
from overpaint.cli.terminal import load_model

__all__ = ["studio"]


def studio(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models to choose from: zoo names, folders, hub ids.",
            show_default="icons",
            callback=not_empty,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; this machine alone by default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="1 to 65535.")] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(
            help="USER:PASSWORD that visitors must give; safer in the variable than on the line.",
            envvar="OVERPAINT_AUTH",
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Allow everybody who can reach --host.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME[:PORT]",
            help="Another name that browsers reach the studio under, for example of a proxy; can be given again.",
        ),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Trace, edit and compare in a browser. Runs until Ctrl-C or SIGTERM; needs Gradio.

    \b
    overpaint studio
    overpaint studio icons ./sd14 --port 8000
    overpaint studio --allow-host studio.example.org
    OVERPAINT_AUTH=ada:secret overpaint studio --host 0.0.0.0
    """  # noqa: D301
    from overpaint.studio.server import check_access, check_models, check_port, open_studio

    entry = check_access(host, auth, no_auth=no_auth)
    check_port(host, port)
    chosen = models or ["icons"]
    check_models(chosen)
    place = {
        "host": host, "port": port, "auth": entry, "allowed_hosts": allow_host or (), "device": device,
    }  # fmt: skip
    with _exit_at_signals(), open_studio(chosen, loader=load_model, **place) as (_, address):
        sys.stdout.write(f"the studio is open at {address} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        threading.Event().wait()


@contextmanager
def _exit_at_signals() -> Iterator[None]:
    """Raise `SystemExit` at SIGTERM and SIGHUP inside the block, so that temporary files are deleted."""

    def leave(number: int, _frame: Any) -> NoReturn:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the deletion
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
