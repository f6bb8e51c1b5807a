"""What a studio is sent and told: files, names, HTML, doors. Nothing is executed, nothing is lost."""

import os
import re
import socket
import struct
import sys
import zlib
from types import SimpleNamespace

import pytest
from PIL import Image

import overpaint as op
from overpaint.studio import (
    Studio,
    handlers,
    html,
    server,
    uploads,
)
from overpaint.studio.handlers import Setting
from overpaint.studio.scheduler import Progress
from overpaint.studio.server import check_access, check_models, check_port
from overpaint.studio.session import Bench, Coat
from overpaint.studio.tasks import Drawn, Map, Picture, Question


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SCRIPT = "<script>alert(1)</script>"
NASTY = f"{SCRIPT} ' \" & {{{{7}}}} ${{alert(2)}} `x` <img src=x onerror=alert(3)>"


@pytest.fixture
def studio(tiny_folder, tmp_path):
    return Studio([str(tiny_folder)], tmp_path / "downloads")


@pytest.fixture(scope="module")
def change(tiny_sd1):
    return op.edit.quickfix(tiny_sd1, {"blob style": "noto style"})


def png(width, height, *, chunks=()):
    """Return a PNG whose head claims a size; its pixels are one zero byte."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *(chunk(*c) for c in chunks)]
    parts += [chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", r"is empty \(0 bytes\): send it again"),
        (b"GIF89a nothing", "is no picture that can be read: send a PNG"),
        (b"\x89PNG\r\n\x1a\n cut", "is no picture that can be read"),
        (png(10_000, 10_000), "has more than 16 megapixels and was not decoded"),
        (png(5000, 5000), "has more than 16 megapixels and was not decoded"),
        (png(60_000, 60_000), "has more than 16 megapixels and was not decoded"),
        (png(8, 8), "does not say how it was drawn: send a PNG that was downloaded"),
        (png(8, 8, chunks=[(b"tEXt", b"overpaint\0[1]")]), "is damaged: what it says of how"),
        (png(8, 8, chunks=[(b"tEXt", b'overpaint\0{"seeds": [1e400]}')]), "is damaged: what it says of how"),
        (png(8, 8, chunks=[(b"zTXt", b"overpaint\0\0" + zlib.compress(b"a" * 10**8))]), "is no picture|is damaged"),
    ],
    ids=["empty", "gif", "cut", "100 megapixels", "25 megapixels", "bomb", "foreign", "list", "endless",
         "text bomb"],
)  # fmt: skip
def test_pictures_that_are_none_of_ours_are_refused(tmp_path, content, words):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"'a.png' {words}"):
        uploads.read_picture(path)


def test_a_picture_of_the_studio_gives_its_question_back(tmp_path):
    asked = Question(NASTY, "noto style", (4, 5), 6)
    path = uploads.write_picture(Image.new("RGB", (8, 8)), asked, "icons", tmp_path / "a.png")
    assert uploads.read_picture(path) == uploads.Origin(asked, "icons")
    assert list(tmp_path.iterdir()) == [path]


def test_change_files_that_are_damaged_or_of_another_model_are_refused(
    tmp_path, tiny_sd1, tiny_double, change
):
    path = tmp_path / "a.safetensors"
    change.save(path)
    assert uploads.read_change(path, tiny_sd1).digest == change.digest
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="'a.safetensors' was not opened: wrong base hash"):
        uploads.read_change(path, tiny_double)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="'a.safetensors' is damaged") as told:
        uploads.read_change(path, tiny_sd1)
    assert str(tmp_path) not in str(told.value)
    for content, words in ((b"", "is empty"), (b"PK\3\4 a zip", "damaged or no safetensors")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            uploads.read_change(path, tiny_sd1)


def test_uploads_beyond_the_limit_are_not_read(tmp_path, tiny_sd1):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(uploads.LARGEST + 1)
    with pytest.raises(ValueError, match="has 256 MiB and at most 256 are read: send a smaller"):
        uploads.read_change(path, tiny_sd1)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "", "a/b\\c", "\0\n", "日本", NASTY, "x" * 300]
)
def test_names_of_downloads_stay_in_their_folder(tmp_path, change, name):
    path = uploads.write_change(change, tmp_path / "own", name)
    assert path.parent == tmp_path / "own"
    assert re.fullmatch(r"[a-z0-9-]{1,60}\.safetensors", path.name)
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_names_are_shown_without_their_folder_or_control_characters():
    assert uploads.shown_name("/tmp/x/..\\evil\u202e\n.png") == "evil.png"
    assert uploads.shown_name("/") == "file"
    assert len(uploads.shown_name("x" * 300)) <= 80


# --- HTML -------------------------------------------------------------------------------------------------------------


def test_no_word_of_a_user_becomes_html_or_template(change):
    asked = Question(NASTY, NASTY, (0,), 1)
    image = Image.new("RGB", (2, 2))
    coat = Coat(NASTY, change)
    made = [
        html.alert(NASTY), html.note(NASTY), html.progress(Progress(0.5, NASTY, 3.0)),
        html.heat_map(Map(asked, (NASTY,), (("eos", 1, NASTY),), ((0.5,),), "text")),
        html.restored([Picture(image, NASTY, NASTY)]),
        html.grid(Drawn(asked, (NASTY, "after"), ((image,), (None,)))),
        html.coats(Bench((coat,), change)), html.facts({NASTY: change, "b": None}),
    ]  # fmt: skip
    for page in made:
        rest = re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
        assert "alert(1)" in rest or "Alert(1)" in rest
        assert "<script" not in rest and "<img src=x" not in rest
        assert not set("{}$`") & set(rest)
        values = re.findall(r'[\w-]+="([^"]*)"', rest)
        assert not any("<" in value for value in values)


def test_the_heat_map_names_every_cell_and_marks_the_chosen_one():
    asked = Question("a cat in blob style", "blob style")
    columns = (("subject", 4, "blob"), ("eos", 6, "end of text"))
    found = Map(
        asked, ("text.0.self_attn", "text2.1.mlp"), columns, ((0.5, -0.001), (None, 0.25)), "text"
    )
    page = html.heat_map(found, (0, 0))
    assert page.count("<button") == 3
    assert (
        'aria-label="layer 0 attention at blob: 0.50. Show the picture." aria-pressed="true"'
        in page
    )
    assert 'style="--v: 0.500" data-cell="1,1"' in page
    assert ">0.00<" in page and "-0.00" not in page
    assert "layer 1 MLP of encoder 2" in page
    assert page.index("layer 1") < page.index("layer 0")


# --- handlers ---------------------------------------------------------------------------------------------------------


SETTING = Setting("a cat in blob style", "blob style", 0, 1, 1)


def test_handlers_say_what_is_wrong_in_the_page(studio):
    key = studio.open()
    wrong = {
        "That is no cell of the map": handlers.restore(studio, key, "../1"),
        "There is no map yet: press Trace first": handlers.restore(studio, key, "0,0"),
        "Seed, pictures and steps must be whole numbers": handlers.trace(
            studio, key, Setting("a", "a", None, 1, 1), False
        ),
        "No words to look for": handlers.trace(studio, key, Setting("a cat", "", 0, 1, 1), False),
        "Nothing to undo": handlers.undo(studio, key, SETTING),
        "There is no coat to dial": handlers.dial(studio, key, SETTING, 1),
        "Unknown model &#x27;/etc&#x27;": handlers.choose(studio, key, "/etc"),
    }
    for words, updates in wrong.items():
        *_, final = updates
        assert f'<p class="op-alert" role="alert">{words}' in final["status"]
    assert studio.session(key).bench.coats == ()


def test_a_session_that_ended_is_said_by_every_control(studio):
    some = Setting("a cat", "cat", 0, 1, 1)
    told = [
        *handlers.trace(studio, "", some, False), *handlers.restore(studio, "", "0,0"), handlers.stop(studio, ""),
        *handlers.paint(studio, "", some, "dog", "auto", ""), *handlers.draw(studio, "", some),
        *handlers.dial(studio, "", some, 1), *handlers.undo(studio, "", some), *handlers.add(studio, "", "x", some),
        *handlers.compare(studio, "", some, "a", "b"), *handlers.choose(studio, "", studio.models[0]),
    ]  # fmt: skip
    assert len(told) == 10
    assert all("This session has ended: load the page again" in t["status"] for t in told)


def test_only_a_page_that_is_loaded_begins_a_session(studio):
    page = pytest.importorskip("overpaint.studio.layout", exc_type=ModuleNotFoundError)
    gone = []
    keys, mine, other = (
        page._Keys(studio, gone.append),
        *(SimpleNamespace(session_hash=n) for n in "ab"),
    )
    assert (keys.of(mine), len(studio)) == ("", 0)
    key = keys.opened(mine)
    assert keys.of(mine) == keys.opened(mine) == key
    studio.close(key)
    assert not studio.holds(keys.of(mine))
    keys.opened(other)
    assert list(keys._known) == ["b"]
    keys.forget(other)
    assert (keys.of(other), len(studio), gone) == ("", 0, ["b"])


def test_texts_beyond_what_the_page_takes_are_refused(studio):
    key = studio.open()
    for lengths in ((2001, 0, 0, 0), (0, 401, 0, 0), (0, 0, 401, 0), (0, 0, 0, 8001)):
        prompt, concept, new, kept = ("a" * length or "a" for length in lengths)
        asked = Setting(prompt, concept, 0, 1, 1)
        (final,) = handlers.paint(studio, key, asked, new, "quickfix", kept)
        most = max(lengths) - 1
        assert f"must be at most {most} characters, got {most + 1}: cut" in final["status"]


def test_a_fault_of_ours_is_said_and_the_studio_goes_on(studio, monkeypatch):
    key = studio.open()

    def broken(*_, **__):
        raise RuntimeError(SCRIPT)

    monkeypatch.setattr("overpaint.studio.tasks.make", broken)
    *_, final = handlers.paint(studio, key, SETTING, "noto style", "quickfix", "")
    assert "A fault of overpaint: RuntimeError: &lt;script&gt;" in final["status"]
    monkeypatch.undo()
    *_, final = handlers.paint(studio, key, SETTING, "noto style", "quickfix", "a dog\n\n")
    assert final["status"] == "" and "<img" in final["drawn"]
    (coat,) = studio.session(key).bench.coats
    assert coat.change.protocol["preserve"] == ["a dog"]


def test_stop_in_the_middle_says_so_and_the_coat_that_was_finished_stays(studio):
    key = studio.open()
    updates = handlers.paint(studio, key, Setting("a cat", "cat", 0, 4, 30), "dog", "quickfix", "")
    for update in updates:
        if "forecast" in update:
            assert "Stopping after this step" in handlers.stop(studio, key)["status"]
    assert "Stopped. What was finished before is kept." in update["status"]
    assert len(studio.session(key).bench.coats) == 1
    assert "Nothing runs" in handlers.stop(studio, key)["status"]


@pytest.mark.parametrize("move", [handlers.undo, lambda *given: handlers.dial(*given, 0.5)])
def test_stop_of_a_forecast_draws_nothing_after_it(studio, monkeypatch, move):
    key = studio.open()
    for concept in ("blob style", "a cat"):
        asked = Setting("a cat in blob style", concept, 0, 1, 1)
        *_, final = handlers.paint(studio, key, asked, "noto style", "quickfix", "")
        assert "<img" in final["drawn"]

    def stopped(*_, step):
        handlers.stop(studio, key)
        step(0, 1, "foretelling")

    monkeypatch.setattr("overpaint.studio.app.collateral", stopped)
    updates = list(move(studio, key, SETTING))
    assert "Stopped. What was finished before is kept." in updates[-1]["status"]
    assert not any("drawn" in update for update in updates)


def test_an_uploaded_picture_fills_the_controls(studio, tmp_path):
    asked = Question("a dog", "dog", (7, 8), 9)
    path = uploads.write_picture(Image.new("RGB", (2, 2)), asked, "icons", tmp_path / "a.png")
    *_, final = handlers.add(studio, studio.open(), str(path), SETTING)
    assert {n: final[n] for n in ("prompt", "concept", "seed", "pictures", "steps")} == {
        "prompt": "a dog", "concept": "dog", "seed": 7, "pictures": 2, "steps": 9,
    }  # fmt: skip


def test_a_picture_of_another_model_says_which_and_what_to_do(studio, tiny_folder, tmp_path):
    key, asked = studio.open(), Question("a dog", "dog", (7,), 9)
    studio.models = (*studio.models, "icons")
    mine = tiny_folder.name
    for model, words in (
        (str(tiny_folder), ""),
        ("icons", f"drawn by icons, and {mine} is on the easel: choose icons above to draw it"),
        (
            "<b>sd14",
            f"drawn by &lt;b&gt;sd14, and {mine} is on the easel: open the studio with &lt;b",
        ),
    ):
        path = uploads.write_picture(Image.new("RGB", (2, 2)), asked, model, tmp_path / "a.png")
        assert str(tmp_path).encode() not in path.read_bytes()
        *_, final = handlers.add(studio, key, str(path), SETTING)
        assert final["prompt"] == "a dog"
        assert ("op-alert" in final["status"], words in final["status"]) == (bool(words), True)


def test_a_trace_that_the_judge_cannot_see_says_so_beside_the_map(studio):
    key, few = studio.open(), Setting("a cat in blob style", "blob style", 0, 1, 1)
    for pictures in (False, True):
        *_, final = handlers.trace(studio, key, few, pictures)
        words = "Judged by text features, not by pictures: the shipped judge reads 64 × 64 pixels, and this model draws"
        assert (words in final["map"]) == pictures
        assert "share of the way that the text features go back" in final["map"]
    *_, chosen = handlers.restore(studio, key, "0,0")
    assert words in chosen["map"]


def test_a_sheet_of_pictures_can_be_saved_and_opened_again(studio):
    key = studio.open()
    asked = Setting("a cat in blob style", "blob style", 5, 2, 1)
    *_, final = handlers.paint(studio, key, asked, "noto style", "quickfix", "")
    path = final["saved"].value
    assert path.name == "a-cat-in-blob-style.png"
    *_, done = studio.draw(key, handlers.question(asked))
    drawn = [image for row in done.value.rows for image in row]
    side = drawn[0].width
    with Image.open(path) as sheet:
        assert sheet.size == (2 * side + 2, 2 * side + 2)
        corners = [(j * (side + 2), i * (side + 2)) for i in (0, 1) for j in (0, 1)]
        tiles = [sheet.crop((x, y, x + side, y + side)).tobytes() for x, y in corners]
    assert tiles == [image.tobytes() for image in drawn]
    *_, back = handlers.add(studio, key, str(path), SETTING)
    assert (back["seed"], back["pictures"]) == (5, 2)


def test_closing_a_session_takes_its_files_along(studio):
    key = studio.open()
    *_, final = handlers.paint(studio, key, SETTING, "noto style", "quickfix", "")
    path = studio.download(key)
    assert path.is_file()
    studio.close(key)
    assert not path.parent.exists()


# --- doors ------------------------------------------------------------------------------------------------------------


def test_who_may_come_in():
    assert check_access("127.0.0.1", None, no_auth=False) is None
    assert check_access("::1", None, no_auth=False) is None
    assert check_access("[::1]", None, no_auth=False) is None
    assert check_access("0.0.0.0", "ada:a:b", no_auth=False) == ("ada", "a:b")
    assert check_access("0.0.0.0", None, no_auth=True) is None
    for host in ("0.0.0.0", "192.168.1.4", "example.org", "::"):
        with pytest.raises(ValueError, match=f"--host {host} lets others in: say --auth"):
            check_access(host, None, no_auth=False)
    for auth in ("ada", ":x", "ada:"):
        with pytest.raises(ValueError, match="--auth must be USER:PASSWORD"):
            check_access("127.0.0.1", auth, no_auth=False)
    with pytest.raises(ValueError, match="say opposite things"):
        check_access("0.0.0.0", "a:b", no_auth=True)


def test_a_port_in_use_is_said_before_any_work(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} .*in use.*--port"):
            check_port("127.0.0.1", port)
        code, out, err = run("studio", "--port", port)
    assert (code, out) == (2, "")
    assert err.startswith(f"overpaint: cannot listen on 127.0.0.1:{port}")
    with pytest.raises(ValueError, match="must be 1 to 65535, got 0"):
        check_port("127.0.0.1", 0)


def test_the_environment_is_put_back_also_after_a_fault(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "mine")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    before, port = dict(os.environ), free_port()
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "overpaint.studio.layout", raising=False)
    with pytest.raises(op.MissingExtra), server.open_studio(["icons"], port=port):
        pass
    assert dict(os.environ) == before
    with server._environment(GRADIO_TEMP_DIR="ours"):
        assert os.environ["GRADIO_TEMP_DIR"] == "ours"
    assert dict(os.environ) == before


def test_models_that_cannot_be_are_refused_before_the_page_opens(tmp_path):
    check_models(["icons", str(tmp_path), "owner/name"])
    for name in ("nope", "../x", "/etc/shadow", "icons-judge"):
        with pytest.raises(ValueError, match=f"unknown model '{name}': it is neither a folder"):
            check_models([name])


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "overpaint.studio.layout", raising=False)
    with pytest.raises(op.MissingExtra, match=r"not installed: pip install 'overpaint\[studio\]'"):
        server._page(None)
