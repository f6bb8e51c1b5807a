"""Options that do not fit each other, errors of the system, and output that fits a terminal."""

import json
import sys

import pytest

import overpaint as op


@pytest.fixture(scope="module")
def files(tiny_sd1, tmp_path_factory):
    """Folder of two change files, one made by `auto`, and of texts."""
    folder = tmp_path_factory.mktemp("files")
    op.edit.quickfix(tiny_sd1, {"cat": "dog"}).save(folder / "quick.safetensors")
    auto = op.edit.auto(tiny_sd1, {"fish": "bird"}, contexts=8, background=8, vocabulary=["fox"])
    auto.save(folder / "auto.safetensors")
    (folder / "semicolons.csv").write_text("erase;replace\ncat;dog\n")
    (folder / "tensors.txt").write_bytes(b"\x08\x00\x00\x00cat")
    return folder


EDIT = ("edit", "nonesuch", "--erase", "cat", "--replace", "dog", "--out", "{tmp}/c.safetensors")
EVALUATE = ("evaluate", "nonesuch", "{files}/quick.safetensors", "--out", "{tmp}/e")
TRACE = ("trace", "nonesuch", "--out", "{tmp}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*EDIT, "--no-repair"), "--no-repair is a setting of --auto: leave it out, or give --auto too"),
        ((*EDIT, "--tokens"), "--tokens is a setting of --auto"),
        ((*EDIT, "--any-token"), "--any-token is a setting of --rename"),
        ((*EDIT, "--rename", "--ridge", "0.1"), "so --ridge has no effect: leave one out"),
        ((*EDIT, "--rename", "--auto"), "so --auto has no effect: leave one out"),
        ((*EDIT, "--rename", "--update", "{files}/quick.safetensors"), "--rename moves token rows alone"),
        ((*EDIT, "--update", "{files}/auto.safetensors"), "was made with --auto, and only edits of one method can be"),
        ((*EDIT, "--update", "{files}/quick.safetensors", "--auto"), "was made without --auto"),
        ((*EDIT, "--concepts", "{files}/semicolons.csv"), "line 1: the columns seem to be separated by ';': save"),
        ((*EDIT, "--concepts", "{files}/tensors.txt"), "holds control characters: name a text file"),
        ((*EDIT, "--concepts", "{files}/none.csv"), "none.csv': No such file or directory: check the path."),
        ((*EDIT, "--concepts", "{files}"), "Is a directory: name a file."),
        ((*EDIT, "--update", "{files}/none.safetensors"), "overpaint: there is no such change: '"),
        ((*EDIT[:-1], "{tmp}/" + 300 * "x" + ".safetensors"), "…': File name too long: give a shorter name."),
        (("generate", "nonesuch", "a", "--change", "{files}/none", "--out", "{tmp}"), "there is no such change"),
        (("export", "nonesuch", "{files}/quick.safetensors", "--out", "{files}/quick.safetensors", "--force"),
         "is the change itself: name another file with --out"),
        (("load", "x" * 5000), "File name too long: give a shorter name."),
        (("report", "{files}", "--card", "{tmp}"), "holds no"),
        ((*EVALUATE, "--erase", " "), "--erase is empty: name the erased concept, or leave --erase out"),
        ((*EVALUATE, "--form", "csv"), "--form is the format of a file: name the file with --set"),
        ((EVALUATE[0], "{model}", *EVALUATE[2:], "--set", ""), "value for '--set': it is empty: name a file or folder"),
        ((*EVALUATE, "--kind", "style"), "--kind selects an evaluation set, and labels have their own kind"),
        ((*EVALUATE, "--set", "icons", "--kind", "smell"), "unknown kind of concept 'smell': choose one of style"),
        ((*EVALUATE, "--repeats", "2"), "--repeats is for an evaluation set: name one with --set, or leave it out"),
        ((*EVALUATE, "--repeats", "2", "--attack"), "--repeats is for an evaluation set"),
        ((EVALUATE[0], "icons", *EVALUATE[2:], "--replace", "nosuch"), "the judge has no label for 'nosuch'"),
        ((EVALUATE[0], "icons", *EVALUATE[2:], "--replace", "noto style"),
         "'noto style' is a label of the kind 'style', and 'cat' of the kind 'object': name one of the same kind"),
        (("edit", "nonesuch", "--update", "{files}/quick.safetensors", "--ridge", "0.5"),
         "--ridge is a setting of a new edit: name a concept with --erase, or leave --ridge out."),
        (("edit", "nonesuch", "--update", "{files}/quick.safetensors", "--preserve", "a"), "--preserve is a setting"),
        (("edit", "nonesuch", "--update", "{files}/auto.safetensors", "--auto"), "--auto is a setting of a new edit"),
        ((*TRACE, "--prompts", "a.csv", "--vocabulary", "natural"), "and --prompts replaces them: leave one of"),
        ((*TRACE, "--features-only", "--scorer", "CLIP"), "--features-only draws none: leave one of them out"),
        ((*TRACE, "--part", "swap", "--target", "dog", "--sigma", "1"), "--sigma is for --part text or unet"),
        ((*TRACE, "--concept", "cat"), "give the file with --prompts, or leave --concept out"),
        ((*TRACE, "--windows"), "--windows is for --part unet, not for text: leave --windows out."),
        ((*TRACE, "--source", "same_latent"), "--source is for --part unet, not for text"),
        ((*TRACE, "--target", "dog"), "--target is for --part swap, not for text"),
        ((*TRACE, "--part", "unet", "--features-only"), "--features-only is for --part text, not for unet"),
        ((*TRACE, "--part", "swap", "--target", "dog", "--heads"), "--heads is for --part text or unet, not for swap"),
        (("edit", "{model}", "--erase", "\udce9t\udce9", "--replace", "dog", "--dry-run"), "is not text in UTF-8"),
        (("edit", "{model}", "--erase", "cat", "--replace", "\udce9", "--auto", "--dry-run"), "is not text in UTF-8"),
        (("generate", "{model}", "\udce9", "--steps", "1", "--out", "{tmp}/p"), "is not text in UTF-8"),
        (("trace", "icons", "--part", "swap", "--target", "\udce9", "--steps", "1", "--out", "{tmp}/t"),
         "is not text in UTF-8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_and_exit_code_2(
    run, files, tiny_folder, tmp_path, arguments, message
):
    before = {path: path.read_bytes() for path in files.iterdir()}
    filled = [a.format(tmp=tmp_path, files=files, model=tiny_folder) for a in arguments]
    code, out, err = run(*filled)
    assert (code, out) == (2, "")
    assert err.startswith("overpaint: ") and err.count("\n") == 1
    assert message in err
    assert "[Errno" not in err
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_a_change_for_another_layout_is_refused(run, files, real_vocabulary, tmp_path):
    model = op.load(real_vocabulary("sdxl"))
    op.edit.quickfix(model, {"cat": "dog"}).save(tmp_path / "xl.safetensors")
    for verb in ("apply", "export"):
        out = tmp_path / "out.safetensors"
        code, _, err = run(verb, real_vocabulary("sd1"), tmp_path / "xl.safetensors", "--out", out)
        assert (code, out.exists()) == (2, False)
        assert (
            "this model has 'text'" in err
            and "use a change with the model that it was made for" in err
        )
    code, _, err = run("export", real_vocabulary("sdxl"), files / "quick.safetensors", "--out", out)
    assert (code, out.exists()) == (2, False)
    assert "give a model of the layout that the change was made for" in err


def test_a_cut_edit_prints_the_figures_of_the_file(run, tiny_folder, tmp_path):
    out = tmp_path / "c.safetensors"
    code, text, _ = run(
        "edit", tiny_folder, "--erase", "cat", "--replace", "dog", "--rank", 2, "--out", out, "--json"
    )  # fmt: skip
    facts = json.loads(text)
    assert code == 0
    assert facts["rank"] == op.Change.load(out).left.shape[1] == 2
    assert facts["compact_error"] > 0


def test_a_dry_run_prints_that_no_file_is_written(run, tiny_folder):
    code, text, _ = run("edit", tiny_folder, "--erase", "cat", "--replace", "dog", "--dry-run")
    assert code == 0
    assert "change               (no file is written)" in text.splitlines()


def test_diff_of_edits_of_two_encoders_is_short(run, real_vocabulary, tmp_path):
    model = op.load(real_vocabulary("sdxl"))
    settings = {"contexts": 8, "background": 8, "vocabulary": ["picasso", "snoopy"]}
    for name, weight in (("a", 5.0), ("b", 50.0)):
        change = op.edit.auto(model, {"van gogh": "monet"}, preserve_weight=weight, **settings)
        change.save(tmp_path / f"{name}.safetensors")
    code, text, _ = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    rows = json.loads(text)["settings"]
    assert code == 0
    assert "preserve_weight: 5.0 / 50.0" in rows
    assert max(map(len, rows)) < 80


def test_the_table_of_a_trace_shows_whole_names_in_80_columns(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = run(
        "trace", "icons", "--limit", 1, "--steps", 1, "--features-only", "--out", tmp_path
    )
    table = text.partition("effects")[0].splitlines()
    assert code == 0
    assert max(map(len, table)) <= 80
    assert any(line.startswith("text.0.self_attn  ") for line in table)
    assert "…" not in "".join(table)
    assert "last_subject" in "".join(table)


def test_long_facts_are_wrapped_in_a_terminal_alone(run, files, monkeypatch):
    path = files / "quick.safetensors"
    whole = run("show", path)[1]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    wrapped = run("show", path)[1]
    assert len(whole.splitlines()[0]) > 80
    verdict = wrapped.partition("\nchange ")[0]
    assert max(map(len, verdict.splitlines())) <= 80
    assert verdict.split() == whole.splitlines()[0].split()
