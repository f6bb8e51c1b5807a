"""The verdict of an edit: one sentence from movements and report, also for files whose report holds any type."""

import dataclasses
import json

import pytest

from overpaint import edit, report
from overpaint.edit import Change
from overpaint.edit.verdict import WEIGHT_LIMIT, describe, warnings
from overpaint.trace import Effects


@pytest.fixture(scope="module")
def by_auto(tiny_shallow):
    return edit.auto(
        tiny_shallow, {"van gogh": "painting"}, collateral=False, repair=False, contexts=24, background=32,
        vocabulary=["monet", "snoopy", "van dyck"],
    )  # fmt: skip


def reported(change, **report):
    return dataclasses.replace(change, report=report)


def test_one_sentence_names_weights_the_empty_prompt_and_concepts_at_risk(quickfix_change):
    change = reported(
        quickfix_change,
        empty_prompt_drift=0.0123,
        endangered=[{"concept": "monet"}, {"concept": "van\ndyck"}],
        not_kept=["a", "b", "c", "d", "e", "f", "g"],
    )
    assert describe(change) == (
        "This change moves 1 weight (text.0.self_attn.out_proj); the empty prompt moves by 1.2 %; how many "
        "everyday captions move was not measured; endangered, and preserved for that reason: monet, van dyck; not "
        "preserved, likely to change too: a, b, c, d, e and 2 more."
    )


def test_everyday_captions_that_move_are_counted(quickfix_change):
    record = {"captions_moved": 3, "captions_measured": 80, "max_drift": 0.1}
    text = describe(reported(quickfix_change, collateral=record))
    assert "; 3 of 80 measured everyday captions move by more than 10 %;" in text
    for damaged in ({**record, "max_drift": None}, {**record, "captions_moved": float("nan")}, {}):
        assert "was not measured" in describe(reported(quickfix_change, collateral=damaged))


def test_a_concept_that_was_preserved_without_success_stands_in_one_list(quickfix_change):
    change = reported(
        quickfix_change, endangered=[{"concept": "a"}, {"concept": "b"}], not_kept=["b", "c"]
    )
    text = describe(change)
    assert "preserved for that reason: a; not preserved, likely to change too: b, c." in text


def test_a_measured_edit_reports_its_own_figures(by_auto):
    text = describe(by_auto)
    drift = by_auto.report["empty_prompt_drift"]
    assert f"the empty prompt moves by {100 * drift:.1f} %" in text
    assert "text.0.self_attn.out_proj" in text
    assert bool(by_auto.report["endangered"]) == ("endangered, and" in text)


def test_a_warning_follows_where_the_empty_prompt_moves_by_more_than_five_per_cent(quickfix_change):
    for drift, warned in ((0.0499, False), (0.05, False), (0.0501, True), (0.4, True)):
        change = reported(quickfix_change, empty_prompt_drift=drift)
        assert bool(warnings(change)) == warned
        assert ("Warning: the empty prompt moves by more than 5 %" in describe(change)) == warned


def test_the_drift_of_a_scaled_change_is_scaled(quickfix_change):
    half = 0.5 * reported(quickfix_change, empty_prompt_drift=0.08)
    assert "moves by 4.0 %" in describe(half)
    assert "at strength 0.5" in describe(half)
    assert not warnings(half)
    assert "at strength 0;" in describe(0 * reported(quickfix_change, empty_prompt_drift=0.08))


def test_token_rows_are_counted_and_named(tiny_sd1):
    change = edit.rename(tiny_sd1, {"openmoji style": "noto style"}, any_token=True)
    rows = sum(len(row) for row in change.report["tokens"].values())
    assert f"{rows} token row" in describe(change)
    assert "measured everyday captions move" in describe(change)
    swap = edit.swap_embedding(tiny_sd1, {"openmoji style": "noto style"})
    text = describe(swap)
    assert f"{swap.report['tokens']} token row" in text
    assert "effects on other concepts were not measured" in text
    assert "weight" not in text


def test_every_method_and_every_saved_file_has_a_sentence(tiny_sd1, quickfix_change, tmp_path):
    pair = {"van gogh": "painting"}
    changes = [edit.uce(tiny_sd1, pair), edit.time(tiny_sd1, pair), edit.loco(tiny_sd1, pair)]
    for change in (*changes, quickfix_change, changes[0] + edit.uce(tiny_sd1, {"cat": "dog"})):
        change.save(tmp_path / "c.safetensors")
        text = describe(change)
        assert text == describe(Change.load(tmp_path / "c.safetensors"))
        assert text.startswith("This change moves ")
        assert "\n" not in text


