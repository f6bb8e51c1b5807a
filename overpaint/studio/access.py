"""Checks of each request before Gradio handles it: the Host, the Origin, the route, and the form of queue posts.

A foreign web page can make a visitor's browser send requests to a server on this machine. The Origin of such a request
names the foreign page. A foreign page can also set the DNS entry of its own name to this machine (DNS rebinding), so
that the browser treats the studio as a part of that page. The Host of such a request is the foreign name. For this
reason both headers are compared with a list of allowed values.
"""

import ipaddress
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from overpaint.files import from_json

__all__ = ["AccessCheck", "AllowedHosts", "is_loopback", "visitor_cookie", "without_brackets"]

MAX_POST = 256 * 2**10  # bytes of a queue post; the texts of the page's boxes are far below
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")
_PAGE_NAME = re.compile(r"[\w .-]{1,64}")  # Gradio's `session_hash`
_VISITOR = re.compile(r"[\w-]{22}")
_PORTS = {"http": 80, "https": 443}
_WILDCARDS = ("0.0.0.0", "::")
# Gradio has more routes than the page uses, among them uploads without a session and downloads from other servers.
_ROUTES = re.compile(
    r"/|/login/?|/logout|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.+"
    r"|/gradio_api/(startup-events|queue/join|queue/data|run/predict|cancel|reset/?|upload|login_check/?"
    r"|heartbeat/[^/]+|file=(?!\w+:).+)"
)
_QUEUE_POSTS = ("/gradio_api/queue/join", "/gradio_api/run/predict")


class AllowedHosts:
    """The values of Host and Origin that the studio answers to.

    Args:
        host: The address it listens on.
        port: The port it listens on.
        names: More names, `NAME` or `NAME:PORT`, for example of a proxy. Without a port, the default port and `port`
            are allowed.

    Raises:
        ValueError: A name is not a host name.
    """

    def __init__(self, host: str, port: int, names: Sequence[str] = ()) -> None:
        own = without_brackets(host).lower()
        self._port = port
        self._any_address = own in _WILDCARDS
        self._pairs: set[tuple[str, int | None]] = {(own, port)}
        if self._any_address or is_loopback(own):
            self._pairs |= {(name, port) for name in ("localhost", "127.0.0.1", "::1")}
        if self._any_address:
            self._pairs.add((socket.gethostname().lower(), port))
        for name in names:
            parsed = _split(name)
            if parsed is None:
                raise ValueError(
                    f"--allow-host must be a host name, with or without a port, got {name!r}: for example "
                    "studio.example.org."
                )
            own_name, own_port = parsed
            ports = (None, port) if own_port is None else (own_port,)
            self._pairs |= {(own_name, p) for p in ports}

    def has_host(self, value: str) -> bool:
        """Return True if a Host header is allowed; a studio on all addresses also allows every numeric address."""
        parsed = _split(value)
        if parsed is None:
            return False
        name, port = parsed
        if self._any_address and port == self._port and _is_address(name):
            return True
        return parsed in self._pairs or (port in _PORTS.values() and (name, None) in self._pairs)

    def has_origin(self, origin: str, host: str) -> bool:
        """Return True if an Origin header names an allowed host, or the same host as the Host header `host`."""
        try:
            parts = urlsplit(origin)
            default = _PORTS.get(parts.scheme)
        except ValueError:
            return False
        if default is None or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
            return False
        if parts.netloc.lower() == host.lower():
            return True
        parsed = _split(parts.netloc)
        if parsed is None:
            return False
        name, port = parsed
        return self.has_host(parts.netloc) or (port is None and (name, default) in self._pairs)


