"""The studio in a real Chromium: trace, click, paint over, undo, take away, and the same pixels from the shell."""

import base64
import gc
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import browser
import pytest
from PIL import Image

from overpaint.studio.server import open_studio

if find_spec("gradio") is None:
    pytest.skip("the extra `studio` is not installed", allow_module_level=True)

SHOTS = Path(__file__).parent.parent / "runs" / "studio"  # git ignores it
PROMPT = "an apple in openmoji style"


@pytest.fixture(scope="module")
def chromium():
    with browser.launched() as found:
        yield found


@pytest.fixture(scope="module")
def axe():
    return browser.axe_core()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(*options):
    """The address of a studio, opened as a user does and ended by Ctrl-C; one thread, as the tests have."""
    command = [sys.executable, "-m", "overpaint", "studio", "icons", "--port", str(free_port())]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OVERPAINT_AUTH": "ada:secret"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.search(r"http://[\d.:\[\]]+/", line)
        assert found, line + process.stderr.read()
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "overpaint: stopped by Ctrl-C\n"


@pytest.fixture(scope="module")
def shown():
    with served() as address:
        yield address


@contextmanager
def visit(chromium, address, **options):
    """Open the studio and come in by the password."""
    with browser.visit(chromium, address, timeout=40, **options) as seen:
        form = {"username": "ada", "password": "secret"}
        assert seen.page.request.post(f"{address}login", form=form).ok
        seen.page.goto(address)
        seen.errors.clear()
        yield seen


def pictures(page, place):
    """Return the pixels of every picture in a part of the page."""
    sources = page.eval_on_selector_all(f"{place} img", "all => all.map(i => i.src)")
    data = (base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources)
    return [Image.open(io.BytesIO(d)).convert("RGB").tobytes() for d in data]


def wait_for(page, place, count):
    page.wait_for_function(
        "([place, count]) => document.querySelectorAll(place + ' img').length === count"
        " && !document.querySelector('#op-status progress')",
        arg=[place, count],
    )


def press(page, name, *, role="button"):
    page.get_by_role(role, name=name, exact=True).click()


def few_steps(page):
    """Four steps a picture."""
    page.get_by_role("button", name="How to draw").click()
    box = page.get_by_role("spinbutton", name="Steps")
    box.fill("4")
    box.press("Tab")


def shoot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def test_the_whole_loop_and_the_same_pixels_from_the_shell(shown, chromium, axe, tmp_path, run):
    with visit(chromium, shown, accept_downloads=True) as seen:
        page = seen.page
        few_steps(page)
        press(page, "Trace")
        cell = page.get_by_role("button", name="layer 0 attention at end of text")
        cell.focus()
        cell.press("Enter")
        wait_for(page, "#op-restored", 3)
        clean, corrupted, restored = pictures(page, "#op-restored")
        assert len({clean, corrupted, restored}) == 3
        assert "layer 0 attention put back at “end of text”" in page.inner_text("#op-restored")
        shoot(page, "trace-1280")
        browser.check(seen, axe)

        press(page, "Paint over it", role="tab")
        page.get_by_text("Diff-QuickFix").click()
        press(page, "Paint over")
        wait_for(page, "#op-drawn", 4)
        before, after = pictures(page, "#op-drawn")[:2], pictures(page, "#op-drawn")[2:]
        assert not set(before) & set(after)
        assert page.locator("#op-forecast tbody tr").count() == 10
        shoot(page, "paint-1280")
        browser.check(seen, axe)
        with page.expect_download() as fetched:
            press(page, "Download")
        assert fetched.value.suggested_filename == "no-openmoji-style.safetensors"
        file = tmp_path / "mine.safetensors"
        fetched.value.save_as(file)
        arguments = ("--change", file, "--seed", 1, "--steps", 4, "--out", tmp_path)
        assert run("generate", "icons", PROMPT, *arguments)[0] == 0
        assert Image.open(tmp_path / "0000.png").tobytes() == after[1]

        press(page, "Undo")
        wait_for(page, "#op-drawn", 2)
        assert pictures(page, "#op-drawn") == before
        assert "No coat yet" in page.inner_text("#op-side")

        page.set_input_files("#op-side input[type=file]", file)
        page.get_by_text("The change lies on the model").wait_for()
        press(page, "Compare", role="tab")
        page.locator("[role=tabpanel]:visible").get_by_role("button", name="Compare").click()
        wait_for(page, "#op-compared", 4)
        assert pictures(page, "#op-compared") == before + after
        shoot(page, "compare-1280")
        browser.check(seen, axe)
        assert seen.requests == []


