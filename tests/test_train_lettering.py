"""The recipe of `lettering`: batches, stages that go on where they stopped, checks by reading, the autoencoder."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from lettering_worlds import small_world
from safetensors import safe_open

from overpaint.cli.train import TrainOptions, _recipe
from overpaint.scene_text import Config, Lettering
from overpaint.scene_text.line import Line
from overpaint.train import lettering, lettering_words
from overpaint.train.lettering_batches import batch, images, place, reading
from overpaint.train.lettering_colors import palette
from overpaint.train.lettering_scenes import STAGES, draw

LINE = Line(width=64)
SMOKE = replace(
    lettering.CPU, config=replace(Config.smoke(), text_length=12), batch=4, checks=4, check_steps=2,
    check_minutes=0.0, half=False,
)  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    pytest.importorskip("rapidocr")
    from overpaint.scorers.text_reader import TextReader

    reader = TextReader()

    def run(recipe=SMOKE, seed=0):
        seen, unseen = small_world(line=LINE), small_world(line=LINE, held_out_words=True)
        return lettering.Run(recipe, tmp_path, seen, unseen, seed, "cpu", reader)

    return run


def minutes_spent(checkpoint):
    with safe_open(checkpoint, framework="pt") as file:
        return json.loads(file.metadata()["progress"])["spent"] / 60


def test_a_batch_holds_what_the_samples_say():
    world = small_world(line=LINE)
    samples = [draw(world, STAGES["photographs"], 0, i) for i in range(5)]
    network = Lettering.build(SMOKE.config).network
    rows = batch(network, samples)
    pixels = torch.from_numpy(samples[2].image).permute(2, 0, 1).float()
    assert torch.allclose(rows.images[2] * 127.5 + 127.5, pixels, atol=1e-3)
    for row, sample in enumerate(samples):
        count = len(sample.text)
        assert rows.edges.valid[row].sum() == count == rows.texts.counts[row]
        assert torch.equal(rows.edges.right[row, :count], torch.from_numpy(sample.edges[1:]))
        assert float(rows.place.end[row]) == pytest.approx(float(sample.edges[-1]))
    assert torch.equal(
        rows.mask[:, 0].bool(), torch.from_numpy(np.stack([s.mask for s in samples]))
    )
    assert torch.equal(place(samples).start, rows.place.start) and images(samples).shape == (
        5,
        3,
        32,
        64,
    )


def test_reading_counts_words_with_and_without_case():
    result = reading(["Ab", "cd", "xx"], ["Ab", "CD", "ab"])
    assert result["words"] == pytest.approx(1 / 3) and result["words_any_case"] == pytest.approx(
        2 / 3
    )
    assert result["similarity"] == pytest.approx(2 / 3)


def test_the_instructions_of_training_are_read_as_names_and_not_as_letters():
    config = lettering.styles(SMOKE.config, ["Lato-BoldItalic", "BadScript"])
    tokenizer = Lettering.build(config).network.tokenizer
    split = tokenizer.split('Write "x" in font: BadScript-BoldItalic and color: sea green')
    assert split[-9:] == ["bad", "script", "-", "bold", "italic", "and", "color", ":", "sea"][
        -8:
    ] + ["green"]
    assert config.colors == palette().names


def test_the_loss_of_a_step_is_the_same_in_every_run(make_run):
    first, second, other = make_run(), make_run(), make_run(seed=1)
    losses = [float(run.loss("fonts")(7).detach()) for run in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != float(first.loss("fonts")(8).detach())


def test_the_loss_in_bfloat16_is_nearly_that_in_float32(make_run):
    run = make_run()
    torch.nn.init.normal_(run.model.network.unet.conv_out.weight, std=0.1)
    assert not run.half
    exact = float(run.loss("fonts")(3).detach())
    run.half = True
    assert float(run.loss("fonts")(3).detach()) == pytest.approx(exact, rel=0.03)


def test_a_stage_goes_on_where_it_stopped_and_is_checked_by_reading(make_run, tmp_path):
    run = make_run()
    run.train_stage("grey", 0.01)
    lines = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    first = lines[-1]
    assert (
        first["stage"] == "grey"
        and first["samples"] == 4 * first["step"]
        and not first["gate_passed"]
    )
    assert first["ceiling_any_case"] >= 0.5 and 0 <= first["words"] <= 1
    assert (tmp_path / "sheet-grey.png").is_file()
    shipped = Lettering.load(tmp_path / "zoo")
    assert shipped.config.line == LINE
    assert torch.equal(
        shipped.network.unet.conv_in.weight, run.model.network.unet.conv_in.weight.half().float()
    )
    written = json.loads((tmp_path / "zoo" / "card.json").read_text())
    assert written["figures"]["grey_step"] == first["step"] == written["stages"]["grey"]["steps"]
    again = make_run()
    again.train_stage("grey", 0.01)  # its time is spent: the averaged weights of the checkpoint
    for name, value in run.model.network.state_dict().items():
        assert torch.equal(again.model.network.state_dict()[name], value), name
    assert len((tmp_path / "checks.jsonl").read_text().splitlines()) == len(lines)
    again.train_stage("grey", minutes_spent(tmp_path / "grey.safetensors") + 0.005)
    later = json.loads((tmp_path / "checks.jsonl").read_text().splitlines()[-1])
    assert later["step"] > first["step"]


def test_a_check_reads_held_out_words_of_each_length(make_run):
    run = make_run(replace(SMOKE, checks=14))
    for stage in lettering.GATES:
        lines = run.held_out(stage)
        assert sorted(len(line.text) for line in lines) == sorted([*range(2, 9)] * 2)
        assert all(lettering_words.is_held_out(line.text) for line in lines)
        assert all(line.text.islower() for line in lines) is STAGES[stage].is_plain
        assert [line.text for line in lines] == [line.text for line in run.held_out(stage)]


def test_the_next_check_waits_nine_times_as_long_as_the_last_one_took(make_run, tmp_path):
    """On a busy machine a check takes long, and the training should not spend its time on them."""
    run = make_run()
    run.checked, run.check_seconds = time.monotonic() - 10.0, 100.0
    run._maybe_check("grey", 1)
    assert not (tmp_path / "checks.jsonl").exists()
    run.check_seconds = 1.0
    run.train_stage("grey", 0.0001)
    assert (tmp_path / "checks.jsonl").exists() and run.check_seconds > 0


def test_the_autoencoder_is_trained_first_and_then_frozen(make_run):
    recipe = replace(SMOKE, config=replace(SMOKE.config, codec="autoencoder"))
    run = make_run(recipe)
    before = run.round_trip("grey")["similarity"]
    run.train_autoencoder(0.03)
    assert not any(p.requires_grad for p in run.model.network.codec.parameters())
    weights = {n: p.clone() for n, p in run.model.network.codec.named_parameters()}
    run.train_stage("grey", 0.005)
    assert all(torch.equal(p, weights[n]) for n, p in run.model.network.codec.named_parameters())
    assert 0 <= before <= 1


def test_luma_and_half_size_chroma_keep_the_letters(make_run):
    truth = make_run().round_trip("single")
    pixels = make_run(replace(SMOKE, config=replace(SMOKE.config, codec="rgb"))).round_trip(
        "single"
    )
    assert truth["similarity"] >= pixels["similarity"] - 0.05 and pixels["similarity"] > 0.8


def test_unknown_stages_and_options_of_other_models_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="no stage 'color': choose from grey, single, fonts, photographs"
    ):
        lettering.train(out=tmp_path / "model", stages=("color",), work=tmp_path)
    with pytest.raises(ValueError, match="`--stage` is for lettering: leave it out for icons"):
        _recipe("icons", TrainOptions(stage=["grey"]))
    assert _recipe("lettering", TrainOptions(stage=["grey"])).keywords["stages"] == ["grey"]


@pytest.fixture
def without_downloads(monkeypatch):
    pytest.importorskip("rapidocr")

    def small(_faces, _photos, split="training"):
        return small_world(line=LINE, held_out_words=split != "training")

    monkeypatch.setattr(lettering.lettering_fonts, "fetch", lambda folder: None)
    monkeypatch.setattr(lettering.lettering_fonts, "load", lambda folder: [])
    monkeypatch.setattr(lettering.photographs, "fetch", lambda folder: None)
    monkeypatch.setattr(lettering, "world", small)


@pytest.mark.usefixtures("without_downloads")
def test_stages_run_in_order_whether_their_gates_are_passed_or_not_and_go_on_at_the_last(tmp_path):
    def train(minutes, **options):
        folder = lettering.train(
            out=tmp_path / "model", work=tmp_path / "work", minutes=minutes, recipe=SMOKE, stages=("single", "grey"),
            **options,
        )  # fmt: skip
        return json.loads((folder / "card.json").read_text())

    first = train(0.02)
    lines = (tmp_path / "work" / "checks.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in lines]
    assert sorted(stages) == stages and set(stages) == {"grey", "single"}
    assert not json.loads(lines[-1])["gate_passed"]
    assert list(first["stages"]) == ["grey", "single"]
    assert first["figures"]["single_step"] == first["stages"]["single"]["steps"]
    assert Lettering.load(tmp_path / "model").config.line == LINE
    later = train(1.2 * minutes_spent(tmp_path / "work" / "single.safetensors") + 0.01)
    assert later["stages"]["grey"] == first["stages"]["grey"]  # only the last stage goes on
    assert later["stages"]["single"]["steps"] > first["stages"]["single"]["steps"]
    train(0.01, resume=False)
    assert len((tmp_path / "work" / "checks.jsonl").read_text().splitlines()) == len(lines) == 2
