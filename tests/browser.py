"""A real Chromium for tests of pages, and checks of an open page.

The browser is the system's own (`chromium`, `chromium-browser`, `google-chrome`, or the path in `CHROMIUM`), driven by
playwright; none is downloaded. axe-core, which checks accessibility, is fetched once from npm into `.cache/`, at a
pinned version and SHA-256. Where one of them is missing the test is skipped with the reason.

    def test_a_page(chromium):
        with browser.visit(chromium, page, width=390, dark=True) as seen:
            browser.check_whole(seen)

A test that uses the fixture `axe` is skipped without npm, so put such checks into tests of their own.
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
SEVERE = ("serious", "critical")
HANG = float(
    os.environ.get("OVERPAINT_TEST_HANG", 300)
)  # seconds; bounds a hang only, also on a busy machine


@dataclass
class Visit:
    """An open page.

    Attributes:
        page: Playwright's page.
        errors: Errors in its console so far.
        requests: Addresses of requests to other servers or folders so far.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def launched() -> Iterator[Any]:
    """Yield a headless Chromium; skip the test if there is none."""
    path = _executable()
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        options = {"executable_path": path, "args": ["--no-sandbox"], "timeout": 1000 * HANG}
        chromium = driver.chromium.launch(**options)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def visit(
    chromium: Any,
    page: str | Path,
    *,
    width: int = 1280,
    height: int = 900,
    dark: bool = False,
    timeout: float = HANG,
    **context: Any,
) -> Iterator[Visit]:
    """Open a file or an address in a new profile and wait until it is loaded.

    Args:
        chromium: A browser of `launched`.
        page: The file or address.
        width: Of the window, in pixels.
        height: Of the window, in pixels.
        dark: Prefer dark colors.
        timeout: Seconds after which a wait fails.
        context: Options of playwright's `new_context`, for example `accept_downloads=True`.
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
        opened = Visit(profile.new_page())
        folder = url.partition("?")[0].rpartition("/")[0]
        opened.page.on(
            "console", lambda m: opened.errors.append(m.text) if m.type == "error" else None
        )
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on(
            "request",
            lambda r: None if _is_local(r.url, folder) else opened.requests.append(r.url),
        )
        opened.page.goto(url)
        yield opened
    finally:
        profile.close()


def check(visit: Visit, axe: str) -> None:
    """Run `check_accessible` and `check_whole`."""
    check_accessible(visit.page, axe)
    check_whole(visit)


def check_whole(visit: Visit) -> None:
    """Assert that nothing is wider than the window, all images are loaded and described, and no error was logged."""
    check_width(visit.page)
    check_images(visit.page)
    assert visit.errors == [], f"errors in the console: {visit.errors}"


def check_width(page: Any) -> None:
    """Assert that the page does not scroll sideways; the message names the elements that are too wide."""
    width, available, elements = page.evaluate(
        """() => {
            const root = document.documentElement, available = root.clientWidth;
            const wide = [...document.querySelectorAll('body *')].filter(
                e => e.getBoundingClientRect().right > available + 1);
            return [root.scrollWidth, available, wide.slice(-3).map(e => e.outerHTML.slice(0, 120))];
        }"""
    )
    assert width <= available, f"the page is {width} px wide in a window of {available}: {elements}"


def check_images(page: Any) -> None:
    """Assert that every image is loaded, is not empty and has an alternative text."""
    faulty = page.evaluate(
        """async () => {
            const all = [...document.images];
            for (const i of all) i.loading = 'eager';
            await Promise.all(all.map(i => i.decode().catch(() => null)));
            return all.filter(i => !i.complete || !i.naturalWidth || !i.hasAttribute('alt')
                || (!i.alt.trim() && i.getAttribute('aria-hidden') !== 'true')).map(i => i.outerHTML.slice(0, 120));
        }"""
    )
    assert faulty == [], f"images that are not loaded or have no text: {faulty}"


def check_accessible(page: Any, axe: str) -> None:
    """Assert that axe-core reports no serious or critical violation."""
    page.evaluate(axe)
    violations = page.evaluate("() => axe.run().then(r => r.violations)")
    severe = [
        (v["id"], v["help"], [n["html"][:120] for n in v["nodes"][:3]])
        for v in violations
        if v["impact"] in SEVERE
    ]
    assert severe == [], f"not accessible: {severe}"


def axe_core() -> str:
    """Return the source of axe-core, which is fetched once; skip the test if npm cannot fetch it.

    Raises:
        ValueError: The archive has another SHA-256 than the pinned one.
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
        pytest.skip("axe-core is fetched with npm, which is not installed")
    folder = CACHE / f"npm-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "--ignore-scripts", package]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
        os.replace(folder / archive.name, archive)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm could not fetch {package}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _executable() -> str:
    chosen = os.environ.get("CHROMIUM")
    names = (chosen,) if chosen else NAMES
    path = next((path for name in names if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip(
            f"no {chosen or 'Chromium'} on this machine: install it, or set CHROMIUM to its path"
        )
    return path


def _is_local(url: str, folder: str) -> bool:
    return url.startswith((f"{folder}/", "data:", "blob:", folder.replace("http", "ws", 1)))
