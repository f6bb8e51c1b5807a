"""The edit as a technique of the benchmark `eval-unlearn`: the entry point, pictures, seeds, and bad configurations."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

import overpaint
from overpaint import edit
from overpaint.evaluate.unlearning_technique import UnlearningTechnique

PROMPTS = ["a cat in blob style", "a dog"]


@pytest.fixture(scope="module")
def config(tiny_folder):
    return {
        "erase_concept": "blob style", "replace": "noto style", "model": str(tiny_folder),
        "method": "quickfix", "device": "cpu", "num_inference_steps": 2,
    }  # fmt: skip


def pixels(pictures):
    return [np.asarray(picture) for picture in pictures]


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(pixels(left), pixels(right), strict=True))


def test_the_entry_point_generates_pictures_of_the_edited_model(config, tiny_folder):
    (point,) = entry_points(group="eval_unlearn.techniques", name="overpaint")
    technique = point.load()(**json.loads(json.dumps(config)))
    pictures = technique.generate(prompts=PROMPTS, seed=5)
    model = overpaint.load(tiny_folder)
    with edit.quickfix(model, {"blob style": "noto style"}).applied(model):
        expected = model.generate(PROMPTS, seed=[5, 6], steps=2).pil()
    assert [(p.mode, p.size) for p in pictures] == [("RGB", (16, 16))] * 2
    assert same(pictures, expected)
    assert not same(pictures, model.generate(PROMPTS, seed=[5, 6], steps=2).pil())


def test_without_a_seed_pictures_count_up_over_all_calls(config):
    technique = UnlearningTechnique(**config, seed=3)
    single = [technique.generate([prompt])[0] for prompt in ("a dog", "a dog", "a cat")]
    again = technique.generate(["a dog", "a dog", "a cat"], seed=3)
    assert same(single, again)
    assert not same(single[:1], single[1:2])
    assert technique.generate([]) == []


def test_settings_of_a_call_go_before_those_of_the_configuration(config):
    technique = UnlearningTechnique(**config, guidance_scale=1.0)
    plain = technique.generate(PROMPTS, seed=0)
    other = technique.generate(PROMPTS, seed=0, num_inference_steps=3, guidance_scale=5.0)
    expected = technique.model.generate(PROMPTS, seed=[0, 1], steps=3, guidance_scale=5.0).pil()
    assert same(other, expected) and not same(plain, other)


def test_a_change_file_is_applied_as_it_is(config, tiny_sd1, tmp_path):
    change = edit.swap_embedding(tiny_sd1, {"blob style": "noto style"})
    path = str(tmp_path / "c.safetensors")
    change.save(path)
    with pytest.raises(ValueError, match="`any_token` make a new one: leave those out"):
        UnlearningTechnique(**config, change=path)
    config = {k: v for k, v in config.items() if k not in ("replace", "method")}
    technique = UnlearningTechnique(**config, change=path)
    assert technique.change.digest == change.digest and change.is_applied(technique.model)
    with pytest.raises(ValueError, match="the change file erases blob style, not 'dog': name one"):
        UnlearningTechnique(**{**config, "erase_concept": "dog"}, change=path)


@pytest.mark.parametrize(("method", "concept"), [("rename", "mucha"), ("uce", "van gogh")])
def test_other_methods_edit_the_model(config, real_vocabulary, method, concept):
    settings = {**config, "model": str(real_vocabulary("sd1")), "erase_concept": concept}
    technique = UnlearningTechnique(**{**settings, "method": method, "replace": "monet"})
    assert technique.change.protocol["method"] == method
    assert technique.change.is_applied(technique.model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"erase_concept": " "}, "`erase_concept` is empty: name the concept to erase"),
        ({"method": "esd"}, "unknown method 'esd': choose one of auto, quickfix, rename, uce"),
        ({"method": "rename", "preserve": ["a"]}, "`rename` takes no preserve list, as it moves"),
        ({"seed": -1}, "`seed` must be an integer from 0"),
    ],
)
def test_bad_settings_are_named(config, settings, message):
    with pytest.raises(ValueError, match=message):
        UnlearningTechnique(**{**config, **settings})


def test_unknown_settings_and_lists_of_concepts_are_refused(config):
    with pytest.raises(TypeError, match="'train_method'"):
        UnlearningTechnique(**config, train_method="noxattn")
    with pytest.raises(TypeError, match="erase_concept must be one text, got .*: name one concept"):
        UnlearningTechnique(**{**config, "erase_concept": ["a", "b"]})


METRIC = '''
"""A metric of the test: the share of pictures in which icons-judge sees a dog."""

from eval_unlearn.types import Dataset, MetricResult


class Dogs:
    def __init__(self, prompts):
        from overpaint import scorers

        self.judge, self.prompts, self.scores = scorers.load(), prompts, []

    def load_dataset(self):
        return [Dataset(prompts=self.prompts, metadata={"source": "test"})]

    def update(self, images, prompts, metadata=None):
        import numpy as np
        import torch

        for image in images:
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
            column = list(self.judge.labels["object"]).index("dog")
            self.scores.append(float(self.judge.classify(pixels, "object")[0, column]))

    def compute(self):
        return MetricResult("dogs", sum(self.scores) / len(self.scores), {"scores": self.scores})
'''


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("eval_unlearn") is None, reason="needs the extra `eval`"
)
def test_the_benchmarks_own_command_runs_the_technique_on_icons(tmp_path):
    """Its metrics download their models, so the metric is a plugin of this test; the command and the runner are its."""
    plugin = tmp_path / "plugin"
    info = plugin / "dogs-1.0.dist-info"
    info.mkdir(parents=True)
    (plugin / "dogs.py").write_text(METRIC)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dogs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[eval_unlearn.metrics]\ndogs = dogs:Dogs\n")
    command = Path(sys.executable).parent / "eval-unlearn"
    environment = {**os.environ, "PYTHONPATH": str(plugin)}
    prompts = ["a dog", "a picture of a dog", "a dog in noto style", "a dog in twemoji style"]
    values = {}
    for name, settings in (("edited", {}), ("not", {"erase_concept": "bomb"})):
        technique = {
            "erase_concept": "dog", "replace": "cat", "model": "icons", "method": "quickfix",
            "device": "cpu", "num_inference_steps": 8, **settings,
        }  # fmt: skip
        content = {
            "output_dir": str(tmp_path / name),
            "technique": {"name": "overpaint", "config": technique},
            "metrics": [{"name": "dogs", "config": {"prompts": prompts}}],
        }
        (tmp_path / "config.json").write_text(json.dumps(content))
        arguments = [command, "run", "--config", tmp_path / "config.json"]
        run = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        (latest,) = (tmp_path / name).glob("overpaint_*_latest_report.json")
        report = json.loads(latest.read_text())
        values[name] = report["metric_results"]["dogs"]["value"]
        assert len(list((tmp_path / name).rglob("*.png"))) == len(prompts)
        assert report["erase_concept"] == technique["erase_concept"]
    assert values["edited"] < values["not"] / 2, values
    plugins = subprocess.run([command, "plugins"], env=environment, capture_output=True, text=True)
    assert "overpaint" in plugins.stdout.split()
