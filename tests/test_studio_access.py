"""Who may use the studio: Host, Origin, routes, the form of queue posts, uploads, and what is left on disk."""

import gc
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import browser
import pytest

from overpaint.studio import upload_store, work_folder
from overpaint.studio.access import AllowedHosts, visitor_cookie
from overpaint.studio.server import open_studio

if find_spec("gradio") is None:
    pytest.skip("the extra `studio` is not installed", allow_module_level=True)

# Gradio leaves event loops open when it starts in this process.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed (event loop|.socket):ResourceWarning")


class Client:
    """Sends requests to a studio as a browser with one page would."""

    def __init__(self, address):
        self.host = address.removeprefix("http://").rstrip("/")
        self.cookie = ""
        status, _, headers = self.send("GET", "/")
        assert status == 200
        self.cookie = headers["set-cookie"].partition(";")[0]
        config = json.loads(self.send("GET", "/config")[1])
        self.functions = config["dependencies"]
        self.load = next(
            d["id"] for d in self.functions if any(t[1] == "load" for t in d["targets"])
        )

    def send(self, method, path, body=None, **headers):
        """Send one request; return status, text and headers."""
        headers = {k.replace("_", "-"): v for k, v in headers.items() if v is not None}
        port = int(self.host.rpartition(":")[2])
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=browser.HANG)
        try:
            line.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for key, value in {"host": self.host, "cookie": self.cookie, **headers}.items():
                line.putheader(key, value)
            if body is not None and "content-length" not in headers:
                line.putheader("content-length", str(len(body)))
            line.endheaders(body)
            answer = line.getresponse()
            return answer.status, answer.read().decode(), answer.headers
        finally:
            line.close()

    def post(self, call, data, **more):
        body = {"fn_index": call, "data": data, "session_hash": "page", "event_data": None, **more}
        return self.send(
            "POST", "/gradio_api/queue/join", json.dumps(body).encode(), content_type="application/json"
        )  # fmt: skip

    def open_page(self):
        assert self.post(self.load, [])[0] == 200
        return self.send("GET", "/gradio_api/queue/data?session_hash=page")[1]

    def upload(self, content, name="a.safetensors", **headers):
        form = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + name.encode() +
            b'"\r\n\r\n' + content + b"\r\n--x--\r\n"
        )  # fmt: skip
        kind = "multipart/form-data; boundary=x"
        return self.send("POST", "/gradio_api/upload", form, content_type=kind, **headers)


