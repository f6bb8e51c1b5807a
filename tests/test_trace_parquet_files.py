"""Parquet files of effects: what pyarrow writes is read, and small files that would take much memory are refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overpaint.trace.parquet_files import read_table
from overpaint.trace.parquet_footer import codecs
from overpaint.trace.states import SCHEMA


def table(rows, text="a"):
    empty = {field.name: pa.nulls(rows, field.type) for field in SCHEMA}
    return pa.table({**empty, "site": pa.array([text] * rows)}, SCHEMA)


@pytest.mark.parametrize("codec", ["NONE", "SNAPPY", "GZIP", "ZSTD", "BROTLI"])
def test_the_footer_names_the_codec(tmp_path, codec):
    path = tmp_path / "a.parquet"
    pq.write_table(table(5), path, compression=codec)
    numbers = {"NONE": 0, "SNAPPY": 1, "GZIP": 2, "BROTLI": 4, "ZSTD": 6}
    assert codecs(path.read_bytes()) == {numbers[codec]}
    if numbers[codec] < 2:
        assert read_table(path).equals(table(5))
    else:
        with pytest.raises(ValueError, match="compressed in another way"):
            read_table(path)


@pytest.mark.parametrize(("rows", "text"), [(30_000_000, ""), (100_000, "x" * 50_000)])
def test_a_small_file_with_many_rows_or_a_repeated_text_is_refused(tmp_path, rows, text):
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [text])
    pq.write_table(pa.table({"site": column}), path)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ValueError, match=r"far more (memory|rows)"):
        read_table(path)


def test_a_footer_that_nests_or_ends_early_is_refused():
    for footer in (b"\x1c" * 100, b"\x48\xff\xff\xff\xff\x0f", b"\x15\xff" * 20, b"", b"\x0d"):
        with pytest.raises(ValueError, match="footer"):
            codecs(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1" + footer[:0])
    with pytest.raises(ValueError, match="longer than the file"):
        codecs(b"PAR1" + b"\xff" * 4 + b"PAR1")
