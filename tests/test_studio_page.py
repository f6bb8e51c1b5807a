"""The studio in a real Chromium: trace, edit, undo, download, and the same pixels from the command line."""

import base64
import gc
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import browser
import pytest
from PIL import Image

import overpaint as op
from overpaint.studio.server import open_studio

if find_spec("gradio") is None:
    pytest.skip("the extra `studio` is not installed", allow_module_level=True)

SCREENSHOTS = Path(__file__).parent.parent / "runs" / "studio"  # ignored by git
PROMPT = "an apple in openmoji style"


@contextmanager
def served(port, *options):
    """Start a studio on the command line with one thread, yield its address, and stop it with Ctrl-C."""
    command = [sys.executable, "-m", "overpaint", "studio", "icons", "--port", str(port), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OVERPAINT_AUTH": "ada:secret"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )  # fmt: skip
    hang = threading.Timer(browser.HANG, process.kill)  # then the line below is empty
    hang.start()
    try:
        line = process.stdout.readline()
        address = re.search(r"http://[\d.:\[\]]+/", line)
        assert address, line + process.stderr.read()
        hang.cancel()
        yield address[0]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=browser.HANG)
    finally:
        hang.cancel()
        process.kill()
        process.communicate()
    assert process.returncode == 130
    *warnings, last = err.splitlines()
    assert last == "overpaint: stopped by Ctrl-C"
    assert all(line.startswith("overpaint: warning: ") for line in warnings)


@pytest.fixture(scope="module")
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with served(port) as started:
        yield started


@contextmanager
def visit(chromium, address, **options):
    """Open the studio and log in with the password."""
    with browser.visit(chromium, address, **options) as opened:
        form = {"username": "ada", "password": "secret"}
        assert opened.page.request.post(f"{address}login", form=form).ok
        opened.page.goto(address)
        opened.errors.clear()
        yield opened


def pictures(page, place):
    """Return the pixels of every picture in a part of the page."""
    sources = page.eval_on_selector_all(f"{place} img", "all => all.map(i => i.src)")
    data = (base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources)
    return [Image.open(io.BytesIO(d)).convert("RGB").tobytes() for d in data]


def wait_for_pictures(page, place, count):
    page.wait_for_function(
        "([place, count]) => document.querySelectorAll(place + ' img').length === count"
        " && !document.querySelector('#op-status progress')",
        arg=[place, count],
    )


def press(page, name, *, role="button"):
    page.get_by_role(role, name=name, exact=True).click()


def wait_for_first_values(page):
    """Wait two frames: Gradio sets the first values of a section again in the frame after it was opened."""
    page.evaluate(
        "() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(r))))"
    )


def open_tab(page, name):
    press(page, name, role="tab")
    page.locator("[role=tabpanel]:visible").get_by_role("button").first.wait_for()
    wait_for_first_values(page)


def set_four_steps(page):
    page.get_by_role("button", name="Drawing settings").click()
    box = page.get_by_role("spinbutton", name="Steps")
    box.wait_for()
    wait_for_first_values(page)
    box.fill("4")
    box.press("Tab")
    wait_for_first_values(page)
    assert box.input_value() == "4"


