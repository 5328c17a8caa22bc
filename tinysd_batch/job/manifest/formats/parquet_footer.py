"""Read the sizes of a Parquet file's columns from its footer, without pyarrow.

pyarrow offers the same numbers, but a damaged file makes it throw a C++ exception that nothing catches, which ends the
process. The footer is a Thrift struct in the compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md,
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from collections import Counter
from typing import Any

MAX_DEPTH = 16
MAGIC = b"PAR1"
# Field numbers of parquet.thrift
ROW_GROUPS = 4  # of FileMetaData
COLUMNS = 1  # of RowGroup
META_DATA = 3  # of ColumnChunk
PATH, UNCOMPRESSED_SIZE = 3, 6  # of ColumnMetaData


def read_column_sizes(file: Any) -> list[Counter[str]]:
    """Return the uncompressed bytes of each top-level column, for each row group. Raises ValueError if damaged."""
    file.seek(-8, 2)
    length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
    end = file.seek(0, 2)
    if magic != MAGIC or length + 8 > end:
        raise ValueError("the footer is damaged")
    file.seek(end - 8 - length)
    try:
        groups = ThriftCompactReader(file.read(length)).read_struct(0).get(ROW_GROUPS, [])
        return [sum_column_sizes(group) for group in groups]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("the footer is damaged") from error


def sum_column_sizes(group: dict[int, Any]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for chunk in group.get(COLUMNS, []):
        metadata = chunk[META_DATA]
        name = metadata[PATH][0].decode("utf-8", "surrogateescape")
        sizes[name] += max(0, metadata[UNCOMPRESSED_SIZE])
    return sizes


class ThriftCompactReader:
    """Read structs of the Thrift compact protocol as dictionaries from field numbers to values."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def read_struct(self, depth: int) -> dict[int, Any]:
        if depth > MAX_DEPTH:
            raise ValueError("the footer is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self.read_byte():
            number = number + (head >> 4) if head >> 4 else self.read_zigzag()
            fields[number] = self.read_value(head & 15, depth, is_field=True)
        return fields

    def read_value(self, type_id: int, depth: int, is_field: bool = False) -> Any:
        match type_id:
            case 1 | 2:  # a boolean field stores its value in the type id
                return type_id == 1 if is_field else self.read_byte() == 1
            case 3:
                return self.read_byte()
            case 4 | 5 | 6:
                return self.read_zigzag()
            case 7:
                return self.read_bytes(8)
            case 8:
                return self.read_bytes(self.read_varint())
            case 9 | 10:
                return self.read_list(depth)
            case 12:
                return self.read_struct(depth + 1)
        raise ValueError("the footer holds a type that Parquet does not use")

    def read_list(self, depth: int) -> list[Any]:
        head = self.read_byte()
        count = head >> 4 if head >> 4 != 15 else self.read_varint()
        if count > len(self.data) - self.position:
            raise ValueError("the footer is truncated")
        return [self.read_value(head & 15, depth + 1) for _ in range(count)]

    def read_byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def read_bytes(self, count: int) -> bytes:
        self.position += count
        if self.position > len(self.data):
            raise ValueError("the footer is truncated")
        return self.data[self.position - count : self.position]

    def read_varint(self) -> int:
        number = shift = 0
        while (byte := self.read_byte()) & 128:
            number |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("the footer is damaged")
        return number | byte << shift

    def read_zigzag(self) -> int:
        number = self.read_varint()
        return (number >> 1) ^ -(number & 1)
