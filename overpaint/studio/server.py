"""Show the studio in a browser: on this machine alone unless told otherwise, and without any network of its own."""

import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overpaint import zoo
from overpaint.errors import MissingExtra
from overpaint.model import TextToImage, load
from overpaint.studio.app import SESSIONS, Studio
from overpaint.studio.uploads import LARGEST

__all__ = ["check_access", "check_models", "check_port", "open_studio"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The browser itself refuses anything that is not from here. The page's framework compiles its templates (`eval`).
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


def check_access(host: str, auth: str | None, *, no_auth: bool) -> tuple[str, str] | None:
    """Return user and password, or `None` where none are needed or wanted.

    Raises:
        ValueError: Others could come in and nobody said how, or `auth` is not `USER:PASSWORD`.
    """
    if auth is not None and no_auth:
        raise ValueError("--auth and --no-auth say opposite things: leave one of them out.")
    if auth is not None:
        user, colon, password = auth.partition(":")
        if not (user and colon and password):
            raise ValueError("--auth must be USER:PASSWORD, neither of them empty: --auth ada:secret.")  # fmt: skip
        return user, password
    if not no_auth and not _is_loopback(host):
        raise ValueError(
            f"--host {host} lets others in: say --auth USER:PASSWORD, or --no-auth if they may all come."
        )
    return None


def check_port(host: str, port: int) -> None:
    """Find out before any work whether the studio can be shown there.

    Raises:
        ValueError: The port is no port.
        OSError: It is in use or not ours, or there is no such host.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be 1 to 65535, got {port}: 7860 is usual.")
    host = _plain(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"cannot listen on {host}:{port} ({reason}): choose another with --port, or end what listens there."
        ) from error


def check_models(models: Sequence[str]) -> None:
    """Refuse names that can be no model before anything is shown; weights are read when somebody asks for them.

    Raises:
        ValueError: It is neither a zoo name, nor a folder, nor spelt as a hub id.
    """
    shipped = [n for n in zoo.names() if (zoo.folder(n) / "model_index.json").is_file()]
    for name in models:
        if name in shipped or Path(name).is_dir() or _HUB_ID.fullmatch(name):
            continue
        raise ValueError(
            f"unknown model {name!r}: it is neither a folder nor a name that ships with the package "
            f"({', '.join(shipped)}). Check the spelling, or give a hub id such as 'owner/name'."
        )


@contextmanager
def open_studio(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    device: str = "cpu",
    loader: Callable[..., TextToImage] = load,
) -> Iterator[tuple[Studio, str]]:
    """Show the studio inside the block; the value is the studio and its address.

    Raises:
        MissingExtra: Gradio is not installed.
        OSError: The port is in use.
    """
    check_port(host, port)
    with (
        tempfile.TemporaryDirectory(prefix="overpaint-studio-") as folder,
        _environment(
            GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(Path(folder) / "uploads")
        ),
    ):
        studio = Studio(models, Path(folder) / "downloads", device=device, loader=loader)
        page = _page(studio)
        _, address, _ = page.launch(**_settings(host, port, auth, studio))
        try:
            yield studio, address
        finally:
            page.close(verbose=False)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables that Gradio reads, and put back what they were."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _page(studio: Studio) -> Any:
    try:
        from overpaint.studio.layout import build
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingExtra(
            "the studio needs Gradio, which is not installed: pip install 'overpaint[studio]'."
        ) from error
    return build(studio)


def _settings(host: str, port: int, auth: tuple[str, str] | None, studio: Studio) -> dict[str, Any]:
    from starlette.middleware import Middleware

    from overpaint.studio.layout import CSS, theme

    plain = _plain(host)
    return {
        "server_name": f"[{plain}]" if ":" in plain else plain,
        "server_port": port, "auth": auth, "share": False, "inbrowser": False, "quiet": True,
        "prevent_thread_lock": True, "show_error": False, "footer_links": [], "run_history": False,
        "allowed_paths": [str(studio.folder)], "max_file_size": LARGEST, "max_threads": 128,
        "state_session_capacity": SESSIONS,  # visitors whose values the framework keeps
        "enable_monitoring": False, "ssr_mode": False, "pwa": False, "mcp_server": False, "num_workers": 0,
        "theme": theme(),
        "head": f"<style>{CSS.read_text(encoding='utf-8')}</style>",  # as it is: `css_paths` would rescope it
        "app_kwargs": {"middleware": [Middleware(_Guard)], "docs_url": None, "redoc_url": None, "openapi_url": None},
    }  # fmt: skip


class _Guard:
    """Adds headers to every answer, so that the page cannot reach beyond this address."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self.app(scope, receive, guarded if scope["type"] == "http" else send)


def _plain(host: str) -> str:
    """Return an IPv6 address without the brackets that it has in a URL, anything else as it is."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _is_loopback(host: str) -> bool:
    host = _plain(host)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
