"""Read Parquet manifests a batch of rows at a time; no cell, and no row group, without a bound."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinysd_batch.config import MAX_PROMPT_CHARACTERS, excerpt
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.columns import Columns, table_columns
from tinysd_batch.job.manifest_file import MAX_CELL_CHARACTERS, Fault, Line, first_line, open_whole

PARQUET_BATCH_ROWS = 1024
PARQUET_SPARE_BYTES = 64 << 20  # what a row group may hold besides MAX_PROMPT_CHARACTERS a row


class BadCell(NamedTuple):
    """A cell that cannot be used."""

    reason: str


def read_parquet(path: Path, strict: bool) -> Iterator[Line | Fault]:
    """Text is read as references to its different values: a small file can repeat a huge one many times."""
    with open_whole(path) as whole, parquet_errors(path):
        file = pq.ParquetFile(whole)
        columns = table_columns(path, file.schema_arrow.names, strict)
        check_sizes(path, file.metadata)
        leaves = [file.schema.column(number) for number in range(len(file.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        file = pq.ParquetFile(whole, metadata=file.metadata, read_dictionary=texts)
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
            yield from batch_lines(batch, columns)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise ManifestError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def check_sizes(path: Path, metadata: Any) -> None:
    """Refuse row groups with pages that may not fit into memory.

    Not column by column: asking a damaged file for a column's size ends the process within pyarrow.
    """
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.total_byte_size > PARQUET_SPARE_BYTES + MAX_PROMPT_CHARACTERS * group.num_rows:
            size = f"{group.total_byte_size:,} bytes in {group.num_rows:,} rows"
            raise ManifestError(f"{path}: row group {number}: {size} is too much; leave out columns with long values")


def batch_lines(batch: Any, columns: Columns) -> Iterator[Line | Fault]:
    names = columns.names
    cells = [read_cells(array, name in columns.shown) for name, array in zip(names, batch.columns, strict=True)]
    for row in zip(*cells, strict=True):
        values = {name: cell for name, cell in zip(names, row, strict=True) if cell is not None and cell != ""}
        bad = [(name, cell) for name, cell in values.items() if type(cell) is BadCell]
        if bad:
            prompt = values.get("prompt")
            reasons = (f"column {columns.shown.get(name, excerpt(name))}: {cell.reason}" for name, cell in bad)
            yield Fault("; ".join(reasons), prompt if isinstance(prompt, str) else None)
        else:
            yield Line(values, columns.shown)


def read_cells(array: Any, known: bool) -> list[Any]:
    """Numbers as they are, all else as text; None and BadCell where there is nothing or nothing to be used."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        used = array.indices.unique()
        entries = dict(zip(used.to_pylist(), read_cells(array.dictionary.take(used), known), strict=True))
        return [entries[index] for index in array.indices.to_pylist()]
    if isinstance(kind, pa.BaseExtensionType):
        return read_cells(array.storage, known)
    if pa.types.is_float16(kind):
        return read_cells(array.cast(pa.float32()), known)
    if is_number(kind) or pa.types.is_decimal(kind):
        return array.to_pylist()  # type: ignore[no-any-return]
    if is_text(kind):
        return read_texts(array)
    if pa.types.is_nested(kind) and known:
        return [BadCell("a single value was expected") if one.is_valid else None for one in array]
    return [read_scalar(one) for one in array]


def is_number(kind: Any) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def is_text(kind: Any) -> bool:
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)


def read_texts(array: Any) -> list[Any]:
    is_binary = "binary" in str(array.type)
    array = array.cast(pa.large_binary())
    sizes = pc.binary_length(array)
    short = pc.if_else(pc.less_equal(sizes, MAX_CELL_CHARACTERS), array, None)
    errors = "backslashreplace" if is_binary else "surrogateescape"
    return [
        text.decode("utf-8", errors) if text is not None else size and too_long(size)
        for text, size in zip(short.to_pylist(), sizes.to_pylist(), strict=True)
    ]


def too_long(size: int) -> BadCell:
    return BadCell(f"some {size} bytes, at most {MAX_CELL_CHARACTERS}")


def read_scalar(scalar: Any) -> str | BadCell | None:
    """A time or a nested value as text."""
    if not scalar.is_valid:
        return None
    if (size := weight(scalar)) > MAX_CELL_CHARACTERS:
        return too_long(size)
    try:
        if pa.types.is_nested(scalar.type):
            return json.dumps(scalar.as_py(), ensure_ascii=False, default=as_text)
        return pc.cast(scalar, pa.string()).as_py()  # type: ignore[no-any-return]
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as error:
        return BadCell(f"cannot be read: {first_line(error)}")


def as_text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def weight(scalar: Any) -> int:
    """About how many characters the value has, without making it; just over the limit for anything bigger."""
    if not scalar.is_valid:
        return 4
    if isinstance(scalar, pa.DictionaryScalar):
        return weight(scalar.value)
    if isinstance(scalar, pa.StringScalar | pa.BinaryScalar | pa.LargeStringScalar | pa.LargeBinaryScalar):
        return scalar.as_buffer().size  # type: ignore[no-any-return]
    if not isinstance(scalar, pa.ListScalar | pa.StructScalar):
        return 8
    total = 2
    for part in scalar.values if isinstance(scalar, pa.ListScalar) else scalar.values():
        total += weight(part)
        if total > MAX_CELL_CHARACTERS:
            break
    return total


def read_unknown_fields(path: Path) -> list[pa.Field]:
    """Unknown columns as the results will hold them: numbers kept, all else text."""
    with open_whole(path) as whole, parquet_errors(path):
        schema = pq.read_schema(whole)
    unknown = set(table_columns(path, schema.names, strict=False).unknown)
    return [pa.field(field.name, kept_type(field.type)) for field in schema if field.name in unknown]


def kept_type(kind: Any) -> Any:
    if pa.types.is_dictionary(kind):
        return kept_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return kept_type(kind.storage_type)
    if pa.types.is_float16(kind):
        return pa.float32()
    return kind if is_number(kind) else pa.string()
