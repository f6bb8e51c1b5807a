"""Read Parquet files of effects with bounded memory.

A Parquet file of a few kilobytes can claim billions of rows, or repeat a long text in each of them. The columns are
therefore read in batches, texts as references to the different ones, and reading stops when a file would take far more
memory than its own size.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overpaint.trace.parquet_footer import codecs
from overpaint.trace.states import SCHEMA

__all__ = ["read_table"]

_BATCH = 1024  # rows
_LEAST = (
    2**24
)  # bytes that the columns of any file may take; a larger file may take 64 for each of its own
_CODECS = {0, 1}  # none and Snappy, which cannot hold gigabytes in a few kilobytes


def read_table(path: str | Path) -> pa.Table:
    """Return the columns of `SCHEMA` in a Parquet file, in its order, with the metadata of the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is damaged, has columns of other types, or would take far more memory than its size.
    """
    content = Path(path).read_bytes()
    try:
        return _read(content)
    except (pa.ArrowException, OSError, MemoryError, LookupError) as error:
        raise ValueError(f"the Parquet file {str(path)!r} is damaged: {error}") from error


def _read(content: bytes) -> pa.Table:
    if not codecs(content) <= _CODECS:
        raise ValueError("it is compressed in another way than effects are saved")
    stored = set(pq.read_metadata(pa.BufferReader(content)).schema.names)
    texts = [f.name for f in SCHEMA if f.type == pa.string() and f.name in stored]
    file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts)
    schema = file.schema_arrow
    names = [name for name in SCHEMA.names if name in schema.names]
    types = [SCHEMA.field(name).type for name in names]
    limit = max(_LEAST, 64 * len(content))
    if not names or not all(
        _is_of(schema.field(n).type, t) for n, t in zip(names, types, strict=True)
    ):
        raise ValueError("its columns are not those of effects")
    if file.metadata.num_rows > limit:
        raise ValueError("it claims far more rows than it has bytes")
    batches: list[pa.RecordBatch] = []
    size = 0
    for batch in file.iter_batches(_BATCH, columns=names, use_threads=False):
        size += sum(_size(column) for column in batch.columns)
        if size > limit:
            raise ValueError("it would take far more memory than its size")
        columns = [column.cast(type_) for column, type_ in zip(batch.columns, types, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(columns, names))
    fields = [SCHEMA.field(name) for name in names]
    return pa.Table.from_batches(batches, pa.schema(fields, schema.metadata))


def _is_of(actual: pa.DataType, expected: pa.DataType) -> bool:
    return actual == expected or (
        pa.types.is_dictionary(actual) and actual.value_type == expected == pa.string()
    )


def _size(column: pa.Array) -> int:
    """Return the bytes of a column whose texts are copied into each row."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = np.array([len(text) for text in column.dictionary.to_pylist() if text is not None])
    if len(lengths) != len(column.dictionary):
        raise ValueError("its texts have holes")
    chosen = column.indices.drop_null().to_numpy()
    return 4 * (len(column) + int(lengths[chosen].sum())) if len(chosen) else 4 * len(column)
