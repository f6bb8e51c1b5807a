"""Effects: means, thresholds, saving and loading."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overpaint.trace import Effects
from overpaint.trace.renderer import score_recovery

GOLDEN = Path(__file__).parent / "golden" / "effects_without_direct_effect.parquet"

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
        "recovery": score_recovery(clean, corrupted, score, gap=0.02),
    }  # fmt: skip


def rows():
    return [row(p, layer, s) for p, scores in SCORES.items() for layer, s in enumerate(scores)]


@pytest.fixture
def effects():
    return Effects.of(rows(), {"steps": 3})


def test_the_clean_score_has_recovery_one_and_the_corrupted_score_zero():
    assert score_recovery(0.9, 0.3, 0.9, gap=0.02) == 1
    assert score_recovery(0.9, 0.3, 0.3, gap=0.02) == 0
    assert score_recovery(0.9, 0.3, 0.0, gap=0.02) == pytest.approx(-0.5)
    assert score_recovery(0.32, 0.3, 0.9, gap=0.02 + 1e-12) is None
    assert score_recovery(0.3, 0.9, 0.3, gap=0.02) is None


def test_means_equal_values_worked_by_hand(effects):
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


def test_top_sorts_by_mean_best_first(effects):
    assert [site.name for site in effects.top(2)] == ["text.1.mlp", "text.2.mlp"]
    assert [site.index for site in effects.top(9)] == [1, 2, 0]
    assert effects.top(1)[0].path == "encoder.layers.1.mlp"
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        effects.top(0)


def test_the_half_gap_equals_a_value_worked_by_hand(effects):
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


def test_controls_are_not_part_of_the_models_own_means():
    both = Effects.of([*rows(), row("p", 0, 0.9, control="untrained")], {})
    plain = Effects.of(rows(), {})
    assert both.mean().equals(plain.mean())
    control = both.mean("embed_recovery", control="untrained").to_pylist()
    assert [(r["site"], r["mean"]) for r in control] == [("text.0.mlp", 0.45)]


def test_without_pictures_the_default_value_is_embed_recovery():
    keys = ("score_clean", "score_corrupted", "score_restored", "indirect_effect", "recovery")
    bare = Effects.of([{k: v for k, v in r.items() if k not in keys} for r in rows()], {})
    assert bare.mean().to_pylist()[0]["mean"] == pytest.approx((0.1 + 0.15 + 0.2) / 3)
    assert bare.dropped == 0
    with pytest.raises(ValueError, match="hold no scores: trace again with `generate=True`"):
        bare.causal()


def test_an_unknown_value_is_refused(effects):
    with pytest.raises(ValueError, match="unknown value 'effect': choose one of indirect_effect"):
        effects.mean("effect")


def test_saving_and_loading_returns_equal_effects(effects, tmp_path):
    path = effects.save(tmp_path / "new" / "text.parquet")
    again = Effects.load(path)
    assert again.table.equals(effects.table)
    assert again.protocol == {"steps": 3}
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(pq.read_schema(path).metadata[b"overpaint"]) == {"steps": 3}


def test_heads_windows_and_roles_are_separate_states_in_a_fixed_order():
    states = [
        {**row("p", layer, score), "head": head, "window": window, "role": role}
        for layer, score in enumerate((0.2, 0.9))
        for window in ("late", "", "early")
        for head in (1, None, 0)
        for role in ("eos", "subject")
    ]
    table = Effects.of(states, {}).mean().to_pylist()
    assert len(table) == 2 * 3 * 3 * 2
    first = [(r["role"], r["head"], r["window"]) for r in table if r["site"] == "text.0.mlp"]
    assert first[:6] == [
        (role, None, window) for role in ("subject", "eos") for window in ("", "early", "late")
    ]
    assert [head for _, head, _ in first] == [None] * 6 + [0] * 6 + [1] * 6
    assert [site.index for site in Effects.of(states, {}).top(5)] == [1, 0]


def test_a_missing_window_means_every_step(effects):
    assert {r["window"] for r in effects.mean().to_pylist()} == {""}


def test_a_file_of_an_earlier_version_loads_with_equal_numbers():
    """The expected numbers were computed by the version that wrote the file, before `direct_effect` had a column."""
    expected = json.loads(GOLDEN.with_suffix(".json").read_text())
    effects = Effects.load(GOLDEN)
    assert effects.table["direct_effect"].null_count == len(effects) == 87
    assert (effects.value(), effects.dropped) == (expected["value"], expected["dropped"])
    assert effects.half_gap() == expected["half_gap"]
    test = effects.test()
    assert test.protocol["threshold"] == expected["threshold"]
    columns = ("mean", "low", "high", "p", "p_holm", "score")
    assert {
        row["site"]: [row[name] for name in columns] for row in test.table.to_pylist()
    } == expected["states"]


def test_a_draft_of_a_killed_process_is_removed_by_the_next_save(effects, tmp_path):
    draft = tmp_path / ".text.parquet.4194305.part"  # above the largest process id of Linux
    draft.write_bytes(b"PAR1")
    effects.save(tmp_path / "text.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["text.parquet"]


def test_files_that_lack_a_column_are_refused(effects, tmp_path):
    path = effects.save(tmp_path / "old.parquet")
    old = pq.read_table(path).drop_columns(["window", "head"])
    pq.write_table(old, path)
    with pytest.raises(
        ValueError, match="lack 'window', because another version wrote them: trace"
    ):
        Effects.load(path)


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no effects at .*nothing.parquet"):
        Effects.load(tmp_path / "nothing.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text").write_text("hello")
    for name in ("other.parquet", "text"):
        with pytest.raises(ValueError, match="does not hold effects: name a file"):
            Effects.load(tmp_path / name)
