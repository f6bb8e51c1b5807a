"""Typical targets on CLIP's real vocabulary: which tokens may move, and that every report names what is endangered."""

import csv
from pathlib import Path

import layouts
import pytest

from overpaint import edit, probes
from overpaint.edit import token_rules

TABLE = (Path(__file__).parent / "typical_targets.csv").read_text("utf-8").splitlines()
TARGETS = {row["erase"]: row["replace"] for row in csv.DictReader(TABLE)}
FEW = {"contexts": 8, "background": 8, "vocabulary": ["monet", "a cat"], "repair": False}


@pytest.fixture(scope="module")
def model(real_vocabulary):
    import overpaint

    return overpaint.load(real_vocabulary("sd1"))


@pytest.fixture(scope="module")
def counts():
    """Return for each token the number of everyday captions, of 10,000, that hold it."""
    tokenizer = layouts.tokenizer()
    captions = [*probes.everyday("validation"), *probes.everyday("test")]
    counts = {}
    for ids in tokenizer(captions, add_special_tokens=False).input_ids:
        for token in set(ids):
            counts[token] = counts.get(token, 0) + 1
    return counts


def test_there_are_77_targets_of_all_kinds():
    assert len(TARGETS) == 77


def test_the_rule_moves_no_token_of_everyday_captions(counts):
    tokenizer = layouts.tokenizer()
    for old in TARGETS:
        for token, reason in token_rules.obstacles(tokenizer, old).items():
            assert reason or counts.get(token, 0) <= 1, (old, tokenizer.decode([token]))


def test_the_count_shows_what_a_swap_of_all_tokens_would_move(counts):
    tokenizer = layouts.tokenizer()
    moved = [
        old
        for old in TARGETS
        if any(counts.get(t, 0) > 1 for t in token_rules.token_ids(tokenizer, old))
    ]
    assert len(moved) > 30


def test_by_default_only_the_layer_moves(model):
    change = edit.auto(model, TARGETS, aliases=(), collateral=False, **FEW)
    assert change.sites == ("text.0.self_attn.out_proj",)


def test_with_tokens_no_row_of_an_everyday_token_moves(model, counts):
    change = edit.auto(model, TARGETS, aliases=(), tokens=True, collateral=False, **FEW)
    names = [name for rows in change.report.get("tokens", {}).values() for name in rows]
    tokens = model.tokenizer.convert_tokens_to_ids(names)
    assert all(counts.get(token, 0) <= 1 for token in tokens)


@pytest.mark.parametrize("old", ["van gogh", "r2d2", "iron man", "cindy sherman", "snoopy"])
def test_a_target_of_everyday_tokens_is_not_renamed(model, old):
    with pytest.raises(ValueError, match=f"'{old}' has no token of its own"):
        edit.rename(model, {old: TARGETS[old]})


@pytest.mark.parametrize(("old", "token"), [("iron man", "man</w>"), ("r2d2", "2</w>")])
def test_a_forced_rename_counts_the_captions_and_names_that_it_moves(model, old, token):
    change = edit.rename(model, {old: TARGETS[old]}, any_token=True, collateral=False)
    rows = {row["token"]: row for row in change.report["token_captions"]}
    assert rows[token]["captions"] >= len(rows[token]["examples"]) > 0
    measured = edit.collateral(model, change, limit=64)
    assert measured.moved > 0
    assert measured.endangered


def test_every_report_counts_what_it_moves(model):
    for change in (
        edit.auto(model, {"iron man": "robot"}, **FEW),
        edit.rename(model, {"iron man": "robot"}, any_token=True),
    ):
        record = change.report["collateral"]
        assert record["captions"] > 4900
        assert record["names"] > 3000
        assert record["captions_measured"] >= 4
        assert record["names_measured"] >= 4
        assert set(change.report["not_kept"]) >= {row["concept"] for row in record["endangered"]}
        assert (record["captions_moved"] > 0) == any(row["drift"] > 0.1 for row in record["worst"])
