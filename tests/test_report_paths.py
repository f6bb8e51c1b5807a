"""Results hold no paths of the machine that made them; commands stay as they were typed."""

import json

import torch
from test_evaluate import ColorClassifier
from test_report import effect

from overpaint import edit, evaluate, files, load, report
from overpaint.scorers.protocols import scorer_name
from overpaint.trace import Effects


def test_a_public_name_has_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert files.public_name("icons") == "icons"
    assert files.public_name("stabilityai/sd-turbo") == "stabilityai/sd-turbo"
    assert files.public_name("runs/mine") == "mine"  # a folder that exists is no hub id
    assert (
        files.public_name(tmp_path / "runs" / "mine")
        == files.public_name(f"{tmp_path}/runs/mine/")
        == "mine"
    )
    assert files.public_name(".") == tmp_path.name


def test_protocols_name_the_model_and_the_scorer_without_their_folders(tiny_folder, tmp_path):
    model = load(tiny_folder)
    scorer = ColorClassifier()
    scorer.name = str(tiny_folder)
    assert scorer_name(scorer) == tiny_folder.name
    change = edit.swap_embedding(model, {"blob style": "noto style"})
    result = evaluate.compare(model, {"swap": change}, scorer=scorer, size=1, steps=1)
    result.save(tmp_path)
    drawn = model.generate("a cat", steps=1)
    drawn.save(tmp_path)
    report.save(tmp_path)
    for name in ("comparison.json", "pictures.json", "report.json", "report.html"):
        text = (tmp_path / name).read_text()
        # the page repeats the command, with the folder as it was given
        assert str(tiny_folder.parent) not in text
        assert tiny_folder.name in text
    assert drawn.images.dtype == torch.float32


def test_the_page_of_an_earlier_result_shows_no_absolute_path(tmp_path):
    rows = [effect("text.0.mlp", "text", "mlp", 0, "eos", 0.5)]
    Effects.of(rows, {}).save(tmp_path / "text.parquet")
    command = "overpaint demo --model /home/me/models/mine --out /home/me/out"
    protocol = {
        "Model": "/home/me/models/mine",
        "Judge": "C:\\Users\\me\\clip",
        "Seed": 0,
        "Note": "a/b",
    }
    (tmp_path / "run.json").write_text(json.dumps({"commands": [command], "protocol": protocol}))
    words = json.loads(report.save(tmp_path).with_suffix(".json").read_text())
    assert words["protocol"]["The run"] == {
        "Model": "mine",
        "Judge": "clip",
        "Seed": 0,
        "Note": "a/b",
    }
    assert words["commands"] == [command]
