import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from overpaint.cli import app as cli


def refused(result):
    """Return the one line of an error; nothing else may have been printed."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("overpaint: ")
    assert err.count("\n") == 1
    return err


def test_sites_lists_every_site_as_table_and_json(run, tiny_folder):
    code, out, _ = run("sites", tiny_folder, "--json")
    names = [site["name"] for site in json.loads(out)["sites"]]
    assert code == 0
    assert names[:2] == ["text.0.self_attn", "text.0.mlp"]
    assert len(names) == 24 + 70
    code, table, _ = run("sites", tiny_folder)
    assert code == 0
    assert [line.split()[0] for line in table.splitlines()[1:]] == names


def test_load_lists_components_and_parameter_counts(run, tiny_folder):
    code, out, err = run("load", tiny_folder, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["unet"] == "UNet2DConditionModel"
    assert facts["text_encoder_parameters"] > 0
    assert f"model                    {tiny_folder}" in run("load", tiny_folder)[1]


def test_an_applied_folder_draws_the_same_pictures_as_generate_with_the_change(
    run, tiny_folder, tmp_path
):
    change, edited = tmp_path / "no-blob.safetensors", tmp_path / "edited"
    code, out, _ = run(
        "edit", tiny_folder, "--erase", "blob style", "--replace", "noto style", "--preserve", "",
        "--out", change, "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["site"] == "text.0.self_attn.out_proj"
    code, out, _ = run("apply", tiny_folder, change, "--out", edited)
    assert (code, out) == (0, f"model  {edited}\n")
    common = ("a cat in blob style", "--steps", 1, "--out")
    assert run("generate", edited, *common, tmp_path / "a")[0] == 0
    assert run("generate", tiny_folder, *common, tmp_path / "b", "--change", change)[0] == 0
    assert run("generate", tiny_folder, *common, tmp_path / "c")[0] == 0
    pictures = [(tmp_path / name / "0000.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))


def test_edit_options_update_without_strength_and_rank(run, tiny_folder, tmp_path):
    """What the shell makes is what the functions make."""
    import overpaint as op

    def file(name):
        return tmp_path / f"{name}.safetensors"

    def edit(name, *arguments):
        code, out, err = run("edit", tiny_folder, *arguments, "--out", file(name), "--json")
        assert (code, err) == (0, "")
        return json.loads(out), op.Change.load(file(name))

    settings = ("--preserve", "", "--ridge", 0.1, "--positions", "subject")
    _, first = edit("a", "--erase", "cat", "--replace", "dog", *settings)
    facts, both = edit(
        "b", "--update", file("a"), "--erase", "fox", "--replace", "bear", "--strength", 0.5
    )
    assert facts["concepts"] == ["cat → dog", "fox → bear"]
    assert (both.ridge, both.protocol["positions"]) == (0.1, "subject")
    model = op.load(tiny_folder)
    fox = op.edit.quickfix(model, {"fox": "bear"}, ridge=0.1, positions="subject")
    assert both.digest == op.edit.stack(model, [first, 0.5 * fox]).digest
    _, alone = edit("c", "--update", file("b"), "--without", "cat", "--strength", 2)
    assert alone.pairs == {"fox": "bear"}
    assert "strength" not in alone.protocol
    _, small = edit("d", "--update", file("b"), "--rank", 2)
    assert small.left.shape[1] == 2 and file("d").stat().st_size < file("b").stat().st_size / 2
    assert (
        run(
            "apply",
            tiny_folder,
            file("b"),
            "--without",
            "fox",
            "--strength",
            0.5,
            "--out",
            tmp_path / "e",
        )[0]
        == 0
    )
    edited = op.load(tmp_path / "e")
    with (0.5 * op.edit.complete(model, both).without("fox")).applied(model):
        assert edited.encode(["a cat"]).equal(model.encode(["a cat"]))


def test_a_rename_lists_the_tokens_that_it_moves(run, tiny_folder, tmp_path):
    out = tmp_path / "a.safetensors"
    code, facts, err = run(
        "edit",
        tiny_folder,
        "--erase",
        "fish",
        "--replace",
        "bird",
        "--rename",
        "--any-token",
        "--out",
        out,
        "--json",
    )
    assert (code, err) == (0, "")
    facts = json.loads(facts)
    assert (facts["site"], facts["tokens"]) == ("text.token_embedding", ["fish"])


def test_report_draws_the_effects_that_trace_saves(run, tiny_folder, tmp_path):
    code, out, _ = run(
        "trace", tiny_folder, "--features-only", "--limit", 1, "--out", tmp_path, "--json"
    )
    assert code == 0
    assert json.loads(out)["effects"] == str(tmp_path / "text.parquet")
    assert len(json.loads(out)["top"]) == 10
    assert run("report", tmp_path)[:2] == (0, f"report  {tmp_path / 'report.html'}\n")
    assert "Causal trace of the text encoder" in (tmp_path / "report.html").read_text()


def test_trace_screens_resumes_and_plots(run, tmp_path):
    command = ("trace", "icons", "--limit", 1, "--steps", 2, "--screen", 0.05, "--out", tmp_path)
    code, out, _ = run(*command, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["screen"]["share"] == 0.05
    assert facts["screen"]["drawn"] == len(facts["top"]) < facts["screen"]["states"] / 10
    assert ("spearman_features_pictures" in facts) == (facts["screen"]["drawn"] >= 3)
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "text-runs").glob("*.parquet")}
    code, out, _ = run(*command)
    assert code == 0
    assert str(tmp_path / "text.png") in out
    assert shards == {p: p.stat().st_mtime_ns for p in (tmp_path / "text-runs").glob("*.parquet")}
    assert "steps" in refused(run(*command[:5], 3, *command[6:], "--json"))


def test_trace_reads_all_prompts_of_a_file_and_needs_no_probes_of_its_own(
    run, tiny_folder, tmp_path
):
    """There are no viewpoint probes in the icons' words, which must not stop a file with other ones."""
    lines = [f"{n},a cat seen from {side},{n}" for n, side in enumerate(["above", "behind"] * 5)]
    (tmp_path / "mine.csv").write_text("\n".join(["case_number,prompt,evaluation_seed", *lines]))
    command = (
        "trace", tiny_folder, "--kind", "viewpoint", "--prompts", tmp_path / "mine.csv", "--concept", "cat",
        "--features-only", "--json", "--out",
    )  # fmt: skip
    code, out, _ = run(*command, tmp_path / "all")
    assert code == 0
    assert json.loads(out)["top"][0]["prompts"] == 10
    code, out, _ = run(*command, tmp_path / "some", "--limit", 3)
    assert json.loads(out)["top"][0]["prompts"] == 3


