"""Regions with corners far outside of the picture."""

import numpy as np
import pytest
import torch

from overpaint.scene_text.geometry import read_region


@pytest.mark.parametrize("far", [1e5, 1e8, 1e12])
def test_a_polygon_that_reaches_far_beyond_the_picture_covers_what_lies_within(far):
    region = read_region([(-far, 20), (far, 20), (far, 40), (-far, 40)], (91, 133))
    rows = np.flatnonzero(region.mask.any(1))
    assert region.mask[20:40].all() and rows[0] >= 19 and rows[-1] <= 41
    box = read_region((-far, 20, 2 * far, 20), (91, 133))
    expected = torch.zeros(91, 133, dtype=torch.bool)
    expected[20:40] = True
    assert torch.equal(box.mask, expected)
    with pytest.raises(ValueError, match="outside of the picture"):
        read_region([(far, 20), (far + 50, 20), (far, 40)], (91, 133))
