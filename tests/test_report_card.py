"""The model card of an edited model: read with the hub's own reader, and with hostile names on it."""

import re

import pytest
from huggingface_hub import ModelCard
from test_report import scores

import overpaint
from overpaint import edit, report
from overpaint.edit import export
from overpaint.edit.export import model_card
from overpaint.evaluate.results import Comparison
from overpaint.report.model_card import add_scores

EVIL = "<script>alert(1)</script> | `x` **b**\n## Evaluation"


@pytest.fixture(scope="module")
def change(tiny_sd1):
    return edit.quickfix(tiny_sd1, {"van gogh": "painting"})


@pytest.fixture
def comparison():
    by_method = {"no edit": scores("no edit", 0.9), "change": scores("change", 0.02)}
    return Comparison(by_method, {}, (), {})


def test_an_exported_folder_has_a_card_that_the_hub_reads(tiny_sd1, change, tmp_path):
    folder = export.folder(tiny_sd1, change, tmp_path / "out")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None  # a pipeline in memory has no hub id
    for text in (
        "edited: van gogh → painting",
        "| van gogh | painting |",
        f"`{change.site}`",
        change.digest,
        "Diff-QuickFix (Basu et al., 2024)",
        "no protection against deliberate attempts",
    ):
        assert text in card.text
    overpaint.load(str(folder))  # the card is in no loader's way


def test_a_hub_id_is_the_base_model_and_a_folder_is_not_named(change, tmp_path):
    assert ModelCard(model_card.text(change, model="owner/name")).data.base_model == "owner/name"
    private = model_card.text(change, model=str(tmp_path / "secret"))
    assert ModelCard(private).data.base_model is None
    assert str(tmp_path) not in private
    assert "# secret, edited: van gogh" in private


def test_names_are_shown_and_not_parsed_as_markdown_or_html(change, tmp_path):
    protocol = {**change.protocol, "pairs": {EVIL: EVIL}, "method": EVIL}
    report_ = {**change.report, "not_kept": [EVIL], "endangered": [{"concept": EVIL}]}
    hostile = type(change)(change.movements, protocol, report_)
    text = model_card.save(tmp_path, hostile, model="a/<b>\n---").read_text()
    assert "<script" not in text
    assert not re.search(r"^## Evaluation", text, re.MULTILINE)
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \| \`x\` \*\*b\*\* \#\# Evaluation" in text
    assert text.count("\n---\n") == 1
    assert ModelCard(text).data.license == "other"


def test_scores_are_written_into_the_card_once(change, comparison, tmp_path):
    model_card.save(tmp_path, change, model="icons")
    before = (tmp_path / "README.md").read_text()
    once = add_scores(tmp_path, comparison).read_text()
    assert add_scores(tmp_path, comparison).read_text() == once
    earlier = once.replace("## Evaluation", "## What a judge saw")  # the previous heading
    (tmp_path / "README.md").write_text(earlier)
    assert add_scores(tmp_path, comparison).read_text() == once
    card = ModelCard(once)
    values = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert values["target_recognised"] == 0.02
    assert values["style_kept"] == 0.91
    assert "held_out_pairs_recognised" not in values  # no picture of them
    assert "| recognised as openmoji | 90 % (85 to 95) | 2 % (-3 to 7) | 20 |" in card.text
    rest = re.sub(r"## Evaluation\n.*?(?=## )", "", card.text, flags=re.DOTALL)
    assert rest.strip() == ModelCard(before).text.strip()


def test_the_name_of_the_model_is_not_escaped_in_the_head(change, comparison, tmp_path):
    hostile = type(change)(change.movements, {**change.protocol, "pairs": {"<a> & *b*": "c"}}, {})
    model_card.save(tmp_path, hostile, model="icons")
    card = ModelCard(add_scores(tmp_path, comparison).read_text())
    assert card.data.model_name == "icons, edited: <a> & *b* → c"


def test_the_command_line_adds_scores_to_a_card(run, change, comparison, tmp_path):
    results, model = tmp_path / "results", tmp_path / "model"
    model.mkdir()
    model_card.save(model, change, model="icons")
    comparison.save(results)
    code, out, err = run("report", results, "--card", model, "--json")
    assert code == 0, err
    assert str(model / "README.md") in out
    assert "## Evaluation" in (model / "README.md").read_text()


def test_a_missing_card_method_or_comparison_is_an_error(change, comparison, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no README.md: name a folder that"):
        add_scores(tmp_path, comparison)
    model_card.save(tmp_path, change, model="icons")
    with pytest.raises(ValueError, match="no method 'other': choose one of change, or evaluate"):
        add_scores(tmp_path, comparison, method="other")
    with pytest.raises(FileNotFoundError, match="no scores of an edit: name a folder"):
        report.save_card(tmp_path, tmp_path)
    (tmp_path / "README.md").write_text("---\n- a list\n---\n")
    with pytest.raises(ValueError, match="is damaged .*: write the model again with"):
        add_scores(tmp_path, comparison)
