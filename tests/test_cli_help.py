"""Every verb's help shows worked examples, each on a line of its own, and each of them parses."""

import os
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command

from overpaint.cli import app as cli

GROUP = get_command(cli.app)
VERBS = sorted(GROUP.commands)


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
