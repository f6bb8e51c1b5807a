import json

import pytest
import torch

from overpaint import demo
from overpaint.edit import Change
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.model import TextToImage

SMALL = demo.Size(text_probes=1, unet_probes=1, trace_steps=1, questions=1, steps=1)


class MeanColorScorer:
    """Classifies a picture by its mean color."""

    name = "mean color"
    card = {"figures": {"object_top1_real": 0.9, "style_top1_real": 0.8}}
    labels = {"object": ("cat", "dog"), "style": ("noto", "openmoji"), "color": ("red", "blue")}

    def classify(self, images, kind):
        return images.flatten(2).mean(2)[:, : len(self.labels[kind])].softmax(1)

    def score(self, images, probes):
        assert len(images) == len(probes)
        return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def demo_run(tiny_sd1, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("not of a demo")
    calls = []
    held_out = frozenset({("cat", "openmoji")})
    model = TextToImage(tiny_sd1.pipe, name=tiny_sd1.name, held_out=held_out)
    before = fingerprint(find_weight(tiny_sd1, "text.0.self_attn.out_proj").parameter)
    summary = demo.run(
        model, out, size=SMALL, scorer=MeanColorScorer(),
        on_progress=lambda *at: calls.append(at),
    )  # fmt: skip
    assert fingerprint(find_weight(tiny_sd1, "text.0.self_attn.out_proj").parameter) == before
    return out, summary, calls


def test_the_folder_holds_the_page_the_figures_and_the_data(demo_run):
    out, _, _ = demo_run
    assert sorted(p.name for p in out.iterdir()) == [
        "change.safetensors", "comparison.json", "drift.json", "gallery.safetensors", "notes", "report.html",
        "report.json", "run.json", "summary.json", "text.parquet", "unet-clean_trajectory.parquet",
        "unet-same_latent.parquet",
    ]  # fmt: skip
    assert (out / "notes" / "mine.txt").read_text() == "not of a demo"
    text = (out / "report.html").read_text()
    for part in (
        "Causal trace of the text encoder",
        "Causal trace of the UNet",
        "Before and after",
        "What the edit did",
        "Predicted against measured",
    ):
        assert part in text


def test_the_summary_is_flat_and_has_every_promised_name(demo_run):
    out, summary, _ = demo_run
    flat = json.loads((out / "summary.json").read_text())
    promised = {
        "object_top1", "style_top1", "object_top1_real", "style_top1_real", "heldout_object_top1",
        "heldout_style_top1", "target_before", "target_after", "others_drop", "objects_drop",
        "edit_seconds", "seconds",
    }  # fmt: skip
    assert promised <= set(flat) == set(summary)
    assert all(value is None or isinstance(value, int | float) for value in flat.values())
    assert flat["object_top1_real"] == 0.9
    assert 0 < flat["edit_seconds"] < flat["seconds"]


def test_the_saved_change_is_the_evaluated_one(demo_run, tiny_sd1):
    change = Change.load(demo_run[0] / "change.safetensors")
    assert change.pairs == {"openmoji style": "noto style"}
    clean = tiny_sd1.encode(["a cat in openmoji style"])
    with change.applied(tiny_sd1):
        assert not torch.equal(tiny_sd1.encode(["a cat in openmoji style"]), clean)


def test_every_stage_reports_its_progress_to_the_end(demo_run):
    ends = {what: (done, total) for done, total, what in demo_run[2]}
    assert [w.partition(",")[0] for w in ends][:4] == [
        "editing", "tracing the text encoder", "tracing the UNet", "tracing the UNet",
    ]  # fmt: skip
    assert ends["tracing the text encoder"][0] == ends["tracing the text encoder"][1]
    assert all(done <= total for done, total in ends.values())
    assert ends["evaluating, random site"][0] == ends["evaluating, random site"][1]


def test_a_concept_without_a_label_is_refused_before_any_work(tiny_sd1, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="has no label for 'monet style'"):
        demo.run(tiny_sd1, out, erase="monet style", scorer=MeanColorScorer(), size=SMALL)
    assert not out.exists()
