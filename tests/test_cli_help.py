"""Every verb's help shows worked examples, each on a line of its own, and each of them parses."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from overpaint.cli import app as cli

GROUP = get_command(cli.app)
VERBS = sorted(GROUP.commands)
PACKAGE = Path(cli.__file__).parent.parent


def examples(verb):
    """Return the lines of a verb's help that call it, shell variables taken off."""
    lines = (line.strip() for line in (GROUP.commands[verb].help or "").splitlines())
    calls = [
        line if line.startswith("overpaint") else line.partition(" ")[2]
        for line in lines
        if f"overpaint {verb}" in line
    ]
    return [call for call in calls if call.startswith(f"overpaint {verb}")]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_examples_that_parse(verb, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert examples(verb), f"`overpaint {verb} --help` shows no example"
    for line in examples(verb):
        GROUP.commands[verb].make_context(verb, shlex.split(line)[2:])
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "\\b" not in out
    shown = [line.strip() for line in out.splitlines()]
    assert all(any(line.endswith(call) for line in shown) for call in examples(verb))


@pytest.mark.parametrize("verb", [*VERBS, ""])
def test_the_help_fits_80_columns(verb, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(*filter(None, (verb, "--help")))
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 80] == []


def texts(path):
    """Yield the string literals of a module, with `{}` for the values of f-strings; no docstrings."""
    tree = ast.parse(path.read_text())
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, holders) and ast.get_docstring(n)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            docs |= {id(v) for v in node.values}
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ):
            yield node.value


def options_of(verb):
    parameters = GROUP.commands[verb].params
    return {o for p in parameters for o in (*p.opts, *p.secondary_opts)} | {"--help"}


LIBRARY = [
    path for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent.name not in ("cli", "train", "studio") and path.name != "demo.py"
]  # fmt: skip


def test_advice_of_the_library_names_the_verb_of_each_option():
    """The same check serves several verbs, so an option alone would be advice for a verb that lacks it."""
    for path in LIBRARY:
        for text in texts(path):
            if re.fullmatch(r"--[a-z-]+", text):
                continue  # an argument for another program
            for option in re.finditer(r"(?<![\w-])--[a-z][a-z-]+", text):
                verbs = re.findall(
                    r"(?:overpaint |`)(" + "|".join(VERBS) + r")\b", text[: option.start()]
                )
                assert verbs, f"{path.name}: {option[0]} without a verb in {text!r}"
                assert option[0] in options_of(verbs[-1]), (
                    f"{path.name}: {verbs[-1]} has no {option[0]}"
                )


@pytest.mark.parametrize("verb", VERBS)
def test_messages_of_a_verb_name_its_own_options(verb):
    for text in texts(PACKAGE / "cli" / f"{verb}.py"):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w{-])", text):
            assert option in options_of(verb), f"{verb} has no {option}: {text!r}"


def test_a_demo_of_a_model_of_another_size_names_verbs_for_it(run, tiny_folder, tmp_path):
    code, _, err = run("demo", "--model", tiny_folder, "--out", tmp_path / "d")
    assert code == 2
    assert "`overpaint trace MODEL --scorer CLIP`, or `overpaint evaluate MODEL CHANGE --set" in err
    code, _, err = run("demo", "--erase", "nosuch", "--out", tmp_path / "d")
    assert (code, "`overpaint evaluate MODEL CHANGE --set natural --scorer CLIP`" in err) == (
        2,
        True,
    )


def test_an_unknown_option_is_refused():
    with pytest.raises(Exception, match="--colour"):
        GROUP.commands["load"].make_context("load", ["icons", "--colour", "red"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_verbs(shell):
    """As documented: `overpaint --show-completion` prints what the shell sources, and that names verbs."""
    variables = {
        "_OVERPAINT_COMPLETE": f"complete_{shell}", "COMP_WORDS": "overpaint st", "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "overpaint st", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", "from overpaint.cli.app import app; app(prog_name='overpaint')"],
        capture_output=True, text=True, env={**os.environ, **variables},
    )  # fmt: skip
    assert "studio" in process.stdout, process.stderr
    assert "export" not in process.stdout