def screenshot(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_trace_edit_undo_and_the_same_pixels_from_the_command_line(
    address, chromium, axe, tmp_path, run
):
    with visit(chromium, address, accept_downloads=True) as opened:
        page = opened.page
        set_four_steps(page)
        page.locator("#op-trace").click()
        cell = page.get_by_role("button", name="layer 0 attention at end of text")
        cell.focus()
        cell.press("Enter")
        wait_for_pictures(page, "#op-restored", 3)
        clean, corrupted, restored = pictures(page, "#op-restored")
        assert len({clean, corrupted, restored}) == 3
        text = page.inner_text("#op-restored")
        assert "layer 0 attention at “end of text” restored" in text
        screenshot(page, "trace-1280")
        browser.check(opened, axe)

        open_tab(page, "Edit")
        page.get_by_text("Diff-QuickFix").click()
        press(page, "Apply edit")
        wait_for_pictures(page, "#op-drawn", 4)
        before, after = pictures(page, "#op-drawn")[:2], pictures(page, "#op-drawn")[2:]
        assert not set(before) & set(after)
        assert page.locator("#op-side-effects tbody tr").count() == 10
        screenshot(page, "edit-1280")
        browser.check(opened, axe)
        with page.expect_download() as download:
            press(page, "Download")
        assert download.value.suggested_filename == "no-openmoji-style.safetensors"
        file = tmp_path / "mine.safetensors"
        download.value.save_as(file)
        arguments = ("--change", file, "--seed", 1, "--steps", 4, "--out", tmp_path)
        assert run("generate", "icons", PROMPT, *arguments)[0] == 0
        assert Image.open(tmp_path / "0000.png").tobytes() == after[1]

        press(page, "Undo")
        wait_for_pictures(page, "#op-drawn", 2)
        assert pictures(page, "#op-drawn") == before
        assert "No edits yet" in page.inner_text("#op-side")

        page.set_input_files("#op-side input[type=file]", file)
        page.get_by_text("The change is applied").wait_for()
        open_tab(page, "Compare")
        page.locator("[role=tabpanel]:visible").get_by_role("button", name="Compare").click()
        wait_for_pictures(page, "#op-compared", 4)
        assert pictures(page, "#op-compared") == before + after
        screenshot(page, "compare-1280")
        browser.check(opened, axe)
        assert opened.requests == []


def test_a_dark_phone_and_prompts_that_contain_code(address, chromium, axe, tmp_path):
    hostile = "<script>window.bad=1</script><img src=x onerror=window.bad=2> {{7}} ${window.bad=3}"
    damaged = tmp_path / "<img src=x onerror=window.bad=4>.safetensors"
    damaged.write_bytes(b"not a change")
    with visit(chromium, address, width=390, dark=True) as opened:
        page = opened.page
        set_four_steps(page)
        page.get_by_label("Prompt", exact=True).fill(hostile)
        open_tab(page, "Edit")
        press(page, "Draw again")
        wait_for_pictures(page, "#op-drawn", 2)
        assert hostile in page.inner_text("#op-drawn figcaption")
        page.set_input_files("#op-side input[type=file]", damaged)
        alert = page.locator("#op-status [role=alert]")
        alert.wait_for()
        assert "damaged or not a safetensors file" in alert.inner_text()
        assert page.evaluate("window.bad") is None
        screenshot(page, "edit-390-dark")
        browser.check(opened, axe)
        open_tab(page, "Trace")
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        page.locator("#op-trace").click()
        page.locator("#op-map tbody tr").first.wait_for()
        screenshot(page, "trace-390-dark")
        browser.check(opened, axe)
        assert opened.requests == []


def visible_hints(page):
    return page.locator(".op-scroll-hint:visible").count()


def test_parts_that_are_wider_than_a_phone_say_that_they_scroll(address, chromium, axe):
    scrolled = []
    for width in (300, 400, 1280):
        with visit(chromium, address, width=width) as opened:
            page = opened.page
            page.get_by_label("Prompt", exact=True).fill("a big red apple in openmoji style")
            page.locator("#op-trace").click()
            page.locator("#op-map tbody tr").first.wait_for()
            page.wait_for_function("!document.querySelector('#op-status progress')")
            scrolls = "e => e.scrollWidth > e.clientWidth + 1"
            wide = page.eval_on_selector("#op-map .op-scroll", scrolls)
            scrolled += [("map", width)] if wide else []
            page.wait_for_timeout(200)  # the hint is shown at the next frame
            assert visible_hints(page) == wide
            screenshot(page, f"trace-{width}")
            browser.check(opened, axe)
            open_tab(page, "Compare")
            long = "a very long name of a concept that no window of a phone can hold"
            page.get_by_label("Concept").first.fill("openmoji style")
            open_tab(page, "Edit")
            page.get_by_text("Diff-QuickFix").click()
            page.get_by_label("Replace by").fill(long)
            set_four_steps(page)
            press(page, "Apply edit")
            wait_for_pictures(page, "#op-drawn", 4)
            assert "This change moves 1 weight" in page.inner_text("#op-side-effects .op-verdict")
            screenshot(page, f"edit-{width}")
            browser.check(opened, axe)
            open_tab(page, "Compare")
            page.locator("[role=tabpanel]:visible").get_by_role("button", name="Compare").click()
            wait_for_pictures(page, "#op-compared", 4)
            page.wait_for_timeout(200)
            wide = page.eval_on_selector("#op-facts .op-scroll", scrolls)
            scrolled += [("facts", width)] if wide else []
            assert visible_hints(page) == wide
            screenshot(page, f"compare-{width}")
            browser.check(opened, axe)
    assert {("map", 300), ("facts", 300), ("facts", 400)} <= {*scrolled}
    assert not any(width == 1280 for _, width in scrolled)


def downloaded_strength(page, tmp_path):
    """Press Download and return the strength of the change."""
    with page.expect_download() as download:
        press(page, "Download")
    path = tmp_path / "downloaded.safetensors"
    download.value.save_as(path)
    return op.edit.Change.load(path).protocol.get("strength", {}).get("blob style", 1.0)


def shown_strength(page):
    """Return the number in the box of the strength, if the slider is at the same place."""
    box, slider = (page.locator(f"#op-strength input[type={kind}]") for kind in ("number", "range"))
    assert abs(float(box.input_value()) - float(slider.input_value())) < 0.026
    return float(box.input_value())


def test_the_strength_shown_is_the_strength_downloaded(
    chromium, tiny_folder, free_port, few_concepts, tmp_path
):
    with (
        open_studio([str(tiny_folder)], port=free_port()) as (_, address),
        browser.visit(chromium, address, accept_downloads=True) as opened,
    ):
        page = opened.page
        page.get_by_label("Prompt", exact=True).fill("a cat in blob style")
        page.get_by_role("textbox", name=re.compile("^Concept")).fill("blob style")
        open_tab(page, "Edit")
        page.get_by_text("Diff-QuickFix").click()
        press(page, "Apply edit")
        wait_for_pictures(page, "#op-drawn", 4)
        box, slider = (page.locator(f"#op-strength input[type={k}]") for k in ("number", "range"))

        slider.focus()
        for _ in range(3):
            slider.press("ArrowLeft")
        assert downloaded_strength(page, tmp_path) == shown_strength(page) == 0.85
        wait_for_pictures(page, "#op-drawn", 4)
        at_arrows = pictures(page, "#op-drawn")
        box.fill("0.35")
        box.press("Enter")
        assert downloaded_strength(page, tmp_path) == shown_strength(page) == 0.35
        box.select_text()
        box.press_sequentially("-0.5", delay=20)
        page.get_by_label("Prompt", exact=True).click()
        assert downloaded_strength(page, tmp_path) == shown_strength(page) == -0.5
        page.wait_for_function("!document.querySelector('progress')")  # a redraw refuses other work
        box.fill("7")
        alert = page.locator("#op-side [role=alert]")
        alert.wait_for()
        assert "The strength must be -1 to 2, got 7" in alert.inner_text()
        assert downloaded_strength(page, tmp_path) == shown_strength(page) == -0.5
        box.fill("")
        page.get_by_label("Prompt", exact=True).click()
        page.wait_for_function("document.querySelector('#op-strength input').value === '-0.5'")
        assert downloaded_strength(page, tmp_path) == shown_strength(page) == -0.5

        box.fill("0.5")
        assert downloaded_strength(page, tmp_path) == shown_strength(page) == 0.5
        page.wait_for_function("!document.querySelector('#op-status progress')")
        wait_until(lambda: pictures(page, "#op-drawn")[2:] != at_arrows[2:])
        page.get_by_text("Strength of all edits: 0.5.").wait_for()
        for _ in range(20):
            if page.get_by_role("button", name="Undo", exact=True).is_disabled():
                break
            press(page, "Undo")
            page.wait_for_timeout(300)
        page.get_by_text("No edits yet").wait_for()
        page.set_input_files("#op-side input[type=file]", tmp_path / "downloaded.safetensors")
        page.get_by_text("The change is applied").wait_for()
        assert downloaded_strength(page, tmp_path) == shown_strength(page) == 0.5
        box.fill("1")
        assert downloaded_strength(page, tmp_path) == shown_strength(page) == 1
        assert opened.errors == []


def stored_pages():
    """Return the number of pages whose values Gradio stores."""
    from gradio.state_holder import StateHolder

    return sum(len(o.session_data) for o in gc.get_objects() if type(o) is StateHolder)


def wait_until(condition):
    end = time.monotonic() + browser.HANG
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_closing_a_page_deletes_its_session_files_and_values_only(
    chromium, tiny_folder, free_port, few_concepts
):
    before = stored_pages()
    with open_studio([str(tiny_folder)], port=free_port()) as (studio, address):
        with browser.visit(chromium, address) as first:
            with browser.visit(chromium, address) as second:
                for opened in (first, second):
                    open_tab(opened.page, "Edit")
                    opened.page.get_by_text("Diff-QuickFix").click()
                    press(opened.page, "Apply edit")
                    wait_for_pictures(opened.page, "#op-drawn", 4)
                folders = set(studio.folder.iterdir())
                assert len(studio) == len(folders) == stored_pages() - before == 2
                suffixes = [{path.suffix for path in folder.iterdir()} for folder in folders]
                assert suffixes == [{".safetensors", ".png"}] * 2
            wait_until(lambda: len(studio) == 1)
            wait_until(lambda: stored_pages() - before == 1)
            (folder,) = studio.folder.iterdir()
            assert studio.has_session(folder.name) and len(list(folder.iterdir())) == 2
            press(first.page, "Undo")
            wait_for_pictures(first.page, "#op-drawn", 2)
        wait_until(lambda: len(studio) == 0)
        wait_until(lambda: stored_pages() == before)
        assert list(studio.folder.iterdir()) == []


def test_a_long_task_shows_progress_and_can_be_stopped(address, chromium):
    with visit(chromium, address) as opened:
        page = opened.page
        page.get_by_text("pictures, scored by the judge").click()
        page.locator("#op-trace").click()
        page.locator("#op-status progress").wait_for()
        press(page, "Stop")
        page.get_by_text("Stopped. Results that were finished before are kept.").wait_for()
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
def test_an_ipv6_address_is_printed_in_brackets(host, free_port):
    with (
        open_studio(["icons"], host=host, port=free_port()) as (_, address),
        urllib.request.urlopen(address, timeout=browser.HANG) as answer,
    ):
        assert address.startswith("http://[::1]:")
        assert answer.status == 200


def test_a_password_is_required(address):
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(f"{address}config", timeout=browser.HANG)
    refused.value.close()
    with urllib.request.urlopen(address, timeout=browser.HANG) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert b"openmoji" not in answer.read()
