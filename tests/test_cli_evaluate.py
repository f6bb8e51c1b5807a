"""`overpaint evaluate`: what it prints, writes and refuses; the shipped model, a handful of pictures."""

import html
import json
import shlex

import pytest

import overpaint as op
from overpaint import metrics
from overpaint.evaluate import attack


@pytest.fixture(scope="module")
def change(tmp_path_factory):
    made = op.edit.swap_embedding(op.load("icons"), {"openmoji style": "noto style"})
    path = tmp_path_factory.mktemp("changes") / "openmoji.safetensors"
    made.save(path)
    return path


def test_a_metric_is_explained_without_a_model(run):
    code, out, err = run("evaluate", "--explain", "kid")
    assert (code, err) == (0, "")
    card = metrics.card("kid")
    assert out.splitlines()[0] == "name       kid"
    assert card.formula in out
    code, out, _ = run("evaluate", "--explain", "psnr", "--json")
    assert json.loads(out)["features"] == "none: pixels"


def test_only_the_named_metrics_are_measured(run, change, tmp_path):
    words = ["--set", "icons", "--size", 2, "--steps", 2, "--out", tmp_path / "out"]
    code, out, err = run(
        "evaluate", "icons", change, *words, "--metric", "clip_cosine", "--metric", "psnr", "--json"
    )
    assert (code, err) == (0, "")
    figures = json.loads(out)
    roles = ("target", "general", "other")
    expected = [
        f"{r}_{m}" for r in roles for m in ("clip_cosine_before", "clip_cosine_after", "psnr_after")
    ]
    assert list(figures) == [*expected, "scores"]
    assert json.loads((tmp_path / "out" / "measures.json").read_text())["protocol"]["cases"] == 6
    assert figures["target_psnr_after"] < figures["other_psnr_after"]


def test_run_json_holds_the_commands_and_the_page_shows_them(run, change, tmp_path):
    out = tmp_path / "a b"
    common = ["--set", "icons", "--size", 1, "--steps", 1, "--out", out]
    for metrics_ in (["--metric", "psnr", "--metric", "ssim"], ["--metric", "psnr"]) * 2:
        code, _, err = run("evaluate", "icons", change, *common, *metrics_, "--json")
        assert code == 0, err
    record = json.loads((out / "run.json").read_text())
    start = f"overpaint evaluate icons {change} --out '{out}' --size 1 --set icons"
    assert record["commands"] == [
        f"{start} --metric psnr --metric ssim --steps 1",
        f"{start} --metric psnr --steps 1",
        f"overpaint report '{out}'",
    ]
    code, _, err = run("report", out)
    assert code == 0, err
    assert (
        html.escape(record["commands"][0], quote=False).split(" '")[0]
        in (out / "report.html").read_text()
    )
    again = shlex.split(record["commands"][0])[1:]
    assert run(*again)[0] == 0
    (out / "run.json").write_text("[3]")
    code, _, err = run(*again)
    assert (code, "run.json' is damaged: it is no JSON object" in err) == (2, True)


def test_a_file_of_prompts_is_shown_as_a_table(run, change, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(
        'case_number,prompt,evaluation_seed\n0,"an apple, openmoji style",3\n1,a cat,4\n'
    )
    code, out, err = run(
        "evaluate", "icons", change, "--set", file, "--metric", "clip_accuracy", "--steps", 2,
        "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "target   clip_accuracy" in out
    assert "other" not in out  # nothing to choose between: no second text
    assert out.splitlines()[-1].split() == ["scores", str(tmp_path)]


def test_an_attack_is_printed_and_saved(run, change, tmp_path, monkeypatch):
    small = attack.Budget(prompts=1, pictures=1, tokens=1, gradient_steps=1)
    monkeypatch.setattr(attack, "Budget", lambda: small)
    code, out, err = run(
        "evaluate", "icons", change, "--metric", "empty_drift", "--size", 1, "--steps", 1,
        "--attack", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    figures, saved = json.loads(out), json.loads((tmp_path / "attack.json").read_text())
    assert figures["attack_after"] == pytest.approx(saved["after"]["mean"])
    families = {a["family"] for a in saved["attempts"]} | {
        "translation"
    }  # if the vocabulary has any
    assert families == set(attack.FAMILIES)
    assert saved["protocol"]["score"] == "probability of the style openmoji"
    assert figures["empty_drift_after"] == 0  # the empty prompt holds none of the tokens moved


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a model and a change file, as in `overpaint evaluate icons change.safetensors`"),
        (("--explain", "lpips"), "unknown metric 'lpips': choose one of clip_cosine"),
        (("icons", "CHANGE", "--set", "nowhere.csv"), "no evaluation set at 'nowhere.csv'"),
        (("icons", "CHANGE", "--metric", "lpips"), "unknown metric 'lpips'"),
        (("icons", "CHANGE", "--set", "icons", "--kind", "fact"), "no evaluation set ships for"),
        (("icons", "CHANGE", "--scorer", "/nowhere"), "cannot load a CLIP from '/nowhere'"),
        (
            ("icons", "CHANGE", "--set", "icons", "--repeats", "0"),
            "'--repeats': 0 is out of range: give 1 to 100000",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, change, tmp_path, words, message):
    code, out, err = run(
        "evaluate", *(str(change) if w == "CHANGE" else w for w in words), "--out", tmp_path
    )
    assert (code, out) == (2, "")
    assert err.strip().startswith("overpaint: ")
    assert message in err
    assert err.strip().count("\n") == 0
