"""Batches of equal shape."""

from overpaint.trace.batches import equal_chunks


def test_equal_chunks_keep_one_shape():
    parts = list(equal_chunks(list("abcdefg"), 3))
    assert parts == [(["a", "b", "c"], 3), (["d", "e", "f"], 3), (["g", "g", "g"], 1)]
    assert list(equal_chunks(list("abcd"), 3)) == [(["a", "b"], 2), (["c", "d"], 2)]
    assert list(equal_chunks([], 3)) == [([], 0)]
    rows = {"rows": lambda n: n + 2, "multiple": 4, "fill": "-"}
    assert list(equal_chunks(list("abc"), 4, **rows)) == [(["a", "b"], 2), (["c", "-"], 1)]
    assert list(equal_chunks(list("abc"), 8, **rows)) == [(["a", "b", "c", "-", "-", "-"], 3)]
    assert list(equal_chunks(list("abc"), 7, **rows)) == [(["a", "b"], 2), (["c", "-"], 1)]
    assert list(equal_chunks([], 3, **rows)) == [(["-", "-"], 0)]
