"""An empty text where a file, a folder or a model is named is refused by the name of the option or argument."""

import contextlib
import typing
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import overpaint as op
from overpaint import evaluate, match, report, trace
from overpaint.cli import app as cli
from overpaint.edit import export
from overpaint.edit.pairs_file import load_pairs
from overpaint.evaluate import predicted_drift
from overpaint.match import backbone, flow
from overpaint.match.matcher import Matcher
from overpaint.scorers import Clip
from overpaint.studio.server import check_models
from overpaint.trace import Effects, resume

GROUP = get_command(cli.app)
MESSAGE = "is empty: name a file or folder; '.' is the current folder"
NAMED_BY_TEXT = ("model", "models", "scorer", "cases", "matcher")


def names_a_place(verb, parameter):
    kinds = typing.get_type_hints(GROUP.commands[verb].callback)
    kind = kinds.get(parameter.name)
    if verb == "train" and parameter.name == "model":  # a recipe
        return False
    return parameter.name in NAMED_BY_TEXT or kind in (Path, Path | None)


PLACES = [
    (verb, parameter)
    for verb, command in GROUP.commands.items()
    for parameter in command.params
    if names_a_place(verb, parameter)
]


@pytest.mark.parametrize(("verb", "parameter"), PLACES, ids=lambda x: getattr(x, "name", x))
def test_every_option_that_names_a_place_refuses_an_empty_text(
    run, verb, parameter, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = []
    for other in GROUP.commands[verb].params:
        text = "" if other is parameter else "x.safetensors"
        if other.param_type_name == "argument":
            words.append(text)
        elif other is parameter or other.required:
            words += [other.opts[0], text]
    code, out, err = run(verb, *words)
    assert (code, out) == (2, "")
    assert MESSAGE in err
    assert parameter.name.lower() in err.lower() or parameter.opts[0] in err
    assert list(tmp_path.iterdir()) == []


def test_options_that_name_a_place_are_known():
    """A verb with a new path is tested above; this count shows that the selection has not become empty."""
    assert len(PLACES) > 35


CALLS = {
    "load": lambda m, c, e: op.load(""),
    "trace": lambda m, c, e: trace.text_encoder(m, op.probes.load("style")[:1], generate=False, folder=" "),
    "resume": lambda m, c, e: resume.read(""),
    "effects save": lambda m, c, e: e.save(""),
    "effects load": lambda m, c, e: Effects.load(""),
    "change save": lambda m, c, e: c.save(""),
    "change load": lambda m, c, e: op.Change.load("\t"),
    "lora": lambda m, c, e: export.lora(c, "", model=m),
    "single file": lambda m, c, e: export.single_file(m, c, ""),
    "folder": lambda m, c, e: export.folder(m, c, ""),
    "pairs": lambda m, c, e: load_pairs(""),
    "probes": lambda m, c, e: op.probes.load_file("", kind="style"),
    "set": lambda m, c, e: op.probes.load_set("", erase="cat"),
    "judge": lambda m, c, e: op.scorers.load(""),
    "clip": lambda m, c, e: Clip(""),
    "report": lambda m, c, e: report.save(""),
    "page": lambda m, c, e: report.save(".", out=""),
    "card": lambda m, c, e: report.save_card("", "."),
    "comparison": lambda m, c, e: evaluate.Comparison.load(""),
    "measures": lambda m, c, e: evaluate.Measures.load(""),
    "measures save": lambda m, c, e: evaluate.Measures("a", "b", "c", (), {}).save(""),
    "drift": lambda m, c, e: predicted_drift.load(""),
    "drift save": lambda m, c, e: predicted_drift.save({}, ""),
    "matcher": lambda m, c, e: Matcher.load(""),
    "backbone": lambda m, c, e: backbone.load(""),
    "flow": lambda m, c, e: flow.read_flo(""),
    "flow write": lambda m, c, e: flow.write_flo("", torch.zeros(2, 3, 3)),
    "picture": lambda m, c, e: match.dense("", "b.png"),
    "pictures": lambda m, c, e: m.generate(["a cat"], steps=1).save(""),
    "studio": lambda m, c, e: check_models([""]),
}  # fmt: skip


@pytest.fixture(scope="module")
def effects(tiny_sd1):
    return trace.text_encoder(tiny_sd1, op.probes.load("style")[:1], generate=False)


@pytest.mark.parametrize("name", CALLS)
def test_every_function_refuses_an_empty_path(
    tiny_sd1, quickfix_change, effects, name, tmp_path, monkeypatch
):
    with contextlib.chdir(tmp_path), pytest.raises(ValueError, match=rf"`\w+` {MESSAGE}"):
        CALLS[name](tiny_sd1, quickfix_change, effects)
    assert list(tmp_path.iterdir()) == []
