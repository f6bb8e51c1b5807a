"""Flow fields: signs, axes and corners against OpenCV, by hand, and on photographs with ground truth."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from overpaint.images.read import load_picture
from overpaint.match import flow as flows

PHOTOGRAPHS = Path(__file__).parent.parent / "runs" / "photographs"


def smooth(h, w, seed=0):
    """A picture without edges, so that interpolation hardly matters."""
    noise = torch.rand(1, 3, h // 8 + 2, w // 8 + 2, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (h, w), mode="bicubic").clamp(0, 1)


def random_homographies(count, h, w):
    """Corners of the picture moved by up to a sixth of it, as matrices of source to target."""
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    rng = np.random.default_rng(0)
    corners = np.array([[0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]], np.float32)
    for _ in range(count):
        moved = corners + rng.uniform(-1, 1, (4, 2)).astype(np.float32) * [w / 6, h / 6]
        yield torch.from_numpy(cv2.getPerspectiveTransform(corners, moved.astype(np.float32)))


def photograph(name):
    """Return the path of a photograph of a data package; skip the test if it is missing."""
    from overpaint.train import photographs

    try:
        return photographs.locate(name, PHOTOGRAPHS)
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def graf():
    """Both views, and both flows: on the third pointing into the first, and the other way."""
    views = [load_picture(photograph(f"opencv-doc/data/graf{i}.png"), "graf") for i in (1, 3)]
    text = photograph("opencv-doc/data/H1to3p.xml").read_text()
    data = re.search(r"<data>(.*?)</data>", text, re.DOTALL)
    assert data is not None
    matrix = torch.tensor([float(x) for x in data[1].split()], dtype=torch.float64).view(3, 3)
    both = [flows.homography_flow(m, (640, 800)) for m in (matrix, torch.linalg.inv(matrix))]
    return views, both


def correlation(a, b, where):
    pair = torch.stack([a.mean(1)[where], b.mean(1)[where]]).double()
    return float(torch.corrcoef(pair)[0, 1])


def test_flow_to_mapping_and_back_is_exact():
    flow = torch.randint(-64, 64, (2, 2, 9, 13)) / 8
    assert torch.equal(flows.to_flow(flows.to_mapping(flow)), flow)
    grid = flows.pixel_grid(2, 3)
    assert grid[0].tolist() == [[[0, 1, 2], [0, 1, 2]], [[0, 0, 0], [1, 1, 1]]]


@pytest.mark.parametrize("size", [(33, 57), (256, 256)])
def test_zero_flow_changes_nothing(size):
    image = torch.rand(2, 3, *size)
    assert (flows.warp(image, torch.zeros(1, 2, *size)) - image).abs().max() < 1e-5


def test_a_shift_moves_an_impulse_by_its_vector():
    impulse = torch.zeros(1, 1, 32, 48)
    impulse[0, 0, 10, 20] = 1
    flow = torch.tensor([7.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 32, 48)
    warped = flows.warp(impulse, flow)
    assert warped[0, 0, 13, 13] == pytest.approx(1, abs=1e-5)  # it came from (20, 10)
    assert warped.sum() == pytest.approx(1, abs=1e-4)


def test_warp_equals_opencvs_remap():
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    image = smooth(60, 90)
    flow = torch.randn(1, 2, 60, 90) * 5
    x, y = flows.to_mapping(flow)[0].numpy()
    theirs = cv2.remap(image[0].permute(1, 2, 0).numpy(), x, y, cv2.INTER_LINEAR)
    ours = flows.warp(image, flow)[0].permute(1, 2, 0).numpy()
    assert np.abs(theirs - ours).max() < 8 / 255  # OpenCV rounds places to 1/32 pixel
    assert np.abs(theirs - ours).mean() < 1 / 255


def test_homography_flow_equals_opencv_and_the_matrix_inverts_it():
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    h, w = 60, 90
    image = smooth(h, w)
    rows = image[0].permute(1, 2, 0).numpy()
    for matrix in random_homographies(20, h, w):
        flow = flows.homography_flow(matrix, (h, w))
        seen = flows.inside(flow)[0, 0].numpy()
        theirs = cv2.warpPerspective(rows, matrix.numpy(), (w, h))
        ours = flows.warp(image, flow)[0].permute(1, 2, 0).numpy()
        assert np.abs(theirs - ours)[seen].mean() < 1.5 / 255
        # where the flow points to, the matrix itself leads back
        places = flows.to_mapping(flow)[0].flatten(1)
        back = matrix @ torch.cat([places, torch.ones_like(places[:1])])
        home = flows.pixel_grid(h, w, dtype=torch.float64)[0].flatten(1)
        assert (back[:2] / back[2] - home).norm(dim=0)[seen.ravel()].max() < 1e-3


def test_beyond_the_horizon_the_flow_is_nan():
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, -0.02, 1]])  # y = 50 goes to infinity
    flow = flows.homography_flow(torch.linalg.inv(matrix), (80, 20))
    assert torch.isfinite(flow[0, 0, :49]).all()
    assert torch.isnan(flow[0, 0, 51:]).all()
    assert not flows.inside(flow)[0, 0, 51:].any()


def test_resize_is_exact_for_affine_fields():
    grid = flows.pixel_grid(32, 48)
    flow = torch.cat([0.25 * grid[:, :1] - 3, -0.5 * grid[:, 1:] + 2], 1)
    large = flows.resize(flow, (64, 96))
    expected = flows.pixel_grid(64, 96) / 2 - 0.25  # places of the large one on the small one
    expected = torch.cat([0.25 * expected[:, :1] - 3, -0.5 * expected[:, 1:] + 2], 1) * 2
    assert (large - expected)[:, :, 1:-1, 1:-1].abs().max() < 1e-5
    assert (flows.resize(large, (32, 48)) - flow)[:, :, 1:-1, 1:-1].abs().max() < 1e-5


def test_composition_of_shifts_and_of_homographies():
    ab, bc = torch.full((1, 2, 20, 30), 2.0), torch.full((1, 2, 16, 24), -1.5)
    assert torch.equal(flows.compose(ab, bc), torch.full((1, 2, 16, 24), 0.5))
    first, second = list(random_homographies(2, 120, 180))
    ab, bc = (flows.homography_flow(m, (120, 180)) for m in (first, second))
    both = flows.homography_flow(second @ first, (120, 180))
    seen = flows.inside(bc)[:, 0]
    assert (flows.compose(ab, bc) - both).norm(dim=1)[seen].max() < 0.02


def test_consistency_is_the_error_of_the_backward_flow():
    matrix = next(iter(random_homographies(1, 120, 180)))
    there = flows.homography_flow(matrix, (120, 180))
    back = flows.homography_flow(torch.linalg.inv(matrix), (120, 180))
    seen = flows.inside(there)
    assert flows.consistency(there, back)[seen].max() < 0.02
    off = back + torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    assert flows.consistency(there, off)[seen].median() == pytest.approx(5, abs=0.02)


def test_a_written_flow_is_read_bit_for_bit(tmp_path):
    flow = torch.randn(1, 2, 5, 7)
    flows.write_flo(tmp_path / "a.flo", flow)
    assert torch.equal(flows.read_flo(tmp_path / "a.flo"), flow)
    assert [p.name for p in tmp_path.iterdir()] == ["a.flo"]
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    theirs = cv2.readOpticalFlow(str(tmp_path / "a.flo"))
    assert np.array_equal(theirs, flow[0].permute(1, 2, 0).numpy())


def test_invalid_flow_files_raise(tmp_path):
    path = tmp_path / "a.flo"
    path.write_bytes(b"PNG and nothing more")
    with pytest.raises(ValueError, match="is no .flo file: it must start with"):
        flows.read_flo(path)
    flows.write_flo(path, torch.zeros(2, 4, 4))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="a flow of 4x4 takes 140: fetch"):
        flows.read_flo(path)
    with pytest.raises(ValueError, match=r"shape \(2, H, W\), got \(3, 2, 4, 4\)"):
        flows.write_flo(path, torch.zeros(3, 2, 4, 4))


def test_the_homography_of_graf_aligns_its_views(graf):
    views, both = graf
    for source, target, flow, other in ((0, 1, *both), (1, 0, *both[::-1])):
        right, wrong = flows.inside(flow)[:, 0], flows.inside(other)[:, 0]
        assert correlation(flows.warp(views[source], flow), views[target], right) > 0.8
        assert correlation(flows.warp(views[source], other), views[target], wrong) < 0.3
    shares = [flows.inside(flow).double().mean() for flow in both]
    assert shares == pytest.approx([0.549, 0.976], abs=0.002)


def test_resizing_graf_to_64_and_back_is_exact_without_mixed_corners(graf):
    for flow, most in zip(graf[1], (0.031, 0.037), strict=True):
        seen = flows.inside(flow)[:, 0]
        small = flows.resize(flow, (64, 64))
        exact, mixed = (
            (flows.resize(small, (640, 800), align_corners=corners) - flow).norm(dim=1)[seen].mean()
            for corners in (False, True)
        )
        assert exact < most
        assert mixed > 1


def test_the_flow_of_stereo_pairs_points_left():
    left = load_picture(photograph("opencv-doc/data/aloeL.jpg"), "left")
    right = load_picture(photograph("opencv-doc/data/aloeR.jpg"), "right")
    disparity = 255 * load_picture(photograph("opencv-doc/data/aloeGT.png"), "truth")[:, :1]
    check_stereo(left, right, disparity, disparity > 0)
    motorcycle = [photograph(f"skimage/motorcycle_{side}.png") for side in ("left", "right")]
    disparities = np.load(photograph("skimage/motorcycle_disp.npz"))["arr_0"]
    disparity = torch.from_numpy(disparities.astype(np.float32))[None, None]
    known = torch.isfinite(disparity)
    check_stereo(*(load_picture(p, "m") for p in motorcycle), disparity.where(known, 0.0), known)


def check_stereo(left, right, disparity, known):
    flow = torch.cat([-disparity, torch.zeros_like(disparity)], 1)
    for sign in (1, -1):
        seen = (known & flows.inside(sign * flow))[:, 0]
        value = correlation(flows.warp(right, sign * flow), left, seen)
        assert value > 0.9 if sign == 1 else value < 0.6
