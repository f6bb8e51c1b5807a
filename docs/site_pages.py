"""Hooks of `make docs`: pages from the repository's root, their links, and the notation of docstrings.

README.md becomes the start page of the site. Links between the root and docs/ work on the site as they do in the
repository.
"""

import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ADDED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "LICENSE": "LICENSE",
    "NOTICE": "NOTICE",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository's root to those of docs/."""
    root = posixpath.dirname(config.config_file_path)
    for source, place in ADDED.items():
        with open(posixpath.join(root, source), encoding="utf-8") as file:
            files.append(File.generated(config, place, content=file.read()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Return the page with its links pointing to the site's pages instead of the repository's files."""
    here = page.file.src_uri
    source = next((s for s, place in ADDED.items() if place == here), f"docs/{here}")

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        place = ADDED.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(place, posixpath.dirname(here) or ".")

    return LINK.sub(on_site, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Return the page without the Sphinx role `:math:` before equations, which stay as code."""
    return html.replace(":math:<code>", "<code>")
