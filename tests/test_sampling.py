"""Settings of drawing."""

import pytest

from overpaint.model.sampling import Drawing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"solver": "euler"}, "unknown solver 'euler': choose one of own, ddim, dpm"),
        ({"seeds": ()}, "`seeds` is empty: give at least one"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"memory": 0}, "`memory` must be a positive number of MiB, got 0"),
        ({"memory": float("nan")}, "`memory` must be a positive number of MiB, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Drawing(**settings)


def test_equal_settings_are_equal_values_whatever_sequence_holds_the_seeds():
    assert Drawing(seeds=range(3)) == Drawing(seeds=[0, 1, 2]) == Drawing(seeds=(0, 1, 2))
    assert hash(Drawing()) == hash(Drawing(steps=10, solver="dpm"))
