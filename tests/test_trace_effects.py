"""Acceptance checks 23 and 24, and the table of effects."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overpaint.trace import Effects
from overpaint.trace.effects import recovery

# Restored scores by probe and layer; clean and corrupted scores by probe.
SCORES = {"p": (0.2, 0.9, 0.5), "q": (0.3, 0.8, 0.1), "r": (0.4, 0.7, 0.6)}
ENDS = {"p": (1.0, 0.1), "q": (0.9, 0.2), "r": (0.31, 0.3)}


def row(probe, layer, score, role="last_subject", control=""):
    clean, corrupted = ENDS[probe]
    return {
        "site": f"text.{layer}.mlp", "part": "text", "kind": "mlp", "index": layer,
        "path": f"encoder.layers.{layer}.mlp", "role": role, "control": control, "position": 3,
        "probe": probe, "attribute": "style", "prompt": "a cat", "concept": "cat", "seed": 0,
        "noise": 0, "score_clean": clean, "score_corrupted": corrupted, "score_restored": score,
        "indirect_effect": score - corrupted, "embed_recovery": score / 2,
        "recovery": recovery(clean, corrupted, score, gap=0.02),
    }  # fmt: skip


def rows():
    return [row(p, layer, s) for p, scores in SCORES.items() for layer, s in enumerate(scores)]


@pytest.fixture
def effects():
    return Effects.of(rows(), {"steps": 3})


def test_recovery_of_clean_is_one_and_of_corrupted_zero():
    assert recovery(0.9, 0.3, 0.9, gap=0.02) == 1
    assert recovery(0.9, 0.3, 0.3, gap=0.02) == 0
    assert recovery(0.9, 0.3, 0.0, gap=0.02) == pytest.approx(-0.5)
    assert recovery(0.32, 0.3, 0.9, gap=0.02 + 1e-12) is None
    assert recovery(0.3, 0.9, 0.3, gap=0.02) is None


def test_means_by_hand(effects):
    table = effects.mean().to_pylist()
    assert [(r["site"], r["role"], r["n"]) for r in table] == [
        (f"text.{i}.mlp", "last_subject", 3) for i in range(3)
    ]
    assert table[0]["mean"] == pytest.approx((0.1 + 0.1 + 0.1) / 3)
    assert table[1]["mean"] == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert 0.399 < table[1]["low"] < table[1]["mean"] < table[1]["high"] < 0.801
    assert table[0]["low"] == pytest.approx(table[0]["high"])


def test_prompts_without_a_gap_are_left_out_and_counted(effects):
    assert effects.dropped == 1
    table = effects.mean("recovery").to_pylist()
    assert [r["n"] for r in table] == [2, 2, 2]
    assert table[1]["mean"] == pytest.approx((0.8 / 0.9 + 0.6 / 0.7) / 2)


def test_top_is_by_mean_best_first(effects):
    assert [site.name for site in effects.top(2)] == ["text.1.mlp", "text.2.mlp"]
    assert [site.index for site in effects.top(9)] == [1, 2, 0]
    assert effects.top(1)[0].path == "encoder.layers.1.mlp"
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        effects.top(0)


def test_half_gap_rule_by_hand(effects):
    clean, corrupted = (1.0 + 0.9 + 0.31) / 3, (0.1 + 0.2 + 0.3) / 3
    assert effects.half_gap() == pytest.approx(corrupted + 0.5 * (clean - corrupted))
    assert [site.index for site in effects.causal(effects.half_gap(), alpha=1)] == [1]


def test_a_higher_threshold_never_adds_sites(effects):
    before = set(effects.causal(-1.0, alpha=1))
    assert len(before) == 3
    for step in range(0, 110, 5):
        now = set(effects.causal(step / 100, alpha=1))
        assert now <= before
        before = now
    assert not before


def test_the_order_of_the_rows_does_not_matter(effects):
    shuffled = rows()
    random.Random(0).shuffle(shuffled)
    other = Effects.of(shuffled, {})
    for threshold in (None, 0.3, 0.5):
        mine, theirs = (e.causal(threshold, alpha=1) for e in (effects, other))
        assert set(mine) == set(theirs)
    key = lambda r: r["site"]  # noqa: E731
    assert sorted(other.mean().to_pylist(), key=key) == sorted(effects.mean().to_pylist(), key=key)


def test_controls_stand_apart():
    both = Effects.of([*rows(), row("p", 0, 0.9, control="untrained")], {})
    plain = Effects.of(rows(), {})
    assert both.mean().equals(plain.mean())
    control = both.mean("embed_recovery", control="untrained").to_pylist()
    assert [(r["site"], r["mean"]) for r in control] == [("text.0.mlp", 0.45)]


def test_without_pictures_the_features_speak():
    keys = ("score_clean", "score_corrupted", "score_restored", "indirect_effect", "recovery")
    bare = Effects.of([{k: v for k, v in r.items() if k not in keys} for r in rows()], {})
    assert bare.mean().to_pylist()[0]["mean"] == pytest.approx((0.1 + 0.15 + 0.2) / 3)
    assert bare.dropped == 0
    with pytest.raises(ValueError, match="hold no scores: trace again with `generate=True`"):
        bare.causal()


def test_unknown_value(effects):
    with pytest.raises(ValueError, match="unknown value 'effect': choose one of indirect_effect"):
        effects.mean("effect")


def test_save_and_load_round(effects, tmp_path):
    path = effects.save(tmp_path / "new" / "text.parquet")
    again = Effects.load(path)
    assert again.table.equals(effects.table)
    assert again.protocol == {"steps": 3}
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(pq.read_schema(path).metadata[b"overpaint"]) == {"steps": 3}


def test_heads_windows_and_roles_are_states_of_their_own_in_a_fixed_order():
    made = [
        {**row("p", layer, score), "head": head, "window": window, "role": role}
        for layer, score in enumerate((0.2, 0.9))
        for window in ("late", "", "early")
        for head in (1, None, 0)
        for role in ("eos", "subject")
    ]
    table = Effects.of(made, {}).mean().to_pylist()
    assert len(table) == 2 * 3 * 3 * 2
    first = [(r["role"], r["head"], r["window"]) for r in table if r["site"] == "text.0.mlp"]
    assert first[:6] == [
        (role, None, window) for role in ("subject", "eos") for window in ("", "early", "late")
    ]
    assert [head for _, head, _ in first] == [None] * 6 + [0] * 6 + [1] * 6
    assert [site.index for site in Effects.of(made, {}).top(5)] == [1, 0]


def test_an_absent_window_is_every_step(effects):
    assert {r["window"] for r in effects.mean().to_pylist()} == {""}


def test_files_of_another_version_are_refused(effects, tmp_path):
    path = effects.save(tmp_path / "old.parquet")
    old = pq.read_table(path).drop_columns(["window", "head"])
    pq.write_table(old, path)
    with pytest.raises(ValueError, match="lack 'window', for another version wrote them: trace"):
        Effects.load(path)


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no effects at .*nothing.parquet"):
        Effects.load(tmp_path / "nothing.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text").write_text("hello")
    for name in ("other.parquet", "text"):
        with pytest.raises(ValueError, match="does not hold effects: name a file"):
            Effects.load(tmp_path / name)
