"""`overpaint studio`: the loop in a browser."""

import sys
import threading
from typing import Annotated

import typer

from overpaint.cli.options import Device
from overpaint.cli.terminal import load_model

__all__ = ["studio"]


def studio(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="What can be chosen: zoo names, folders, hub ids.", show_default="icons"
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
        bool, typer.Option("--no-auth", help="Let in whoever reaches --host.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Trace, edit and compare in a browser, until Ctrl-C; needs Gradio.

    \b
    overpaint studio
    overpaint studio icons ./sd14 --port 8000
    OVERPAINT_AUTH=ada:secret overpaint studio --host 0.0.0.0
    """  # noqa: D301
    from overpaint.studio.server import check_access, check_models, check_port, open_studio

    entry = check_access(host, auth, no_auth=no_auth)
    check_port(host, port)
    chosen = models or ["icons"]
    check_models(chosen)
    place = {"host": host, "port": port, "auth": entry, "device": device}
    with open_studio(chosen, loader=load_model, **place) as (_, address):
        sys.stdout.write(f"the studio is open at {address} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        threading.Event().wait()