def test_a_phone_in_the_dark_and_words_that_would_be_code(shown, chromium, axe, tmp_path):
    nasty = "<script>window.bad=1</script><img src=x onerror=window.bad=2> {{7}} ${window.bad=3}"
    damaged = tmp_path / "<img src=x onerror=window.bad=4>.safetensors"
    damaged.write_bytes(b"no change")
    with visit(chromium, shown, width=390, dark=True) as seen:
        page = seen.page
        few_steps(page)
        page.get_by_label("Prompt", exact=True).fill(nasty)
        press(page, "Paint over it", role="tab")
        press(page, "Draw again")
        wait_for(page, "#op-drawn", 2)
        assert nasty in page.inner_text("#op-drawn figcaption")
        page.set_input_files("#op-side input[type=file]", damaged)
        alert = page.locator("#op-status [role=alert]")
        alert.wait_for()
        assert "damaged or no safetensors file" in alert.inner_text()
        assert page.evaluate("window.bad") is None
        shoot(page, "paint-390-dark")
        browser.check(seen, axe)
        press(page, "Where is it?", role="tab")
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        press(page, "Trace")
        page.locator("#op-map tbody tr").first.wait_for()
        shoot(page, "trace-390-dark")
        browser.check(seen, axe)
        assert seen.requests == []


def kept_pages():
    """How many pages the framework holds values of."""
    from gradio.state_holder import StateHolder

    return sum(len(o.session_data) for o in gc.get_objects() if type(o) is StateHolder)


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    assert true()


def test_closing_a_page_takes_its_session_its_files_and_its_values_and_no_others(
    chromium, tiny_folder
):
    before = kept_pages()
    with open_studio([str(tiny_folder)], port=free_port()) as (studio, address):
        with browser.visit(chromium, address) as stays:
            with browser.visit(chromium, address) as goes:
                for seen in (stays, goes):
                    press(seen.page, "Paint over it", role="tab")
                    seen.page.get_by_text("Diff-QuickFix").click()
                    press(seen.page, "Paint over")
                    wait_for(seen.page, "#op-drawn", 4)
                folders = set(studio.folder.iterdir())
                assert len(studio) == len(folders) == kept_pages() - before == 2
                assert all({p.suffix for p in f.iterdir()} == {".safetensors", ".png"} for f in folders)  # fmt: skip
            wait_until(lambda: len(studio) == 1)
            wait_until(lambda: kept_pages() - before == 1)
            (left,) = studio.folder.iterdir()
            assert studio.holds(left.name) and len(list(left.iterdir())) == 2
            press(stays.page, "Undo")
            wait_for(stays.page, "#op-drawn", 2)
        wait_until(lambda: len(studio) == 0)
        wait_until(lambda: kept_pages() == before)
        assert list(studio.folder.iterdir()) == []


def test_long_work_shows_its_progress_and_stops(shown, chromium):
    with visit(chromium, shown) as seen:
        page = seen.page
        page.get_by_text("pictures, judged").click()
        press(page, "Trace")
        page.locator("#op-status progress").wait_for()
        press(page, "Stop")
        page.get_by_text("Stopped. What was finished before is kept.").wait_for()
        assert page.locator("#op-map table").count() == 0


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_is_shown_in_brackets(host):
    with (
        open_studio(["icons"], host=host, port=free_port()) as (_, address),
        urllib.request.urlopen(address) as answer,
    ):
        assert address.startswith("http://[::1]:")
        assert answer.status == 200


def test_without_the_password_nobody_comes_in(shown):
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(f"{shown}config")
    refused.value.close()
    with urllib.request.urlopen(shown) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert b"openmoji" not in answer.read()
