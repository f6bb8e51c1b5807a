"""A real Chromium for tests of pages: opens them, and says what is wrong with them.

The browser is the system's own (`chromium`, `chromium-browser`, `google-chrome`, or what `CHROMIUM` names), driven by
playwright; none is ever downloaded. axe-core, which judges accessibility, comes once from npm into `.cache/`, at a
pinned version and SHA-256. Where one of them is missing the test is skipped and says why.

    def test_a_page(chromium):
        with browser.visit(chromium, page, width=390, dark=True) as seen:
            browser.check_whole(seen)

What asks for `axe` is skipped without npm, so let it stand in a test of its own.
"""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CACHE = Path(__file__).parent.parent / ".cache"
AXE = ("4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745")
GRAVE = ("serious", "critical")


@dataclass
class Seen:
    """An open page, and what went wrong in it so far: console errors, and requests to anywhere but its own place."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def launched() -> Iterator[Any]:
    """Give a headless Chromium; skip the test where there is none."""
    path = _executable()
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


@contextmanager
def visit(
    chromium: Any,
    page: str | Path,
    *,
    width: int = 1280,
    height: int = 900,
    dark: bool = False,
    timeout: float = 20,
    **context: Any,
) -> Iterator[Seen]:
    """Open a file or an address in a fresh profile and wait until it has loaded; seconds in `timeout`.

    `context` goes to playwright's `new_context`, as `accept_downloads=True` or `java_script_enabled=False`.
    """
    url = page.resolve().as_uri() if isinstance(page, Path) else page
    profile = chromium.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        **context,
    )
    try:
        profile.set_default_timeout(1000 * timeout)
        seen = Seen(profile.new_page())
        own = url.partition("?")[0].rpartition("/")[0]
        seen.page.on("console", lambda m: seen.errors.append(m.text) if m.type == "error" else None)
        seen.page.on("pageerror", lambda e: seen.errors.append(str(e)))
        seen.page.on(
            "request", lambda r: None if _local(r.url, own) else seen.requests.append(r.url)
        )
        seen.page.goto(url)
        yield seen
    finally:
        profile.close()


def check(seen: Seen, axe: str) -> None:
    """Assert all of: nothing wider than the window, all images there and described, no error, no grave violation."""
    check_accessible(seen.page, axe)
    check_whole(seen)


def check_whole(seen: Seen) -> None:
    """Assert all of: nothing wider than the window, all images there and described, no error in the console."""
    check_width(seen.page)
    check_images(seen.page)
    assert seen.errors == [], f"the console says {seen.errors}"


def check_width(page: Any) -> None:
    """Assert that the page does not scroll sideways; names what is too wide."""
    wide, room, which = page.evaluate(
        """() => {
            const root = document.documentElement, room = root.clientWidth;
            const out = [...document.querySelectorAll('body *')].filter(
                e => e.getBoundingClientRect().right > room + 1);
            return [root.scrollWidth, room, out.slice(-3).map(e => e.outerHTML.slice(0, 120))];
        }"""
    )
    assert wide <= room, f"the page is {wide} px wide in a window of {room}: {which}"


def check_images(page: Any) -> None:
    """Assert that every image that is shown has arrived, has pixels and has a text."""
    bad = page.evaluate(
        """async () => {
            const all = [...document.images];
            for (const i of all) i.loading = 'eager';
            await Promise.all(all.map(i => i.decode().catch(() => null)));
            return all.filter(i => !i.complete || !i.naturalWidth || !i.hasAttribute('alt')
                || (!i.alt.trim() && i.getAttribute('aria-hidden') !== 'true')).map(i => i.outerHTML.slice(0, 120));
        }"""
    )
    assert bad == [], f"images that are absent or have no text: {bad}"


def check_accessible(page: Any, axe: str) -> None:
    """Assert that axe-core finds no serious or critical violation."""
    page.evaluate(axe)
    found = page.evaluate("() => axe.run().then(r => r.violations)")
    grave = [
        (v["id"], v["help"], [n["html"][:120] for n in v["nodes"][:3]])
        for v in found
        if v["impact"] in GRAVE
    ]
    assert grave == [], f"not accessible: {grave}"


def axe_core() -> str:
    """Return the source of axe-core, fetched once; skip the test where npm cannot fetch it.

    Raises:
        ValueError: The archive is not the pinned one.
    """
    version, digest = AXE
    archive = CACHE / f"axe-core-{version}.tgz"
    if not archive.is_file():
        _fetch(f"axe-core@{version}", archive)
    data = archive.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{archive} is not axe-core {version}: delete it and run the test again.")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def _fetch(package: str, archive: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("axe-core comes from npm, which is not installed")
    beside = CACHE / f"npm-{os.getpid()}"
    beside.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "--ignore-scripts", package]
    try:
        subprocess.run(command, cwd=beside, check=True, capture_output=True, timeout=60)
        os.replace(beside / archive.name, archive)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm could not fetch {package}: {error}")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _executable() -> str:
    asked = os.environ.get("CHROMIUM")
    found = next((p for n in ((asked,) if asked else NAMES) if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip(f"no {asked or 'Chromium'} on this machine: install it, or name it in CHROMIUM")
    return found


def _local(url: str, own: str) -> bool:
    return url.startswith((f"{own}/", "data:", "blob:", own.replace("http", "ws", 1)))
