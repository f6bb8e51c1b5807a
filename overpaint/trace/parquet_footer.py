"""Read the compression of the columns from the footer of a Parquet file.

pyarrow ends the whole process where it reads this from some damaged files. The footer is a structure in the compact
protocol of Thrift.

Source: https://parquet.apache.org/docs/file-format/metadata/ and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from typing import Any

__all__ = ["codecs"]

_DEEPEST = 32
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY = (1, 2), 3, (4, 5, 6), 7, 8
_LISTS, _MAP, _STRUCT = (9, 10), 11, 12


def codecs(content: bytes) -> set[int]:
    """Return the numbers of the codecs of all columns: 0 for none, 1 for Snappy, others for other ones.

    Raises:
        ValueError: The footer is damaged.
    """
    size = int.from_bytes(content[-8:-4], "little")
    if len(content) < 12 or size > len(content) - 12:
        raise ValueError("its footer is longer than the file")
    try:
        fields = _Reader(content[-8 - size : -8]).value(_STRUCT, 0)
        groups = [group[1] for group in fields.get(4, [])]
        return {int(column[3][4]) for columns in groups for column in columns}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("its footer is damaged") from error


class _Reader:
    """Reads values one after another: integers, bytes, lists, and structures as dicts by number of the field."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def value(self, kind: int, depth: int) -> Any:
        """Return the next value, of a kind of the protocol; `None` for kinds that are not needed."""
        if depth > _DEEPEST:
            raise ValueError("its footer is nested too deeply")
        if kind in _INTEGERS:
            number = self._number()
            return number // 2 if number % 2 == 0 else -(number + 1) // 2
        if kind == _BINARY:
            return self._bytes(self._number())
        if kind in _LISTS:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._number()
            return [self._element(head & 15, depth) for _ in range(count)]
        if kind == _MAP:
            return self._map(depth)
        if kind == _STRUCT:
            return self._struct(depth)
        if kind in (_BYTE, _DOUBLE):
            return self._bytes(1 if kind == _BYTE else 8)
        raise ValueError(f"its footer has a value of the unknown kind {kind}")

    def _struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self.value(_INTEGERS[0], depth + 1)
            kind = head & 15
            fields[number] = kind == 1 if kind in _BOOLEANS else self.value(kind, depth + 1)
        return fields

    def _map(self, depth: int) -> None:
        count = self._number()
        kinds = self._byte() if count else 0
        for _ in range(count):
            self._element(kinds >> 4, depth)
            self._element(kinds & 15, depth)

    def _element(self, kind: int, depth: int) -> Any:
        return self._byte() if kind in _BOOLEANS else self.value(kind, depth + 1)

    def _number(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise ValueError("its footer has a number of more than 64 bits")

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _bytes(self, count: int) -> bytes:
        part = self.data[self.place : self.place + count]
        if len(part) < count:
            raise ValueError("its footer ends too early")
        self.place += count
        return part