@pytest.mark.parametrize("value", [None, "x", 3, [3, None, {}], {"a": 1}, True, float("nan")])
def test_a_report_of_any_type_raises_nothing(quickfix_change, value):
    keys = (
        "empty_prompt_drift", "endangered", "not_kept", "carried", "tokens", "collateral", "concept_movement",
    )  # fmt: skip
    assert describe(reported(quickfix_change, **dict.fromkeys(keys, value))).startswith("This")
    shares = {"concept_movement": {"a": value}}
    assert describe(reported(quickfix_change, **shares)).startswith("This")


def test_a_weight_that_moves_by_many_times_its_norm_is_named(quickfix_change):
    norm = quickfix_change.movements[0].relative_norm
    for size, warned in ((0.999, False), (1.001, True), (3.0, True)):
        change = reported((size * WEIGHT_LIMIT / norm) * quickfix_change)
        assert bool(warnings(change)) == warned
        if warned:
            (text,) = warnings(change)
            assert text.startswith(
                f"Warning: text.0.self_attn.out_proj moves by up to {size * WEIGHT_LIMIT:.3g} times the norm"
            )
            assert "raise `ridge`, edit fewer tokens" in text and text in describe(change)


def test_dp_with_pads_and_a_rank_names_the_weights_that_it_moves_too_far(tiny_sd1, tmp_path):
    change = edit.dp(
        tiny_sd1, {"van gogh": "painting"}, preserve=["monet", "a cat", "a dog"], rank=60, keys="last_to_pads",
        layers=[0, 4, 9],
    )  # fmt: skip
    large = [m for m in change.movements if m.relative_norm > WEIGHT_LIMIT]
    assert large
    (text,) = [text for text in warnings(change) if "times the norm of the weight" in text]
    worst = max(large, key=lambda m: m.relative_norm)
    assert text.startswith(f"Warning: {worst.site}")
    change.save(tmp_path / "c.safetensors")
    assert text in warnings(Change.load(tmp_path / "c.safetensors"))
    plain = edit.dp(tiny_sd1, {"van gogh": "painting"}, preserve=["monet"], layers=[0, 4, 9])
    assert not [text for text in warnings(plain) if "times the norm of the weight" in text]


def test_the_command_line_prints_the_sentence_before_the_figures(run, tiny_folder, tmp_path):
    out = tmp_path / "a.safetensors"
    arguments = ("edit", tiny_folder, "--erase", "cat", "--replace", "dog", "--out")
    code, text, _ = run(*arguments, out)
    assert code == 0
    sentence = describe(Change.load(out))
    assert text.startswith(f"verdict{' ' * (text.index('This') - len('verdict'))}{sentence}\n")
    for verb in (("show", out), (*arguments, tmp_path / "b.safetensors")):
        assert json.loads(run(*verb, "--json")[1])["verdict"] == sentence
    assert run("show", out)[1].startswith("verdict ")


def test_the_report_page_shows_the_sentence_of_the_saved_change(quickfix_change, tmp_path):
    rows = [
        {
            "site": "text.0.mlp", "part": "text", "kind": "mlp", "index": 0, "path": "", "role": "eos", "control": "",
            "probe": "p", "prompt": "a cat", "concept": "cat", "seed": 0, "noise": 0, "indirect_effect": 0.5,
            "embed_recovery": 0.5,
        }
    ]  # fmt: skip
    Effects.of(rows, {}).save(tmp_path / "text.parquet")
    page = report.save(tmp_path)
    assert json.loads(page.with_suffix(".json").read_text())["verdict"] == ""
    quickfix_change.save(tmp_path / "change.safetensors")
    text = report.save(tmp_path).read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert f'<p class="verdict">{describe(quickfix_change)}</p>' in text
    assert json.loads(page.with_suffix(".json").read_text())["verdict"] == describe(quickfix_change)


def test_aliases_and_unedited_encoders_are_named(quickfix_change):
    change = reported(
        quickfix_change,
        endangered=[],
        not_kept=[],
        aliases=["van gogh"],
        unedited_encoders=["text2"],
    )
    text = describe(change)
    assert "erased with them: van gogh; text encoders that stay as they are: text2" in text
    assert "no other known concept is endangered" in text


def test_an_edit_of_both_encoders_names_both_weights_and_one_of_one_the_other(tiny_xl):
    pair = {"blob style": "noto style"}
    assert "moves 2 weights (text.0.self_attn.out_proj, text2.0.self_attn.out_proj)" in describe(
        edit.quickfix(tiny_xl, pair)
    )
    assert "text encoders that stay as they are: text2" in describe(
        edit.quickfix(tiny_xl, pair, encoder="text")
    )