@pytest.fixture(scope="module")
def served(tiny_folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open_studio([str(tiny_folder)], port=port, allowed_hosts=["proxy.example.org"]) as pair:
        yield pair
    with warnings.catch_warnings():  # and not during a test of another file
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def client(served):
    studio, address = served
    yield Client(address)
    for key in list(studio._sessions):
        studio.close_session(key)


def test_hosts_and_origins_are_on_a_list():
    hosts = AllowedHosts("127.0.0.1", 7860, ["studio.example.org", "other:8443"])
    for host in (
        "127.0.0.1:7860",
        "LOCALHOST:7860",
        "[::1]:7860",
        "studio.example.org",
        "other:8443",
    ):
        assert hosts.has_host(host), host
    for host in ("evil.com", "evil.com:7860", "localhost", "localhost:80", "127.0.0.1:7861", "other", "", "a b",
                 "127.0.0.1:7860@evil.com", "localhost:7860:1", "10.0.0.1:7860"):  # fmt: skip
        assert not hosts.has_host(host), host
    for origin in ("http://127.0.0.1:7860", "http://localhost:7860", "https://studio.example.org"):
        assert hosts.has_origin(origin, "127.0.0.1:7860"), origin
    for origin in ("null", "", "http://evil.com", "http://localhost:3000", "http://evil.com@localhost:7860",
                   "file://", "http://[", "ftp://localhost:7860", "http://localhost:7860/x"):  # fmt: skip
        assert not hosts.has_origin(origin, "127.0.0.1:7860"), origin
    anywhere = AllowedHosts("0.0.0.0", 7860)
    assert anywhere.has_host("192.168.1.4:7860") and anywhere.has_host("localhost:7860")
    assert not anywhere.has_host("evil.com:7860") and not anywhere.has_host("192.168.1.4")
    for name in ("http://a", "a/b", "", "*", "a:b"):
        with pytest.raises(ValueError, match="--allow-host must be a host name, with or without a"):
            AllowedHosts("127.0.0.1", 7860, [name])


def test_a_request_under_another_name_is_refused(client):
    for host in ("evil.com", "evil.com:7860", "localhost:1"):
        for method, path in (("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/queue/join")):
            status, text, headers = client.send(method, path, b"{}", host=host)
            assert status == 403 and "--allow-host NAME" in text and repr(host) in text
            assert "default-src 'self'" in headers["content-security-policy"]
    port = client.host.rpartition(":")[2]
    assert client.send("GET", "/config", host=f"localhost:{port}")[0] == 200
    assert client.send("GET", "/config", host="proxy.example.org")[0] == 200


def test_a_page_from_elsewhere_is_refused(client):
    body = json.dumps({"fn_index": client.load, "data": [], "session_hash": "x"}).encode()
    for origin in ("http://evil.com", "null", "http://localhost:3000"):
        for method, path in (
            ("POST", "/gradio_api/queue/join"), ("GET", "/gradio_api/queue/data?session_hash=x"),
            ("GET", "/gradio_api/heartbeat/x"), ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/cancel"),
            ("POST", "/login"), ("POST", "/gradio_api/run/predict"),
        ):  # fmt: skip
            status, text, _ = client.send(
                method, path, body, origin=origin, content_type="application/json"
            )
            assert status == 403 and "may not use the studio" in text, (origin, path)
    status, text, _ = client.send("GET", "/logout", sec_fetch_site="cross-site")
    assert status == 403 and "A page at another address may not use the studio" in text
    assert client.post(client.load, [])[0] == 200
    same = {"origin": f"http://{client.host}", "content_type": "application/json"}
    assert client.send("POST", "/gradio_api/queue/join", body, **same)[0] == 200


def test_routes_that_the_page_does_not_use_are_closed(client):
    for method, path in (
        ("POST", "/gradio_api/process_recording"), ("POST", "/gradio_api/component_server"),
        ("GET", "/gradio_api/file=http://example.org/"), ("GET", "/gradio_api/proxy=http://example.org/"),
        ("POST", "/gradio_api/vibe-edit"), ("GET", "/gradio_api/info"), ("GET", "/monitoring"),
        ("POST", "/gradio_api/call/x"), ("GET", "/nothing"), ("GET", "/gradio_api/runs"),
    ):  # fmt: skip
        status, text, _ = client.send(method, path, b"")
        assert status == 404 and "The studio has no such page" in text, path
    connection = {"connection": "Upgrade", "upgrade": "websocket", "sec_websocket_version": "13",
                  "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    assert client.send("GET", "/gradio_api/queue/data", **connection)[0] in (403, 404, 422)


def test_malformed_queue_posts_are_refused_without_a_traceback(client, capfd):
    client.open_page()
    trace = next(d for d in client.functions if len(d["inputs"]) == 6)
    good = {"fn_index": trace["id"], "data": ["a", "a", 0, 1, 1, "text"], "session_hash": "page"}
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for post in (
        {}, [], 7, {**good, "fn_index": 999}, {**good, "fn_index": "0"}, {**good, "fn_index": True},
        {**good, "data": []}, {**good, "data": None}, {**good, "data": [{}] * 6}, {**good, "data": [file] * 6},
        {**good, "session_hash": None}, {**good, "session_hash": "../x"}, 
        {**good, "trigger_id": "x"}, {**good, "request": {}}, {k: good[k] for k in ("data", "session_hash")},
    ):  # fmt: skip
        for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
            status, text, _ = client.send(
                "POST", path, json.dumps(post).encode(), content_type="application/json"
            )
            assert status == 400 and "another form than those of the page" in text, post
    for body, kind, code in (
        (b"{", "application/json", 400), (b"[" * 10**5, "application/json", 400), (b"\xff", "application/json", 400),
        (json.dumps({**good, "data": ["a", "a", 10**400, 1, 1, "text"]}).encode(), "application/json", 400),
        (b"a" * 300_000, "application/json", 413), (json.dumps(good).encode(), "text/plain", 415),
    ):  # fmt: skip
        assert client.send("POST", "/gradio_api/queue/join", body, content_type=kind)[0] == code
    status, text, _ = client.send("GET", "/gradio_api/queue/data?session_hash=unknown")
    assert status == 200 and '"session_not_found":true' in text
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def test_values_of_another_type_are_explained_in_the_page(client, capfd):
    client.open_page()
    for function in client.functions:
        if function["backend_fn"]:
            for value in (None, "x", -1, 1e300, True):
                assert client.post(function["id"], [value] * len(function["inputs"]))[0] == 200
                events = client.send("GET", "/gradio_api/queue/data?session_hash=page")[1]
                assert '"process_completed"' in events and '"success":false' not in events
                assert "a bug in overpaint" not in events.lower()
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def test_uploads_need_an_open_page_and_have_limits(served, client, monkeypatch):
    studio, _ = served
    status, text, _ = client.upload(b"abc")
    assert status == 403 and "Only an open page can upload files" in text
    client.open_page()
    status, text, _ = client.upload(b"abc", cookie=f"{client.cookie[:-3]}abc")
    assert status == 403
    assert client.upload(b"abc")[0] == 200
    assert len(studio.uploads) == 1
    status, text, _ = client.upload(b"", content_length=str(2**40))
    assert status == 413 and "at most 256 are allowed" in text
    monkeypatch.setattr(upload_store, "MAX_BYTES_OF_ONE", 600)
    assert client.upload(b"a" * 300)[0] == 200
    status, text, _ = client.upload(b"a" * 300)
    assert status == 413 and "of uploads from this browser are not read yet" in text
    monkeypatch.setattr(upload_store, "MAX_BYTES_OF_ONE", 10**6)
    monkeypatch.setattr(upload_store, "MAX_BYTES_OF_ALL", 600)
    status, text, _ = client.upload(b"a" * 300)
    assert status == 413 and "of uploads of all visitors are not read yet" in text
    for key in list(studio._sessions):
        studio.close_session(key)
    assert (len(studio.uploads), studio.uploads.size) == (0, 0)
    assert not list(studio.uploads._folder.iterdir())


@pytest.mark.parametrize(
    "name", ["../../etc/x.safetensors", "..", "", "a/b\\c.png", "日本" * 80 + ".safetensors", "%00", ".", "/"]
)  # fmt: skip
def test_names_of_uploads_stay_in_their_folder(served, client, name):
    studio, _ = served
    client.open_page()
    status, text, _ = client.upload(b"abc", name)
    assert status == 200, text
    (key,) = json.loads(text)
    assert re.fullmatch(r"[\w-]{22}", key)
    (visitor,) = {s.visitor for s in studio._sessions.values()}
    with pytest.raises(ValueError, match="no longer stored"), studio.uploads.opened(key, "other"):
        pass
    with studio.uploads.opened(key, visitor) as path:
        assert path.read_bytes() == b"abc"
        assert path.resolve().parent == (studio.uploads._folder / key).resolve()
    assert len(studio.uploads) == 0 and not path.parent.exists()


def test_an_uploaded_file_is_deleted_after_it_was_read(served, client):
    studio, _ = served
    client.open_page()
    (key,) = json.loads(client.upload(b"not a change")[1])
    upload = next(d for d in client.functions if any(t[1] == "upload" for t in d["targets"]))
    for message in ("damaged or not a safetensors file", "no longer stored: choose it again"):
        assert client.post(upload["id"], ["a", "a", 0, 1, 1, key])[0] == 200
        assert message in client.send("GET", "/gradio_api/queue/data?session_hash=page")[1]
        assert len(studio.uploads) == 0


def test_an_upload_that_is_broken_off_leaves_nothing(served, client):
    studio, _ = served
    client.open_page()
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {client.host}\r\nCookie: {client.cookie}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc'
    )
    with socket.create_connection(("127.0.0.1", int(client.host.rpartition(":")[2]))) as line:
        line.sendall(head.encode())
        wait_until(lambda: studio.uploads.size == 1_000_000)
    wait_until(lambda: len(studio.uploads) == 0)
    assert client.upload(b"abc")[0] == 200


def wait_until(condition):
    end = time.monotonic() + browser.HANG
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_the_cookie_is_read_from_among_others():
    key = "a" * 22
    assert visitor_cookie(f"x=y; overpaint-1={key}; b", "overpaint-1") == key
    assert visitor_cookie(f"overpaint-1={key}; overpaint-2={'b' * 22}", "overpaint-2") == "b" * 22
    for header in ("", "overpaint-1=", "overpaint-1=../..", f"overpaint-11={key}"):
        assert visitor_cookie(header, "overpaint-1") == ""


@contextmanager
def started(port, folder):
    """Start a studio on the command line whose temporary folder is in `folder`; yield process and address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "overpaint", "studio", "icons", "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        address = re.search(r"http://[\d.:]+/", process.stdout.readline())
        assert address
        yield process, address[0]
    finally:
        process.kill()
        process.communicate()


def test_a_terminated_studio_deletes_its_files_and_those_of_a_killed_one(tmp_path, free_port):
    with started(free_port(), tmp_path) as (killed, address):
        client = Client(address)
        client.open_page()
        assert client.upload(b"abc")[0] == 200
        assert list(tmp_path.glob("overpaint-studio-*/uploads/*/a.safetensors"))
        killed.kill()
        killed.wait()
        (left,) = tmp_path.glob("overpaint-studio-*")
    with started(free_port(), tmp_path) as (process, address):
        (folder,) = tmp_path.glob("overpaint-studio-*")
        assert folder != left
        client = Client(address)
        client.open_page()
        assert client.upload(b"abc")[0] == 200
        assert list(folder.glob("uploads/*/a.safetensors"))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=browser.HANG)
        assert (process.returncode, err) == (143, "")
        assert list(tmp_path.glob("overpaint-*")) == []


def test_only_folders_of_studios_that_do_not_run_are_left_overs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    unlocked, old, link = (tmp_path / f"overpaint-studio-{n * 8}" for n in "abc")
    for folder in (unlocked, old, tmp_path / "target"):
        folder.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    link.symlink_to(tmp_path / "target")
    foreign = tmp_path / "overpaint-studio-of somebody"
    foreign.mkdir()
    killed, starting = (tmp_path / f"overpaint-studio-{n * 8}" for n in "de")
    for folder in (killed, starting):
        folder.mkdir()
        (folder / ".lock").touch()
    hour_ago = (time.time() - 3600,) * 2
    os.utime(killed / ".lock", hour_ago)
    with work_folder.work_folder() as running:
        assert not old.exists() and not killed.exists()
        os.utime(running / ".lock", hour_ago)
        work_folder.remove_left_overs()
        assert running.is_dir()
    assert not running.exists()
    assert {p.name for p in tmp_path.iterdir()} == {
        unlocked.name,
        starting.name,
        link.name,
        foreign.name,
        Path("target").name,
    }
