"""Programs killed by SIGKILL before each of their renames: old files or new ones, and no drafts after the next run."""

import json
import os
import signal
import traceback
from pathlib import Path

import matchers
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from test_fuzz import write_results
from test_train_card import recipes  # noqa: F401  # a fixture

from overpaint import files
from overpaint.cli import app
from overpaint.edit import Change
from overpaint.match import flow

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def in_child(function, *, kill_before=0):
    """Call the function in another process; end it by SIGKILL before its rename of this number, if it is not 0.

    Returns:
        The exit status: 0, or minus the number of the signal.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            rename, calls = os.replace, []

            def replace(source, target):
                calls.append(target)
                if len(calls) == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(source, target)

            files.os.replace = replace
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status if isinstance(status, int) else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hidden(folder):
    return [str(p) for p in folder.rglob(".*")]


@pytest.fixture
def verbs(tiny_folder, tmp_path):
    """For each verb: its arguments, how many renames it takes, and a function that checks the complete result."""
    out, given = tmp_path / "out", tmp_path / "given"
    given.mkdir()
    out.mkdir()
    for name in ("a", "b"):
        Image.fromarray((matchers.texture(40, 50)[0] * 255).byte().numpy()).save(
            given / f"{name}.png"
        )
    matchers.build_random().save(given / "matcher")
    change = given / "c.safetensors"
    edit = ("edit", tiny_folder, "--erase", "cat", "--replace", "dog", "--force", "--out")
    assert app._run([str(a) for a in (*edit, change)]) == 0
    pair = (given / "a.png", given / "b.png", "--matcher", given / "matcher")
    pair = (*pair, "--samples", "1", "--steps", "1")
    return {
        "edit": (*edit, out / "c.safetensors"),
        "export": ("export", tiny_folder, change, "--format", "folder", "--out", out / "model"),
        "lora": ("export", tiny_folder, change, "--force", "--out", out / "lora.safetensors"),
        "trace": ("trace", tiny_folder, "--features-only", "--limit", "1", "--steps", "1", "--out", out),
        "match": ("match", *pair, "--force", "--out", out),
        "generate": ("generate", tiny_folder, "a cat", "a dog", "--steps", "1", "--force", "--out", out),
        "report": ("report", out),
    }  # fmt: skip


READ = {
    "edit": lambda out: Change.load(out / "c.safetensors"),
    "export": lambda out: json.loads((out / "model" / "model_index.json").read_text()),
    "lora": lambda out: safe_open(out / "lora.safetensors", framework="pt").keys(),
    "trace": lambda out: (out / "text.parquet").stat(),
    "match": lambda out: (flow.read_flo(out / "flow.flo"), Image.open(out / "arrows.png").load()),
    "generate": lambda out: [Image.open(out / f"000{i}.png").load() for i in range(2)],
    "report": lambda out: json.loads((out / "report.json").read_text()),
}


@pytest.mark.parametrize(
    "name",
    ["edit", "lora", "report",
     *(pytest.param(n, marks=pytest.mark.slow) for n in ("export", "trace", "match", "generate"))],
)  # fmt: skip
def test_a_verb_killed_before_any_rename_leaves_no_draft_after_the_next_run(verbs, tmp_path, name):
    out = tmp_path / "out"
    if name == "report":
        write_results(out)
    command = [str(a) for a in verbs[name]]

    def run():
        torch.set_num_threads(1)
        return app._run(command)

    kills = 0
    while in_child(run, kill_before=kills + 1) == -signal.SIGKILL:
        kills += 1
        for path in out.rglob("*"):  # what has its final name is complete
            if path.suffix == ".json" and not any(part.startswith(".") for part in path.parts):
                json.loads(path.read_text())
        assert hidden(out)
    assert kills
    assert hidden(out) == []
    READ[name](out)


@pytest.mark.slow
def test_a_training_killed_before_any_rename_is_resumed_by_the_next(recipes, tmp_path):  # noqa: F811
    train = recipes["matcher"]
    kills = 0
    while in_child(lambda: train(tmp_path) and 0, kill_before=1) == -signal.SIGKILL and kills < 3:
        kills += 1  # killed again and again before its first rename
    for number in range(1, 40):
        status = in_child(lambda: train(tmp_path) and 0, kill_before=number)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0
    assert hidden(Path(tmp_path)) == []
    saved = json.loads((tmp_path / "model" / "card.json").read_text())
    assert set(saved["sha256"]) >= {"config.json", "coarse.safetensors", "fine.safetensors"}