def test_trace_prints_why_no_state_can_be_causal(run, tmp_path):
    command = ("trace", "icons", "--part", "unet", "--limit", 2, "--steps", 1, "--out", tmp_path)
    code, out, _ = run(*command)
    assert code == 0
    words = " ".join(out.split())
    assert "so few prompts (1 beside those that set the threshold) cannot show that any of" in words
    assert " no " not in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("load", "nonesuch"), "unknown model 'nonesuch'"),
        (("load", "model.ckpt"), "is a pickle"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("sites",), "Missing argument 'model'"),
        (("demo",), "Missing option '--out'"),
        (("train", "nonesuch"), "no recipe for 'nonesuch': choose icons, icons-judge, lettering or matcher"),
        (("train", "icons-judge", "--seed", "3"), "`seed` of icons-judge is fixed, got 3: leave it out"),
        (("train", "icons", "--no-diffusion"), "`--steps` and `--no-diffusion` are for matcher"),
        (("report", "nonesuch"), "cannot write into 'nonesuch'"),
        (("trace", "icons", "--part", "vae"), "unknown part 'vae': choose text, unet or swap"),
        (("trace", "icons", "--part", "swap"), "a swap needs words for the concept's place: name them with --target"),
        (("trace", "icons", "--part", "swap", "--target", "x", "--screen", "0.2"), "a swap has none"),
        (("trace", "icons", "--screen", "0.2", "--direction", "corrupt"), "what restoring a state does, not what"),
        (("trace", "icons", "--scorer", "{tmp}", "--out", "{tmp}"), "cannot load a CLIP from"),
        (("trace", "icons", "--windows", "--memory", "-3", "--json", "--part", "unet", "--out", "{tmp}"),
         "Invalid value for '--memory': -3.0 is out of range: give 1 to 1000000000.0"),
        (("trace", "icons", "--kind", "smell", "--out", "{tmp}"), "unknown kind of probe 'smell'"),
        (("load", "{model}", "--device", "toaster"), "cannot use device 'toaster'"),
        (("edit", "{model}", "--erase", "a", "--erase", "b", "--replace", "c"), "2 --erase for 1"),
        (("edit", "{model}"), "nothing to edit: name a concept with --erase"),
        (("edit", "{model}", "--erase", "a", "--replace", "b", "--auto", "--neighbours"),
         "--auto chooses the neighbours itself: leave --neighbours out"),
        (("edit", "{model}", "--erase", "a", "--replace", "b", "--auto", "--positions", "subject"),
         "--auto chooses the positions itself"),
        (("edit", "{model}", "--erase", "a", "--replace", "b", "--without", "c"), "name the file with --update"),
        (("edit", "{model}", "--update", "{tmp}/none.safetensors", "--out", "{tmp}/c.safetensors"), "no such change"),
        (("edit", "{model}", "--erase", "cat", "--replace", "dog", "--encoder", "text2", "--out",
          "{tmp}/c.safetensors"), "unknown text encoder 'text2'"),
        (("edit", "{model}", "--erase", "cat", "--replace", "dog", "--strength", "nan", "--out",
          "{tmp}/c.safetensors"), "nan is out of range: give -100 to 100"),
        (("edit", "{model}", "--erase", "cat", "--replace", "dog", "--rank", "0", "--out",
          "{tmp}/c.safetensors"), "Invalid value for '--rank': 0 is out of range: give 1 to 100000"),
        (("edit", "{model}", "--erase", "cat", "--replace", "dog", "--ridge", "-1", "--out",
          "{tmp}/c.safetensors"), "ridge"),
        (("edit", "{model}", "--erase", "cat", "--replace", "dog", "--out", "{tmp}/c.pt"), "safetensors"),
        (("apply", "{model}", "{tmp}/none.safetensors", "--out", "{tmp}/e"), "no such change"),
        (("apply", "{model}", "{tmp}/none.safetensors", "--out", "{tmp}"), "exists already"),
        (("edit", "nonesuch", "--erase", "a", "--replace", "b", "--out", "{tmp}/x.bin"), "end the name in '.safetens"),
        (("export", "nonesuch", "{tmp}/c", "--out", "{tmp}/x.bin"), "end the name in '.safetensors'"),
        (("export", "nonesuch", "{tmp}/c", "--format", "ldm", "--out", "{tmp}/x.ckpt"), "end the name in"),
        (("edit", "nonesuch", "--erase", "a", "--replace", "b", "--strength", "1e300"), "give -100 to 100"),
        (("edit", "nonesuch", "--erase", "a", "--replace", "b", "--preserve-weight", "nan"), "nan is out of range"),
        (("generate", "nonesuch", "a", "--guidance-scale", "nan"), "nan is out of range: give 0 to 1000"),
        (("generate", "nonesuch", "a", "--guidance-scale", "inf"), "inf is out of range"),
        (("generate", "nonesuch", "a", "--steps", "0"), "0 is out of range: give 1 to 1000"),
        (("trace", "nonesuch", "--limit", "-1"), "-1 is out of range"),
        (("trace", "nonesuch", "--screen", "nan"), "nan is out of range"),
        (("trace", "nonesuch", "--noise-samples", "0"), "0 is out of range"),
        (("trace", "nonesuch", "--sigma", "nan", "--out", "{tmp}"), "`sigma` must be a number from 0 on"),
        (("evaluate", "nonesuch", "x", "--size", "0"), "0 is out of range"),
        (("train", "icons", "--minutes", "inf"), "inf is out of range"),
        (("train", "matcher", "--steps", "0"), "0 is out of range"),
        (("train", "icons", "--threads", "0"), "0 is out of range"),
        (("apply", "nonesuch", "x", "--out", "{tmp}/e", "--strength", "nan"), "nan is out of range"),
        *(
            ((*verb, "--seed", seed), f"`seed` must be an integer from 0 to 2**63 - 1, got {seed}.")
            for verb in (
                ("generate", "nonesuch", "a"), ("trace", "nonesuch"), ("evaluate", "nonesuch", "x"),
                ("demo", "--out", "{tmp}/d"), ("match", "a.png", "b.png"), ("train", "icons"),
            )
            for seed in ("-1", "100000000000000000000")
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(run, tiny_folder, tmp_path, arguments, message):
    filled = [a.format(tmp=tmp_path, model=tiny_folder) for a in arguments]
    assert message in refused(run(*filled))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_change_is_refused_and_nothing_is_written(run, tiny_folder, tmp_path):
    damaged = tmp_path / "x.safetensors"
    damaged.write_bytes(b"not a tensor in sight")
    assert "damaged" in refused(run("apply", tiny_folder, damaged, "--out", tmp_path / "e"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_unwritable_folder_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for verb in (("demo",), ("generate", "icons", "a cat"), ("trace", "icons"), ("train", "icons")):
        error = refused(run(*verb, "--out", tmp_path / "file" / "out"))
        assert "cannot write into" in error
        assert "name another folder with --out" in error


def test_a_bug_exits_with_code_1(run):
    def broken():
        raise KeyError("lost")

    cli.app.command("broken")(broken)
    try:
        code, out, err = run("broken")
    finally:
        cli.app.registered_commands.pop()
    assert (code, out) == (1, "")
    assert "KeyError: 'lost' (a fault of overpaint" in err


def test_the_module_runs_as_a_program():
    process = subprocess.run(
        [sys.executable, "-m", "overpaint", "--help"], capture_output=True, text=True, check=True
    )
    verbs = (
        "demo",
        "load",
        "generate",
        "sites",
        "trace",
        "edit",
        "apply",
        "evaluate",
        "report",
        "train",
    )
    assert all(verb in process.stdout for verb in verbs)


def accept_interrupts():
    """Let a child accept SIGINT, also where the tests run in the background of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_exits_with_130_and_leaves_no_partial_file(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "overpaint", "generate", str(tiny_folder), "a cat", "--steps", "999",
               "--out", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "FORCE_COLOR": "1"},
        preexec_fn=accept_interrupts,
    )  # fmt: skip
    try:
        while not process.stderr.read(1):  # the progress bar: the work has begun
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    plain = re.sub(
        r"\x1b\[[0-9;?]*[A-Za-z]", "", err
    )  # the bar erases its line when it has begun one
    assert plain.splitlines()[-1] == "overpaint: stopped by Ctrl-C"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moments", [(0.15, 0.9), (0.1, 0.3, 0.6, 1, 1.5, 2, 2.5, 3, 4, 5)])
@pytest.mark.parametrize("program", ["module", "script"])
def test_ctrl_c_during_the_start_is_one_line_and_code_130(program, moments):
    script = [os.path.join(os.path.dirname(sys.executable), "overpaint")]
    command = [sys.executable, "-m", "overpaint"] if program == "module" else script
    stopped = 0
    for moment in moments:
        process = subprocess.Popen(
            [*command, "load", "icons"],
            stderr=-1,
            stdout=-1,
            text=True,
            preexec_fn=accept_interrupts,
        )
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if process.returncode == 0:  # the verb had ended
            continue
        if "overpaint/" in err or "stopped" in err:  # else the interpreter had not begun our code
            assert (process.returncode, out, err) == (130, "", "overpaint: stopped by Ctrl-C\n")
            stopped += 1
    assert stopped >= len(moments) // 2


INTERRUPTED = {
    "import": "import swallows",
    "destructor": "type('A', (), {'__del__': lambda self: signal.raise_signal(signal.SIGINT)})()",
    "call": "signal.raise_signal(signal.SIGINT)",
}


@pytest.mark.parametrize("place", INTERRUPTED)
def test_ctrl_c_is_not_lost_where_an_exception_would_be(place, tmp_path):
    interrupt = (
        "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept BaseException: pass\n"
    )
    (tmp_path / "swallows.py").write_text(interrupt)
    code = (
        "import signal, types\nfrom overpaint import cli\n"
        f"def run():\n    try: {INTERRUPTED[place]}\n    finally: print('cleaned')\n    print('not stopped')\n"
        "cli.app = types.SimpleNamespace(main=run)\ncli.main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, preexec_fn=accept_interrupts
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (130, "overpaint: stopped by Ctrl-C\n")
    assert process.stdout == ("cleaned\n" if place == "call" else "")


def test_ctrl_c_stays_ignored_where_the_shell_ignores_it():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import sys; sys.argv = ['overpaint', '--version']\n"
        "from overpaint import cli\n"
        "try: cli.main()\n"
        "finally: assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.fixture
def outputs(tiny_folder, tmp_path):
    """Verbs that write files, as their arguments, and a file that each writes."""
    change, out = tmp_path / "c.safetensors", tmp_path / "out"
    return {
        "edit": (("edit", tiny_folder, "--erase", "cat", "--replace", "dog", "--out", change), change),
        "lora": (("export", tiny_folder, change, "--out", out / "l.safetensors"), out / "l.safetensors"),
        "ldm": (
            ("export", tiny_folder, change, "--format", "ldm", "--out", out / "m.safetensors"),
            out / "m.safetensors",
        ),
        "generate": (("generate", tiny_folder, "a cat", "--steps", 1, "--out", out), out / "0000.png"),
    }  # fmt: skip


def test_files_that_exist_are_replaced_with_force_only(run, outputs, tmp_path):
    (tmp_path / "out").mkdir()
    for command, path in outputs.values():
        assert run(*command)[0] == 0
        path.write_bytes(b"mine")
        error = refused(run(command[0], "nonesuch", *command[2:]))  # before a model is loaded
        assert (
            "exists already: choose another place with --out, or replace it with --force" in error
        )
        assert path.read_bytes() == b"mine"
        assert run(*command, "--force")[0] == 0
        assert path.read_bytes() != b"mine"
        if path.name == "c.safetensors":
            continue
        path.unlink()
    folder = tmp_path / "d.safetensors"
    folder.mkdir()
    command = ("edit", "nonesuch", "--erase", "a", "--replace", "b", "--force", "--out", folder)
    assert "is a folder: name a file" in refused(run(*command))


def test_every_file_has_the_permissions_of_the_umask(run, outputs, tiny_folder, tmp_path):
    (tmp_path / "out").mkdir()
    trace = ("trace", tiny_folder, "--features-only", "--limit", 1, "--out", tmp_path / "out" / "t")
    folder = ("export", tiny_folder, tmp_path / "c.safetensors", "--format", "folder", "--out")
    before = os.umask(0o027)
    try:
        for command in (
            *(c for c, _ in outputs.values()),
            trace,
            (*folder, tmp_path / "out" / "m"),
        ):
            assert run(*command)[0] == 0
    finally:
        os.umask(before)
    written = [p for p in tmp_path.rglob("*") if p.name != "lock"]
    assert {p.suffix for p in written} >= {".safetensors", ".png", ".json", ".parquet", ".md"}
    for path in written:
        if path != tmp_path / "out":
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_verb_removes_the_drafts_of_killed_processes_in_its_folder(run, tiny_folder, tmp_path):
    (tmp_path / f".other.png.{2**22 + 1}.part").write_bytes(b"half")
    run("generate", tiny_folder, "a cat", "--steps", 1, "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"0000.png", "pictures.json"}
