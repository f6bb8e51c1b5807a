"""The web server of the studio. By default only this machine can reach it; neither it nor the page needs a network."""

import asyncio
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from overpaint import zoo
from overpaint.errors import MissingExtra
from overpaint.files import user_path
from overpaint.model import TextToImage, load
from overpaint.studio.access import (
    AccessCheck,
    AllowedHosts,
    is_loopback,
    visitor_cookie,
    without_brackets,
)  # fmt: skip
from overpaint.studio.app import MAX_SESSIONS, Studio
from overpaint.studio.upload_store import StoreFull
from overpaint.studio.uploads import MAX_BYTES
from overpaint.studio.work_folder import work_folder

__all__ = ["check_access", "check_models", "check_port", "open_studio"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_UPLOAD_SECONDS = 600  # after which an upload that is not complete is cancelled
# With this policy the browser loads nothing from other servers. Gradio compiles its templates, which needs `eval`.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"same-origin"),  # with `no-referrer` some browsers send `Origin: null`
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
    if not no_auth and not is_loopback(host):
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
    host = without_brackets(host)
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
        if name in shipped or user_path(name, "models").is_dir() or _HUB_ID.fullmatch(name):
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
    allowed_hosts: Sequence[str] = (),
    device: str = "cpu",
    loader: Callable[..., TextToImage] = load,
) -> Iterator[tuple[Studio, str]]:
    """Serve the studio while the block runs; the value is the studio and its address.

    Args:
        models: Names that can be chosen.
        host: Where to listen.
        port: Where to listen.
        auth: User and password that visitors must give.
        allowed_hosts: Names besides `host` that the studio may be reached under, see `AllowedHosts`.
        device: Where the models compute.
        loader: Loads a model by its name.

    Raises:
        MissingExtra: Gradio is not installed.
        OSError: The port is in use.
        ValueError: One of `allowed_hosts` is not a host name.
    """
    check_port(host, port)
    hosts = AllowedHosts(host, port, allowed_hosts)
    with (
        work_folder() as folder,
        _environment(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(folder / "gradio")),
    ):
        studio = Studio(models, folder / "downloads", device=device, loader=loader)
        cookie = f"overpaint-{port}"
        page = _page(studio, cookie)
        try:
            _, address, _ = page.launch(**_settings(host, port, auth, studio, page, hosts, cookie))
            yield studio, address
        finally:
            studio.close()
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


def _page(studio: Studio, cookie: str) -> Any:
    try:
        from overpaint.studio.layout import build
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingExtra(
            "the studio needs Gradio, which is not installed: pip install 'gradio>=6.31,<7'."
        ) from error
    return build(studio, cookie)


def _settings(
    host: str, port: int, auth: tuple[str, str] | None, studio: Studio, page: Any, hosts: AllowedHosts, cookie: str
) -> dict[str, Any]:  # fmt: skip
    from starlette.middleware import Middleware
    from starlette.routing import Route

    from overpaint.studio.layout import CSS, SCRIPT, theme

    plain = without_brackets(host)
    name = f"[{plain}]" if ":" in plain else plain
    inputs = {number: len(function.inputs) for number, function in page.fns.items()}
    address = f"http://{name}:{port}/"
    return {
        "server_name": name,
        "server_port": port, "auth": auth, "share": False, "inbrowser": False, "quiet": True,
        "prevent_thread_lock": True, "show_error": False, "footer_links": [], "run_history": False,
        "allowed_paths": [str(studio.folder)], "max_file_size": MAX_BYTES, "max_threads": 128,
        "state_session_capacity": MAX_SESSIONS,  # pages whose values Gradio stores
        "enable_monitoring": False, "ssr_mode": False, "pwa": False, "mcp_server": False, "num_workers": 0,
        "theme": theme(),
        "head": f"<style>{CSS.read_text(encoding='utf-8')}</style>"  # `css_paths` would change the selectors
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
        "app_kwargs": {
            "middleware": [
                Middleware(_SecurityHeaders), Middleware(AccessCheck, hosts, address, inputs, cookie),
            ],
            "routes": [Route("/gradio_api/upload", _upload_endpoint(studio, cookie), methods=["POST"])],
            "docs_url": None, "redoc_url": None, "openapi_url": None,
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


def _upload_endpoint(studio: Studio, cookie: str) -> Callable[..., Any]:
    """Return the endpoint that stores an uploaded file and answers with a list of its key.

    Only a browser with an open page may upload. A page is opened after the login, so no login is checked here.
    """
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse

    async def store(request: Request, key: str) -> Any:
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("files")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "No file was sent: choose one file.")
            await asyncio.to_thread(studio.uploads.write, key, file.filename or "", file.file)
        return JSONResponse([key])

    async def upload(request: Request) -> Any:
        visitor = visitor_cookie(request.headers.get("cookie", ""), cookie)
        length = request.headers.get("content-length", "")
        if not studio.has_visitor(visitor):
            return PlainTextResponse(
                "Only an open page can upload files: load the page again, then choose the file again.",
                403,
            )
        if not re.fullmatch("[0-9]{1,18}", length):
            return PlainTextResponse("The upload does not state its size: use a browser.", 411)
        try:
            key = studio.uploads.reserve(visitor, int(length))
        except StoreFull as error:
            return PlainTextResponse(f"{error}", 413)
        stored = False
        try:
            async with asyncio.timeout(_UPLOAD_SECONDS):
                answer = await store(request, key)
            stored = True
            return answer
        except (HTTPException, StoreFull, TimeoutError, ClientDisconnect) as error:
            return PlainTextResponse(
                getattr(error, "detail", "") or f"{error}" or "The upload was cancelled.", 400
            )
        finally:
            if not stored:
                studio.uploads.remove(key)

    return upload
