"""Every Python block of the README and of docs/ runs, page by page from top to bottom."""

import contextlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from overpaint import cli, zoo

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)(?:#[^)]*)?\)")


def title(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    """Return the page's code as one program, with the line numbers of the page."""
    text = path.read_text()
    lines = [""] * (text.count("\n") + 1)
    for found in BLOCK.finditer(text):
        first = text[: found.start(1)].count("\n")
        for i, line in enumerate(found[1].splitlines()):
            lines[first + i] = line
    return "\n".join(lines)


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=title)
def test_the_code_of_a_page_runs(page, tmp_path):
    assert "icons" in zoo.names(), "the zoo has no weights: clone them, or `overpaint train icons`"
    with contextlib.chdir(tmp_path):
        exec(compile(blocks(page), title(page), "exec"), {"__name__": "__main__"})
    assert os.getcwd() != str(tmp_path)


def test_the_commands_of_the_guide_to_editing_run(tmp_path, capsys):
    text = (ROOT / "docs" / "guides" / "edit.md").read_text()
    (found,) = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    with contextlib.chdir(tmp_path):
        for line in found.splitlines():
            with pytest.raises(SystemExit) as left:
                cli.main(shlex.split(line)[1:])
            assert left.value.code == 0, f"{line}: {capsys.readouterr().err}"
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".safetensors"}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{title(page)} links to {target}"


def test_the_readme_shows_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


def test_every_listed_error_is_raised_somewhere():
    sources = " ".join(p.read_text() for p in (ROOT / "overpaint").rglob("*.py"))
    joined = re.sub(r'"\s*f?"', "", sources)  # a message may run over several lines of source
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    assert [row for row in rows if row not in joined] == []


def last_table():
    """Return the last part of the benchmarks' README: a line a script of what it found last."""
    rows = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        found = json.loads(path.read_text())
        found = found.get("result") or found.get("figures") or found
        told = (f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, int | float))
        rows.append(f"| `{path.stem}` | {', '.join(told)} |\n")
    return "| benchmark | figures of the last full run |\n|---|---|\n" + "".join(rows)


def test_the_readme_of_the_benchmarks_shows_what_they_found_last():
    shown = (ROOT / "benchmarks" / "README.md").read_text()
    assert shown.endswith(last_table()), f"let it end with:\n{last_table()}"
