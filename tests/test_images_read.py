"""Pictures from files, PIL images, arrays and tensors; invalid ones raise."""

import numpy as np
import pytest
import torch
from matchers import texture
from PIL import Image

from overpaint.images.read import load_picture


def test_grey_becomes_rgb_and_transparency_becomes_white(tmp_path):
    grey = (texture(20, 30)[0] * 255).round().byte().numpy()
    expected = torch.from_numpy(grey).expand(3, -1, -1) / 255
    for form in (grey, grey[..., None], Image.fromarray(grey)):
        assert torch.equal(load_picture(form, "image")[0], expected)
    assert torch.equal(load_picture(grey > 127, "image")[0], (expected > 0.5).float())
    clear = np.zeros((20, 30, 4), np.uint8)
    clear[:10, :, 3] = 255
    for form in (clear, Image.fromarray(clear)):
        picture = load_picture(form, "image")[0]
        assert picture[:, :10].max() == 0
        assert picture[:, 10:].min() == 1


def test_white_is_the_maximum_of_the_dtype(tmp_path):
    """Bytes end at 255, 16 bits at 65535 in either order of bytes, booleans and floats at 1."""
    grey = (texture(20, 30)[0] * 255).round().byte().numpy()
    expected = torch.from_numpy(grey).expand(3, -1, -1) / 255
    deep = grey.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    share = (grey / 255).astype(np.float32)
    forms = [
        deep, deep.astype(">u2"), torch.from_numpy(deep), tmp_path / "deep.png", Image.fromarray(deep),
        Image.fromarray(deep.astype(np.int32)), share, share.astype(">f8"), Image.fromarray(share),
        torch.from_numpy(share)[None], grey[:, ::-1][:, ::-1],
    ]  # fmt: skip
    for form in forms:
        assert (load_picture(form, "image")[0] - expected).abs().max() < 1e-6
    half = torch.from_numpy(share).half()
    assert (load_picture(half, "image")[0] - expected).abs().max() < 1e-3


def test_the_exif_orientation_is_applied(tmp_path):
    rows = (texture(20, 30) * 255).round().byte().permute(1, 2, 0).numpy()
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(rows)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    turned.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(load_picture(tmp_path / "a.png", "a"), load_picture(rows, "a"))


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (torch.zeros(3, 1, 1), ValueError, "`image_a` is 1x1 pixels: each side must be at least 8"),
        (np.zeros((0, 0, 3), np.uint8), ValueError, "`image_a` is 0x0 pixels"),
        (torch.zeros(1).expand(3, 8000, 8000), ValueError, "has 64.0 megapixels, the limit is 60: make"),
        (Image.new("1", (10000, 6001)), ValueError, "has 60.0 megapixels, the limit is 60"),
        (torch.full((3, 9, 9), torch.nan), ValueError, "`image_a` holds values that are not finite"),
        (torch.full((3, 9, 9), 200.0), ValueError, r"must be in \[0, 1\], got 200 to 200: divide by 255"),
        (torch.zeros(2, 9, 9), ValueError, r"must have shape \(3, H, W\), .* got \(2, 9, 9\): give one"),
        (torch.zeros(4, 3, 9, 9), ValueError, r"got \(4, 3, 9, 9\): give one picture"),
        (np.zeros((9, 9, 5)), ValueError, r"must have shape \(H, W\), .* got \(9, 9, 5\)"),
        (np.zeros((9, 9), np.int64), ValueError, "must be bytes, unsigned 16-bit .*, got torch.int64: convert it"),
        (torch.zeros(9, 9).short(), ValueError, "got torch.int16: convert it to floats, divided by the value"),
        (np.zeros((9, 9), "U3"), TypeError, "an array must hold numbers of at most 64 bits, got <U3: convert"),
        (7, TypeError, "must be a path, a PIL image, an array or a tensor, got int: convert"),
        ("/nowhere/a.png", ValueError, "there is no file '/nowhere/a.png': check the path"),
    ],
)  # fmt: skip
def test_invalid_pictures_raise(image, error, text):
    with pytest.raises(error, match=text):
        load_picture(image, "image_a")


def test_files_without_a_valid_picture_raise(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("not a picture")
    with pytest.raises(
        ValueError, match="`image`: cannot read .*a.png' as a picture: save it as PNG"
    ):
        load_picture(path, "image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot read"):
        load_picture(path, "image")
    with pytest.raises(ValueError, match="cannot read"):
        load_picture(tmp_path, "image")
    Image.new("1", (14000, 14000)).save(path)
    with pytest.raises(ValueError, match="larger than 60 megapixels: make it smaller"):
        load_picture(path, "image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM"])
def test_an_open_image_with_a_truncated_file_raises(kind, tmp_path):
    path = tmp_path / "a"
    rows = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    Image.fromarray(rows).save(path, kind)
    path.write_bytes(path.read_bytes()[:2000])
    with (
        Image.open(path) as image,
        pytest.raises(
            ValueError, match=r"`a`: the open image cannot be read to its end \(.+\): get its file"
        ),
    ):
        load_picture(image, "a")
