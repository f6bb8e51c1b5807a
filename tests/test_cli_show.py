"""`overpaint show`, `overpaint diff`, `--dry-run`, `--concepts`, `--version` and the bare command."""

import json

import pytest

import overpaint as op


@pytest.fixture(scope="module")
def changes(tiny_sd1, tmp_path_factory):
    """Three change files: two of one concept with other ridges, and one of two concepts at half strength."""
    folder = tmp_path_factory.mktemp("changes")
    first = op.edit.quickfix(tiny_sd1, {"cat": "dog"}, ridge=0.1)
    second = op.edit.quickfix(tiny_sd1, {"cat": "fish"}, ridge=1.0)
    both = 0.5 * op.edit.quickfix(tiny_sd1, {"cat": "dog", "fox": "bear"}, ridge=0.1)
    for name, change in (("first", first), ("second", second), ("both", both)):
        change.save(folder / f"{name}.safetensors")
    return folder


def test_show_prints_what_the_file_holds(run, changes):
    path = changes / "both.safetensors"
    code, out, err = run("show", path, "--json")
    facts = json.loads(out)
    change = op.Change.load(path)
    assert (code, err) == (0, "")
    assert facts["bytes"] == path.stat().st_size
    assert facts["concepts"] == ["cat → dog, strength 0.5", "fox → bear, strength 0.5"]
    assert facts["method"] == "quickfix"
    assert facts["ridge"] == 0.1
    assert facts["digest"] == change.digest[:12]
    assert len(facts["weights"]) == 1
    assert facts["weights"][0].startswith(f"{change.site}: 64 x 64, rank {change.left.shape[1]}")
    text = run("show", path)[1]
    assert text.splitlines()[0].startswith("verdict")


def test_diff_of_a_file_with_itself_finds_nothing(run, changes):
    path = changes / "first.safetensors"
    code, out, _ = run("diff", path, path, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["equal"] is True
    assert facts["settings"] == []
    assert facts["concepts_in_both"] == ["cat → dog"]
    assert facts["weights"] == [f"{op.Change.load(path).site}: relative distance 0"]


def test_diff_lists_concepts_settings_and_the_distance_of_the_movements(run, changes):
    a, b = changes / "first.safetensors", changes / "second.safetensors"
    facts = json.loads(run("diff", a, b, "--json")[1])
    assert facts["equal"] is False
    assert facts["replaced_otherwise"] == ["cat → dog / fish"]
    assert facts["settings"] == ["ridge: 0.1 / 1.0"]
    one, other = op.Change.load(a).delta, op.Change.load(b).delta
    distance = float((one - other).norm() / max(one.norm(), other.norm()))
    assert facts["weights"] == [f"{op.Change.load(a).site}: relative distance {distance:.3g}"]
    facts = json.loads(run("diff", a, changes / "both.safetensors", "--json")[1])
    assert facts["concepts_second_only"] == ["fox → bear"]


def test_a_dry_run_writes_nothing_and_names_tokens_and_weights(run, tiny_folder, tmp_path):
    out = tmp_path / "no such folder" / "change.safetensors"
    code, text, _ = run(
        "edit", tiny_folder, "--erase", "van gogh", "--replace", "monet", "--dry-run", "--out", out, "--json"
    )  # fmt: skip
    facts = json.loads(text)
    assert code == 0
    assert not out.parent.exists()
    assert facts["change"] is None
    assert facts["weights"] == ["text.0.self_attn.out_proj"]
    assert facts["subject_tokens"] == ["van gogh: van | gogh"]


def test_concepts_come_from_a_file_and_from_options(run, tiny_folder, tmp_path):
    table = tmp_path / "concepts.csv"
    table.write_text("erase,replace\ncat,dog\nfox,bear\n")
    code, text, _ = run(
        "edit", tiny_folder, "--concepts", table, "--erase", "red", "--replace", "blue",
        "--out", tmp_path / "change.safetensors", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(text)["concepts"] == ["cat → dog", "fox → bear", "red → blue"]
    code, text, err = run(
        "edit", tiny_folder, "--concepts", table, "--erase", "cat", "--replace", "blue"
    )
    assert (code, text) == (2, "")
    assert "'cat' has two replacements, 'dog' and 'blue': keep one of them." in err


def test_the_version_and_the_bare_command(run):
    assert run("--version") == (0, f"overpaint {op.__version__}\n", "")
    code, text, err = run()
    assert (code, err) == (0, "")
    verbs = [line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line]
    assert {"demo", "edit", "show", "diff", "apply", "trace"} <= set(verbs)
    assert "..." not in text.partition("Commands:")[2]
