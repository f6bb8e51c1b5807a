"""The web server of the studio. By default only this machine can reach it; neither it nor the page needs a network."""

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
from overpaint.studio.app import MAX_SESSIONS, Studio
from overpaint.studio.uploads import MAX_BYTES

__all__ = ["check_access", "check_models", "check_port", "open_studio"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# With this policy the browser loads nothing from other servers. Gradio compiles its templates, which needs `eval`.
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
    """Return user and password, or `None` for a studio without a password.

    Raises:
        ValueError: `host` is reachable from other machines and neither `auth` nor `no_auth` is given, or both are, or
            `auth` is not `USER:PASSWORD`.
    """
    if auth is not None and no_auth:
        raise ValueError("--auth and --no-auth contradict each other: leave one of them out.")
    if auth is not None:
        user, colon, password = auth.partition(":")
        if not (user and colon and password):
            raise ValueError(
                "--auth must be USER:PASSWORD, neither of them empty, for example --auth ada:secret."
            )
        return user, password
    if not no_auth and not _is_loopback(host):
        raise ValueError(
            f"--host {host} is reachable from other machines: set a password with --auth USER:PASSWORD, or allow "
            "everybody with --no-auth."
        )
    return None


def check_port(host: str, port: int) -> None:
    """Raise if the studio cannot listen on this host and port.

    Raises:
        ValueError: The port is not 1 to 65535.
        OSError: The port is in use or not permitted, or there is no such host.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be 1 to 65535, got {port}: the default is 7860.")
    host = _without_brackets(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"cannot listen on {host}:{port} ({reason}): choose another port with --port, or stop the program "
            "that uses it."
        ) from error


def check_models(models: Sequence[str]) -> None:
    """Raise if a name cannot be a model. Weights are loaded later, at their first use.

    Raises:
        ValueError: A name is neither a zoo name, nor a folder, nor has the form of a hub id.
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
    """Serve the studio while the block runs; the value is the studio and its address.

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
    """Set environment variables inside the block, and restore their old values at its end."""
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
            "the studio needs Gradio, which is not installed: pip install 'gradio>=6.31,<7'."
        ) from error
    return build(studio)


def _settings(host: str, port: int, auth: tuple[str, str] | None, studio: Studio) -> dict[str, Any]:
    from starlette.middleware import Middleware

    from overpaint.studio.layout import CSS, theme

    plain = _without_brackets(host)
    return {
        "server_name": f"[{plain}]" if ":" in plain else plain,
        "server_port": port, "auth": auth, "share": False, "inbrowser": False, "quiet": True,
        "prevent_thread_lock": True, "show_error": False, "footer_links": [], "run_history": False,
        "allowed_paths": [str(studio.folder)], "max_file_size": MAX_BYTES, "max_threads": 128,
        "state_session_capacity": MAX_SESSIONS,  # pages whose values Gradio stores
        "enable_monitoring": False, "ssr_mode": False, "pwa": False, "mcp_server": False, "num_workers": 0,
        "theme": theme(),
        "head": f"<style>{CSS.read_text(encoding='utf-8')}</style>",  # `css_paths` would change the selectors
        "app_kwargs": {
            "middleware": [Middleware(_SecurityHeaders)], "docs_url": None, "redoc_url": None, "openapi_url": None,
        },
    }  # fmt: skip


class _SecurityHeaders:
    """Middleware that adds security headers to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _without_brackets(host: str) -> str:
    """Return an IPv6 address without the brackets that it has in a URL, any other host unchanged."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _is_loopback(host: str) -> bool:
    host = _without_brackets(host)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