class AccessCheck:
    """Middleware that refuses foreign requests and malformed queue posts with a status 4xx and one sentence.

    It also gives each browser a random cookie when it loads the page, see `visitor_cookie`.

    Args:
        app: The application behind it.
        hosts: The allowed values of Host and Origin.
        address: Address of the studio, for the sentence.
        inputs: Number of inputs of each function of the page.
        cookie: Name of the cookie.
    """

    def __init__(
        self, app: Any, hosts: AllowedHosts, address: str, inputs: Mapping[int, int], cookie: str
    ) -> None:
        self.app = app
        self._hosts, self._address, self._inputs, self._cookie = hosts, address, inputs, cookie

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it to the application."""
        if scope["type"] == "websocket":  # the page uses none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None and scope["method"] == "POST" and scope["path"] in _QUEUE_POSTS:
            body = await _read(receive)
            refusal = self._fault(_headers(scope, b"content-type"), body)
            receive = _replay(body or b"", receive)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        if scope["method"] == "GET" and scope["path"] == "/":
            send = self._with_cookie(scope, send)
        if scope["path"] == "/gradio_api/queue/data":
            await self._stream(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _stream(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events of a page. For an unknown page, Gradio sends an error and fails; the answer ends there."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            if getattr(error.__cause__, "status_code", None) != 404:
                raise
            await send({"type": "http.response.body", "body": b""})

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        """Return status and sentence if the request is foreign or names an unused route, else `None`."""
        hosts = _headers(scope, b"host")
        if len(hosts) != 1 or not self._hosts.has_host(hosts[0]):
            shown = ascii(hosts[0][:80]) if hosts else "no name"
            return 403, (
                f"The studio does not answer to {shown}: open it at {self._address}, or start it with --allow-host "
                "NAME if it is reached under another name."
            )
        origins = _headers(scope, b"origin")
        if any(not self._hosts.has_origin(origin, hosts[0]) for origin in origins):
            return 403, self._foreign(ascii(origins[0][:80]))
        sites = _headers(scope, b"sec-fetch-site")
        if not origins and scope["path"] != "/" and {*sites} & {"cross-site", "same-site"}:
            return 403, self._foreign("another address")
        if not _ROUTES.fullmatch(scope["path"]):
            return 404, f"The studio has no such page: open it at {self._address}."
        return None

    def _foreign(self, origin: str) -> str:
        return (
            f"A page at {origin} may not use the studio: open it at {self._address}, or start it with --allow-host "
            "NAME if a proxy serves it under another name."
        )

    def _fault(self, types: Sequence[str], body: bytes | None) -> tuple[int, str] | None:
        """Return status and sentence if a queue post does not have the form of the page's posts, else `None`."""
        if body is None:
            return 413, f"The request is larger than {MAX_POST // 2**10} KiB: shorten its texts."
        if not any(t.partition(";")[0].strip().lower() == "application/json" for t in types):
            return 415, "The request is not JSON: load the page again."
        try:
            post = from_json(body)
        except ValueError:
            post = None
        if not self._is_post(post):
            return 400, "The request has another form than those of the page: load the page again."
        return None

    def _is_post(self, post: Any) -> bool:
        """Return True if a post names a function of the page and has one plain value for each of its inputs."""
        if not isinstance(post, dict):
            return False
        number, values, page = (post.get(k) for k in ("fn_index", "data", "session_hash"))
        return (
            type(number) is int
            and number in self._inputs
            and isinstance(values, list)
            and len(values) == self._inputs[number]
            and all(v is None or isinstance(v, str | int | float) for v in values)
            and isinstance(page, str)
            and _PAGE_NAME.fullmatch(page) is not None
            and isinstance(post.get("trigger_id"), int | None)
            and not {*post} - _KEYS
        )

    def _with_cookie(self, scope: Any, send: Any) -> Any:
        """Return `send` that sets the visitor's cookie, unless the browser has one."""
        if visitor_cookie("; ".join(_headers(scope, b"cookie")), self._cookie):
            return send
        cookie = f"{self._cookie}={secrets.token_urlsafe(16)}; Path=/; HttpOnly; SameSite=Lax"

        async def send_with_cookie(message: Any) -> None:
            if message["type"] == "http.response.start":
                pair = (b"set-cookie", cookie.encode())
                message = {**message, "headers": [*message.get("headers", []), pair]}
            await send(message)

        return send_with_cookie


_KEYS = frozenset({"data", "fn_index", "session_hash", "event_data", "trigger_id"})


def visitor_cookie(header: str, name: str) -> str:
    """Return the visitor's random key from a Cookie header, or an empty text."""
    pairs = (pair.strip().partition("=") for pair in header.split(";"))
    return next((v for key, _, v in pairs if key == name and _VISITOR.fullmatch(v)), "")


def without_brackets(host: str) -> str:
    """Return an IPv6 address without the brackets that it has in a URL, any other host unchanged."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach `host`."""
    host = without_brackets(host)
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _split(text: str) -> tuple[str, int | None] | None:
    """Return name and port of `NAME`, `NAME:PORT` or `[IPV6]:PORT`, in lower case; `None` for anything else."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+)(?::([0-9]{1,5}))?", text)
    if match is None:
        return None
    name = without_brackets(match[1]).lower()
    if not (_NAME.fullmatch(name) or _is_address(name)):
        return None
    return name, None if match[2] is None else int(match[2])


def _headers(scope: Any, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def _read(receive: Any) -> bytes | None:
    """Return the body of a request, or `None` if it is larger than `MAX_POST`."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_POST:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Any) -> Any:
    """Return a function that returns the body that was read, and then what `receive` returns."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return messages.pop() if messages else await receive()

    return receive_again


async def _answer(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
