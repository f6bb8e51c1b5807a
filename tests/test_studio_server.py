"""The web server of the studio: access, ports, environment, models, and the extra."""

import os
import socket
import sys

import pytest

import overpaint as op
from overpaint.studio import server
from overpaint.studio.server import check_access, check_models, check_port


def test_other_machines_need_a_password_or_no_auth():
    assert check_access("127.0.0.1", None, no_auth=False) is None
    assert check_access("::1", None, no_auth=False) is None
    assert check_access("[::1]", None, no_auth=False) is None
    assert check_access("0.0.0.0", "ada:a:b", no_auth=False) == ("ada", "a:b")
    assert check_access("0.0.0.0", None, no_auth=True) is None
    for host in ("0.0.0.0", "192.168.1.4", "example.org", "::"):
        message = f"--host {host} is reachable from other machines: set a password with --auth"
        with pytest.raises(ValueError, match=message):
            check_access(host, None, no_auth=False)
    for auth in ("ada", ":x", "ada:"):
        with pytest.raises(ValueError, match="--auth must be USER:PASSWORD"):
            check_access("127.0.0.1", auth, no_auth=False)
    with pytest.raises(ValueError, match="contradict each other"):
        check_access("0.0.0.0", "a:b", no_auth=True)


def test_a_port_in_use_is_refused(run):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} .*in use.*--port"):
            check_port("127.0.0.1", port)
        code, out, err = run("studio", "--port", port)
    assert (code, out) == (2, "")
    assert err.startswith(f"overpaint: cannot listen on 127.0.0.1:{port}")
    with pytest.raises(ValueError, match="must be 1 to 65535, got 0"):
        check_port("127.0.0.1", 0)


def test_the_environment_is_restored_after_an_error(monkeypatch, free_port):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "outside")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    before, port = dict(os.environ), free_port()
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "overpaint.studio.layout", raising=False)
    with pytest.raises(op.MissingExtra), server.open_studio(["icons"], port=port):
        pass
    assert dict(os.environ) == before
    with server._environment(GRADIO_TEMP_DIR="inside"):
        assert os.environ["GRADIO_TEMP_DIR"] == "inside"
    assert dict(os.environ) == before


def test_names_that_cannot_be_models_are_refused(tmp_path):
    check_models(["icons", str(tmp_path), "owner/name"])
    for name in ("nope", "../x", "/etc/shadow", "icons-judge"):
        with pytest.raises(ValueError, match=f"unknown model '{name}': it is neither a folder"):
            check_models([name])


def test_without_gradio_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "overpaint.studio.layout", raising=False)
    with pytest.raises(op.MissingExtra, match="not installed: pip install 'gradio"):
        server._page(None, "")
