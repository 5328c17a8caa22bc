"""Read Parquet manifests a batch of rows at a time; no cell, and no row group, without a bound.

A column that nobody asked for never costs a row: what cannot be carried into the results is left out and noted, and
where that shows before reading, the column is not read at all.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinysd_batch.config import MAX_PROMPT_CHARACTERS
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.columns import ColumnMapping, match_table_columns
from tinysd_batch.job.manifest.files import list_manifest_files, open_seekable, summarize_error
from tinysd_batch.job.manifest.formats.parquet_footer import read_column_sizes
from tinysd_batch.job.manifest.formats.parquet_types import (
    get_0_1_0_result_type,
    get_nested_result_type,
    get_result_type,
    get_transport_type,
    has_binary_leaf,
    is_binary_type,
    is_number_type,
    is_string_type,
    is_time_type,
)
from tinysd_batch.job.manifest.raw_rows import (
    MAX_CELL_CHARACTERS,
    RawRow,
    ReaderItem,
    ReadingOptions,
    SkippedRows,
    UnreadableRow,
)
from tinysd_batch.values import is_missing

PARQUET_BATCH_ROWS = 1024
PARQUET_SPARE_BYTES = 64 << 20  # what a row group may hold besides MAX_PROMPT_CHARACTERS a row


class InvalidCell(NamedTuple):
    """A cell that cannot be used."""

    reason: str


def read_parquet_rows(path: Path, options: ReadingOptions) -> Iterator[ReaderItem]:
    """The rows of the file, or of all files of a folder."""
    parts = list_manifest_files(path)
    clashing = (
        {name for name, kind in find_extra_column_types(parts).items() if kind is None} if len(parts) > 1 else set()
    )
    for name in clashing:
        options.notes.record_dropped_column(name, "not copied to the results, its type differs between the parts")
    for part in parts:
        for row in read_parquet_file(part, options):
            if clashing and isinstance(row, RawRow):
                for name in clashing & row.values.keys():
                    del row.values[name]
            yield row


def read_parquet_file(path: Path, options: ReadingOptions) -> Iterator[ReaderItem]:
    """Text is read as references to its different values: a small file can repeat a huge one many times."""
    with open_seekable(path) as whole, wrap_parquet_errors(path):
        file = pq.ParquetFile(whole)
        header = file.schema_arrow.names
        columns = match_table_columns(path, header, options.strict)
        left_out = find_skipped_columns(path, whole, file, columns)
        for name, reason in left_out.items():
            options.notes.record_dropped_column(name, reason)
        wanted = [name for name in header if name not in left_out]
        texts = [leaf.path for leaf in map(file.schema.column, range(len(file.schema))) if is_byte_array(leaf)]
        file = pq.ParquetFile(whole, metadata=file.metadata, read_dictionary=texts)
        our_names = dict(zip(header, columns.names, strict=True))
        for batch in read_batches(file, wanted):
            if all(array.null_count == len(array) for array in batch.columns):
                yield SkippedRows(len(batch))
            else:
                yield from convert_batch(batch, our_names, columns, options)


def read_batches(file: Any, wanted: list[str]) -> Iterator[Any]:
    """One row group after the other: pyarrow cannot put lists of references from two of them into one batch."""
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(PARQUET_BATCH_ROWS, [group], columns=wanted, use_threads=False)


def is_byte_array(leaf: Any) -> bool:
    return bool(leaf.physical_type == "BYTE_ARRAY")


@contextmanager
def wrap_parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise ManifestError(f"{path}: not a readable Parquet file: {summarize_error(error)}") from None


def find_skipped_columns(path: Path, whole: Any, file: Any, columns: ColumnMapping) -> dict[str, str]:
    """ColumnMapping of the file that are not read, and why not. Raises ManifestError where the others are too large.

    They may not fit into memory: a page of a column is unpacked as a whole.
    """
    our_names = dict(zip(file.schema_arrow.names, columns.names, strict=True))
    unknown = {name for name, our_name in our_names.items() if our_name not in columns.source_names}
    nested_bytes = [field.name for field in file.schema_arrow if field.name in unknown and has_binary_leaf(field.type)]
    left_out = dict.fromkeys(nested_bytes, "not read, bytes within structures are not copied to the results")
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if not any(group.total_byte_size > get_safe_group_bytes(group.num_rows) for group in groups):
        return left_out
    for number, (group, sizes) in enumerate(zip(groups, read_column_sizes(whole), strict=True)):
        limit = PARQUET_SPARE_BYTES + MAX_PROMPT_CHARACTERS * group.num_rows
        total = sum(size for name, size in sizes.items() if name not in unknown)
        if total > limit:
            size = f"{total:,} bytes in {group.num_rows:,} rows"
            raise ManifestError(f"{path}: row group {number}: {size} is too much; leave out columns with long values")
        for name in sorted(unknown - left_out.keys(), key=lambda name: (sizes[name], name)):
            total += sizes[name]
            if sizes[name] > MAX_CELL_CHARACTERS * group.num_rows or total > limit:
                left_out[name] = "not read, its values are too long for the results"
    return left_out


def get_safe_group_bytes(rows: int) -> int:
    """Bytes of a row group in which no column can be too large."""
    return min(MAX_CELL_CHARACTERS * rows, PARQUET_SPARE_BYTES + MAX_PROMPT_CHARACTERS * rows)


def convert_batch(
    batch: Any, our_names: dict[str, str], columns: ColumnMapping, options: ReadingOptions
) -> Iterator[RawRow | UnreadableRow]:
    names = [our_names[name] for name in batch.schema.names]
    read_unknown = read_column_as_text if options.compat_0_1_0 else read_extra_column
    cells = [
        (read_known_column if name in columns.source_names else read_unknown)(array)
        for name, array in zip(names, batch.columns, strict=True)
    ]
    for row in zip(*cells, strict=True):
        values = {name: cell for name, cell in zip(names, row, strict=True) if not is_missing(cell)}
        bad = {name: cell.reason for name, cell in values.items() if type(cell) is InvalidCell}
        for name in [name for name in bad if name not in columns.source_names]:
            del values[name]
            options.notes.record_dropped_column(name, f"some values are not copied to the results: {bad.pop(name)}")
        if bad:
            prompt = values.get("prompt")
            reasons = (f"column {columns.source_names[name]}: {reason}" for name, reason in bad.items())
            yield UnreadableRow("; ".join(reasons), prompt if isinstance(prompt, str) else None)
        else:
            yield RawRow(values, columns.source_names)


def read_if_encoded(array: Any, read: Any) -> list[Any] | None:
    """The values of an array that is encoded in some way, read by `read` without it; None for a plain array."""
    if pa.types.is_dictionary(array.type):
        used = array.indices.unique()
        entries = dict(zip(used.to_pylist(), read(array.dictionary.take(used)), strict=True))
        return [entries[index] for index in array.indices.to_pylist()]
    if isinstance(array.type, pa.BaseExtensionType):
        return read(array.storage)  # type: ignore[no-any-return]
    if pa.types.is_float16(array.type):
        return read(array.cast(pa.float32()))  # type: ignore[no-any-return]
    return None


def read_known_column(array: Any) -> list[Any]:
    """Numbers as they are, all else as text; None and InvalidCell where there is nothing or nothing to be used."""
    kind = array.type
    if (cells := read_if_encoded(array, read_known_column)) is not None:
        return cells
    if is_number_type(kind) or pa.types.is_decimal(kind):
        return array.to_pylist()  # type: ignore[no-any-return]
    if is_string_type(kind) or is_binary_type(kind):
        return decode_strings(array)
    if pa.types.is_nested(kind):
        return [InvalidCell("a single value was expected") if one.is_valid else None for one in array]
    return [read_scalar(one) for one in array]


def read_extra_column(array: Any) -> list[Any]:
    """Values as they travel to the results (`parquet_types`)."""
    kind = array.type
    if (cells := read_if_encoded(array, read_extra_column)) is not None:
        return cells
    if is_time_type(kind) or pa.types.is_decimal(kind):
        return array.cast(get_transport_type(kind)).to_pylist()  # type: ignore[no-any-return]
    if (kept := get_nested_result_type(kind)) is not None:
        plain = get_transport_type(kept)
        return [read_scalar(one, None if plain == kind else plain, as_json=False) for one in array]
    if pa.types.is_nested(kind):
        return [read_scalar(one) for one in array]
    return read_known_column(array)


def read_column_as_text(array: Any) -> list[Any]:
    """Numbers as they are, all else as text, nested values as JSON."""
    if (cells := read_if_encoded(array, read_column_as_text)) is not None:
        return cells
    return [read_scalar(one) for one in array] if pa.types.is_nested(array.type) else read_known_column(array)


def decode_strings(array: Any) -> list[Any]:
    is_binary_type = "binary" in str(array.type)
    array = array.cast(pa.large_binary())
    sizes = pc.binary_length(array)
    short = pc.if_else(pc.less_equal(sizes, MAX_CELL_CHARACTERS), array, None)
    errors = "backslashreplace" if is_binary_type else "surrogateescape"
    return [
        text.decode("utf-8", errors) if text is not None else size and mark_too_long(size)
        for text, size in zip(short.to_pylist(), sizes.to_pylist(), strict=True)
    ]


def mark_too_long(size: int) -> InvalidCell:
    return InvalidCell(f"some {size:,} bytes, at most {MAX_CELL_CHARACTERS:,}")


def read_scalar(scalar: Any, kind: Any = None, *, as_json: bool = True) -> Any:
    """A time as text, a nested value as JSON or as it is, or as another type."""
    if not scalar.is_valid:
        return None
    if (size := estimate_characters(scalar)) > MAX_CELL_CHARACTERS:
        return mark_too_long(size)
    try:
        if pa.types.is_nested(scalar.type):
            value = (pc.cast(scalar, kind) if kind is not None else scalar).as_py()
            return json.dumps(value, ensure_ascii=False, default=encode_json_default) if as_json else value
        return pc.cast(scalar, pa.string()).as_py()
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as error:
        return InvalidCell(f"cannot be read: {summarize_error(error)}")


def encode_json_default(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def estimate_characters(scalar: Any) -> int:
    """About how many characters the value has, without making it; just over the limit for anything bigger."""
    if not scalar.is_valid:
        return 4
    if isinstance(scalar, pa.DictionaryScalar):
        return estimate_characters(scalar.value)
    if isinstance(scalar, pa.StringScalar | pa.BinaryScalar | pa.LargeStringScalar | pa.LargeBinaryScalar):
        return scalar.as_buffer().size  # type: ignore[no-any-return]
    if not isinstance(scalar, pa.ListScalar | pa.StructScalar):
        return 8
    total = 2
    for part in scalar.values if isinstance(scalar, pa.ListScalar) else scalar.values():
        total += estimate_characters(part)
        if total > MAX_CELL_CHARACTERS:
            break
    return total


def read_parquet_extra_fields(path: Path, *, as_text: bool = False) -> list[pa.Field]:
    """Unknown columns as the results will hold them; `as_text` keeps the types of numbers only."""
    kinds = find_extra_column_types(list_manifest_files(path))
    kept = get_0_1_0_result_type if as_text else get_result_type
    return [pa.field(name, kept(kind)) for name, kind in kinds.items() if kind is not None]


def find_extra_column_types(parts: list[Path]) -> dict[str, Any]:
    """The type of each unknown column that can be carried; None where the parts have nothing in common."""
    kinds: dict[str, Any] = {}
    for part in parts:
        with open_seekable(part) as whole, wrap_parquet_errors(part):
            file = pq.ParquetFile(whole)
            columns = match_table_columns(part, file.schema_arrow.names, strict=False)
            left_out = find_skipped_columns(part, whole, file, columns)
        for field, name in zip(file.schema_arrow, columns.names, strict=True):
            if name not in columns.source_names and field.name not in left_out:
                kind = get_result_type(field.type) if not pa.types.is_null(field.type) else pa.null()
                kinds[name] = find_common_type(kinds.get(name, kind), kind)
    return kinds


def find_common_type(one: Any, other: Any) -> Any | None:
    """The type of a column in several parts: equal ones, numbers, or parts without any value."""
    if one == other or pa.types.is_null(other):
        return one
    if one is None or pa.types.is_null(one):
        return one and other
    if not (is_number_type(one) and is_number_type(other)):
        return None
    schemas = [pa.schema([pa.field("x", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return None
