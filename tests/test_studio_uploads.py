"""Uploaded and downloaded files: limits, damaged files, safe names."""

import re
import struct
import zlib

import pytest
import torch
from PIL import Image

from overpaint.studio import uploads
from overpaint.studio.tasks import PromptSettings

HOSTILE = "<script>alert(1)</script> ' \" & {{7}} ${alert(2)} `x` <img src=x onerror=alert(3)>"


def png(width, height, *, chunks=()):
    """Return a PNG whose header states a size; its pixel data are one zero byte."""

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks)]
    parts += [chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"is empty \(0 bytes\): upload it again"),
        (b"GIF89a nothing", "cannot be read as a picture: choose a PNG"),
        (b"\x89PNG\r\n\x1a\n cut", "cannot be read as a picture"),
        (png(10_000, 10_000), "has more than 16 megapixels and was not decoded"),
        (png(5000, 5000), "has more than 16 megapixels and was not decoded"),
        (png(60_000, 60_000), "has more than 16 megapixels and was not decoded"),
        (png(8, 8), "does not contain the settings it was drawn with: choose a PNG that the studio"),
        (png(8, 8, chunks=[(b"tEXt", b"overpaint\0[1]")]), "is damaged: its settings cannot be read"),
        (png(8, 8, chunks=[(b"tEXt", b'overpaint\0{"seeds": [1e400]}')]), "is damaged: its settings cannot be"),
        (png(8, 8, chunks=[(b"zTXt", b"overpaint\0\0" + zlib.compress(b"a" * 10**8))]), "cannot be read|is damaged"),
    ],
    ids=["empty", "gif", "cut", "100 megapixels", "25 megapixels", "bomb", "foreign", "list", "infinite seed",
         "text bomb"],
)  # fmt: skip
def test_pictures_that_the_studio_did_not_save_are_refused(tmp_path, content, message):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"'a.png' {message}"):
        uploads.load_origin(path)


def test_a_saved_picture_contains_its_settings(tmp_path):
    settings = PromptSettings(HOSTILE, "noto style", (4, 5), 6)
    path = uploads.save_picture(Image.new("RGB", (8, 8)), settings, "icons", tmp_path / "a.png")
    assert uploads.load_origin(path) == uploads.PictureOrigin(settings, "icons")
    assert list(tmp_path.iterdir()) == [path]


def test_change_files_that_are_damaged_or_of_another_model_are_refused(
    tmp_path, tiny_sd1, copied, quickfix_change
):
    path = tmp_path / "a.safetensors"
    quickfix_change.save(path)
    assert uploads.load_change(path, tiny_sd1).digest == quickfix_change.digest
    intact = path.read_bytes()
    with torch.no_grad():
        next(w for n, w in copied.text_encoder.named_parameters() if "out_proj.weight" in n).add_(1)
    with pytest.raises(ValueError, match="'a.safetensors' was not opened: wrong base hash"):
        uploads.load_change(path, copied)
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(ValueError, match="'a.safetensors' is damaged") as error:
        uploads.load_change(path, tiny_sd1)
    assert str(tmp_path) not in str(error.value)
    for content, message in ((b"", "is empty"), (b"PK\3\4 a zip", "damaged or not a safetensors")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            uploads.load_change(path, tiny_sd1)


def test_uploads_above_the_limit_are_not_read(tmp_path, tiny_sd1):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(uploads.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="256 MiB, and at most 256 are allowed: choose a smaller"):
        uploads.load_change(path, tiny_sd1)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "", "a/b\\c", "\0\n", "日本", HOSTILE, "x" * 300]
)
def test_names_of_downloads_stay_in_their_folder(tmp_path, quickfix_change, name):
    path = uploads.save_change(quickfix_change, tmp_path / "session", name)
    assert path.parent == tmp_path / "session"
    assert re.fullmatch(r"[a-z0-9-]{1,60}\.safetensors", path.name)
    assert [p.name for p in tmp_path.iterdir()] == ["session"]


def test_shown_names_have_no_folder_and_no_control_characters():
    assert uploads.shown_name("/tmp/x/..\\evil\u202e\n.png") == "evil.png"
    assert uploads.shown_name("/") == "file"
    assert len(uploads.shown_name("x" * 300)) <= 80
