"""The documentation: its code runs, its links lead to files, its tables and figures equal the results."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

import overpaint as op
from overpaint import zoo

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ROOT_PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [*ROOT_PAGES, ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^```python\n(?:.*?)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)(?:#[^)]*)?\)")
ROOMS = [
    "cli", "demo", "edit", "evaluate", "files", "image_edit", "images", "match", "metrics", "model", "optim", "probes",
    "report", "scorers", "studio", "trace", "zoo",
]  # fmt: skip


def title(path):
    return str(path.relative_to(ROOT))


def program(path):
    """Return the page's code as one program, with the line numbers of the page."""
    text = path.read_text()
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text[: block.start(1)].count("\n")
        for i, line in enumerate(block[1].splitlines()):
            lines[first + i] = line
    return "\n".join(lines)


def printed_by(code, name, folder):
    """Return what `code` prints when it runs in `folder`."""
    stdout = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(stdout):
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
    return stdout.getvalue()


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=title)
def test_the_code_of_a_page_runs_and_prints_the_output_shown(page, tmp_path):
    assert "icons" in zoo.names(), "the zoo has no weights: clone them, or `overpaint train icons`"
    printed = printed_by(program(page), title(page), tmp_path)
    for output in OUTPUT.findall(page.read_text()):
        assert output in printed


def test_a_page_whose_code_prints_something_else_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    (output,) = OUTPUT.findall(page.read_text())
    assert output not in printed_by(program(page), "page.md", tmp_path)


def test_the_commands_of_the_guide_to_editing_run(tmp_path, run):
    text = (DOCS / "guides" / "edit.md").read_text()
    (commands,) = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    with contextlib.chdir(tmp_path):
        for line in commands.splitlines():
            code, _, error = run(*shlex.split(line)[1:])
            assert code == 0, f"{line}: {error}"
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".safetensors"}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_to_files(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{title(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_source_files_named_on_a_page_exist(page):
    names = re.findall(
        r"`((?:overpaint|benchmarks|tests|docs|examples)/[\w/]+\.\w+)`", page.read_text()
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_readme_shows_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert 350 <= len(text.split()) <= 450
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert all(table.count("\n") - 2 <= 5 for table in tables)


def test_every_figure_of_the_readme_is_in_the_results():
    section = (ROOT / "README.md").read_text().split("## Results")[1].split("## Limits")[0]
    results = (DOCS / "results.md").read_text()
    figures = re.findall(
        r"\d+(?:\.\d+)?(?: %)?(?: \[[^\]]*\])?", re.sub(r"SD 1\.4|`[^`]*`", "", section)
    )
    assert len(figures) > 5
    assert [figure for figure in figures if figure not in results] == []


def test_the_results_page_is_what_the_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    make_results = importlib.import_module("make_results")
    assert (DOCS / "results.md").read_text() == make_results.page(), "run docs/make_results.py"


def test_every_listed_error_is_raised_somewhere():
    sources = " ".join(p.read_text() for p in (ROOT / "overpaint").rglob("*.py"))
    joined = re.sub(r'"\s*f?"', "", sources)  # a message may run over several lines of source
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    assert [row for row in rows if row not in joined] == []


def test_nothing_is_installed_from_an_index_under_the_name_of_this_package():
    texts = [*PAGES, *NOTEBOOKS, *(ROOT / "overpaint").rglob("*.py")]
    wrong = re.compile(r"pip install[^\n]*\boverpaint\b")
    assert [title(path) for path in texts if wrong.search(path.read_text())] == []


def test_every_benchmark_is_listed():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = [
        p.name for p in (ROOT / "benchmarks").glob("*.py") if re.match("quality_|speed_", p.name)
    ]
    assert [name for name in scripts if f"| `{name}` |" not in text] == []


def documented(page):
    """Return the full names that an API reference page documents."""
    return set(re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE))


@pytest.mark.parametrize("room", ROOMS)
def test_the_api_reference_has_each_public_name_of_a_room(room):
    module = importlib.import_module(f"overpaint.{room}")
    names = documented(DOCS / "reference" / f"{room}.md")
    assert names == {module.__name__, *(f"{module.__name__}.{name}" for name in module.__all__)}


def test_the_api_reference_has_each_public_name_of_the_package():
    names = set().union(*map(documented, (DOCS / "reference").glob("*.md")))
    last_parts = {name.rpartition(".")[2] for name in names}
    assert [name for name in op.__all__ if name not in last_parts] == []


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    page = (tmp_path / "reference" / "edit.html").read_text()
    assert 'id="overpaint.edit.quickfix"' in page
    assert "https://fonts" not in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=title)
def test_a_notebook_is_valid_and_stored_without_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [c for c in notebook.cells if c.cell_type == "code" and c.outputs] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of jupyter's own event loop
@pytest.mark.parametrize("path", NOTEBOOKS, ids=title)
def test_a_notebook_runs(path, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    settings = {"timeout": 600, "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(notebook, kernel_name="python3", **settings).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)
