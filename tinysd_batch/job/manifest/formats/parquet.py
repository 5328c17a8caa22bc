"""Read Parquet manifests in batches of rows. Cells and row groups of any size are read within bounds.

A problem in an extra column never makes a row invalid: values that the results cannot hold are dropped and noted. A
column whose metadata already shows this is not read at all.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
from tinysd_batch.settings.limits import MAX_PROMPT_CHARACTERS
from tinysd_batch.values import is_missing

PARQUET_BATCH_ROWS = 1024
PARQUET_SPARE_BYTES = 64 << 20  # bytes that a row group may hold in addition to MAX_PROMPT_CHARACTERS per row


class InvalidCell(NamedTuple):
    """A cell that cannot be used."""

    reason: str


def read_parquet_rows(path: Path, options: ReadingOptions) -> Iterator[ReaderItem]:
    """Yield the rows of the file, or of all files of a folder."""
    files = list_manifest_files(path)
    types = find_extra_column_types(files) if len(files) > 1 else {}
    conflicting = {name for name, common_type in types.items() if common_type is None}
    for name in conflicting:
        options.notes.record_dropped_column(name, "not copied to the results, its type differs between the files")
    for file in files:
        for row in read_parquet_file(file, options):
            if conflicting and isinstance(row, RawRow):
                for name in conflicting & row.values.keys():
                    del row.values[name]
            yield row


def read_parquet_file(path: Path, options: ReadingOptions) -> Iterator[ReaderItem]:
    """Yield the rows of one file.

    Text columns are read dictionary-encoded: a small file can repeat one huge value many times.
    """
    with open_seekable(path) as stream, wrap_parquet_errors(path):
        file = pq.ParquetFile(stream, pre_buffer=False)
        header = file.schema_arrow.names
        columns = match_table_columns(path, header, options.strict, options.own_columns)
        skipped = find_skipped_columns(path, stream, file, columns)
        for name, reason in skipped.items():
            options.notes.record_dropped_column(name, reason)
        wanted = [name for name in header if name not in skipped]
        text_paths = [leaf.path for leaf in map(file.schema.column, range(len(file.schema))) if is_byte_array(leaf)]
        file = pq.ParquetFile(stream, metadata=file.metadata, read_dictionary=text_paths, pre_buffer=False)
        our_names = dict(zip(header, columns.names, strict=True))
        for batch in read_batches(file, wanted):
            if all(array.null_count == len(array) for array in batch.columns):
                yield SkippedRows(len(batch))
            else:
                yield from convert_batch(batch, our_names, columns, options)


def read_batches(file: Any, columns: list[str]) -> Iterator[Any]:
    """Yield record batches, one row group after the other.

    pyarrow cannot put dictionary-encoded lists of two row groups into one batch.
    """
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(PARQUET_BATCH_ROWS, [group], columns=columns, use_threads=False)


def is_byte_array(leaf: Any) -> bool:
    return bool(leaf.physical_type == "BYTE_ARRAY")


@contextmanager
def wrap_parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise ManifestError(f"{path}: not a readable Parquet file: {summarize_error(error)}") from None


def find_skipped_columns(path: Path, stream: Any, file: Any, columns: ColumnMapping) -> dict[str, str]:
    """Map the columns that are not read to the reason.

    A page of a column is decompressed as a whole, so columns with large values may not fit into memory.

    Args:
        stream: The file's bytes, for its footer.
        file: The same file as a `pyarrow.parquet.ParquetFile`.

    Raises:
        ManifestError: The known columns are too large.
    """
    our_names = dict(zip(file.schema_arrow.names, columns.names, strict=True))
    unknown = {name for name, our_name in our_names.items() if our_name not in columns.source_names}
    with_binary = [field.name for field in file.schema_arrow if field.name in unknown and has_binary_leaf(field.type)]
    skipped = dict.fromkeys(with_binary, "not read, bytes within structs or lists are not copied to the results")
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if not any(group.total_byte_size > get_safe_group_bytes(group.num_rows) for group in groups):
        return skipped
    for number, (group, sizes) in enumerate(zip(groups, read_column_sizes(stream), strict=True)):
        limit = PARQUET_SPARE_BYTES + MAX_PROMPT_CHARACTERS * group.num_rows
        total = sum(size for name, size in sizes.items() if name not in unknown)
        if total > limit:
            size = f"{total:,} bytes in {group.num_rows:,} rows"
            raise ManifestError(f"{path}: row group {number}: {size} is too much; remove columns with long values")
        for name in sorted(unknown - skipped.keys(), key=lambda name: (sizes[name], name)):
            total += sizes[name]
            if sizes[name] > MAX_CELL_CHARACTERS * group.num_rows or total > limit:
                skipped[name] = "not read, its values are too long for the results"
    return skipped


def get_safe_group_bytes(rows: int) -> int:
    """Return the size up to which no column of a row group can be too large."""
    return min(MAX_CELL_CHARACTERS * rows, PARQUET_SPARE_BYTES + MAX_PROMPT_CHARACTERS * rows)


def convert_batch(
    batch: Any, our_names: dict[str, str], columns: ColumnMapping, options: ReadingOptions
) -> Iterator[RawRow | UnreadableRow]:
    """Yield the rows of a record batch. `our_names` maps the file's column names to the names in `columns`."""
    names = [our_names[name] for name in batch.schema.names]
    read_unknown = read_column_as_text if options.compat_0_1_0 else read_extra_column
    cells = [
        (read_known_column if name in columns.source_names else read_unknown)(array)
        for name, array in zip(names, batch.columns, strict=True)
    ]
    for row in zip(*cells, strict=True):
        values = {name: cell for name, cell in zip(names, row, strict=True) if not is_missing(cell)}
        invalid = {name: cell.reason for name, cell in values.items() if type(cell) is InvalidCell}
        for name in [name for name in invalid if name not in columns.source_names]:
            del values[name]
            options.notes.record_dropped_column(name, f"some values are not copied to the results: {invalid.pop(name)}")
        if invalid:
            prompt = values.get("prompt")
            reasons = (f"column {columns.source_names[name]}: {reason}" for name, reason in invalid.items())
            yield UnreadableRow("; ".join(reasons), prompt if isinstance(prompt, str) else None)
        else:
            yield RawRow(values, columns.source_names)


def read_if_encoded(array: Any, read: Any) -> list[Any] | None:
    """Decode a dictionary, extension or float16 array and pass it to `read`; return None for any other array."""
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
    """Return numbers as they are and all other values as text; None for empty cells, InvalidCell for unusable ones."""
    array_type = array.type
    if (cells := read_if_encoded(array, read_known_column)) is not None:
        return cells
    if is_number_type(array_type) or pa.types.is_decimal(array_type):
        return array.to_pylist()  # type: ignore[no-any-return]
    if is_string_type(array_type) or is_binary_type(array_type):
        return decode_strings(array)
    if pa.types.is_nested(array_type):
        return [InvalidCell("a single value was expected") if scalar.is_valid else None for scalar in array]
    return [read_scalar(scalar) for scalar in array]


def read_extra_column(array: Any) -> list[Any]:
    """Return values of the column's transport type (see `parquet_types`)."""
    array_type = array.type
    if (cells := read_if_encoded(array, read_extra_column)) is not None:
        return cells
    if is_time_type(array_type) or pa.types.is_decimal(array_type):
        return array.cast(get_transport_type(array_type)).to_pylist()  # type: ignore[no-any-return]
    if (result_type := get_nested_result_type(array_type)) is not None:
        transport_type = get_transport_type(result_type)
        target_type = None if transport_type == array_type else transport_type
        return [read_scalar(scalar, target_type, as_json=False) for scalar in array]
    if pa.types.is_nested(array_type):
        return [read_scalar(scalar) for scalar in array]
    return read_known_column(array)


def read_column_as_text(array: Any) -> list[Any]:
    """Return numbers as they are, nested values as JSON, and all other values as text."""
    if (cells := read_if_encoded(array, read_column_as_text)) is not None:
        return cells
    return [read_scalar(scalar) for scalar in array] if pa.types.is_nested(array.type) else read_known_column(array)


def decode_strings(array: Any) -> list[Any]:
    is_binary = "binary" in str(array.type)
    array = array.cast(pa.large_binary())
    sizes = pc.binary_length(array)
    short = pc.if_else(pc.less_equal(sizes, MAX_CELL_CHARACTERS), array, None)
    errors = "backslashreplace" if is_binary else "surrogateescape"
    return [
        text.decode("utf-8", errors) if text is not None else size and mark_too_long(size)
        for text, size in zip(short.to_pylist(), sizes.to_pylist(), strict=True)
    ]


def mark_too_long(size_bytes: int) -> InvalidCell:
    return InvalidCell(f"some {size_bytes:,} bytes, at most {MAX_CELL_CHARACTERS:,}")


def read_scalar(scalar: Any, target_type: Any = None, *, as_json: bool = True) -> Any:
    """Return a nested value as JSON or as Python objects (cast to `target_type`), any other value as text."""
    if not scalar.is_valid:
        return None
    if (size := estimate_characters(scalar)) > MAX_CELL_CHARACTERS:
        return mark_too_long(size)
    try:
        if pa.types.is_nested(scalar.type):
            value = (pc.cast(scalar, target_type) if target_type is not None else scalar).as_py()
            return json.dumps(value, ensure_ascii=False, default=encode_json_default) if as_json else value
        return pc.cast(scalar, pa.string()).as_py()
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as error:
        return InvalidCell(f"cannot be read: {summarize_error(error)}")


def encode_json_default(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def estimate_characters(scalar: Any) -> int:
    """Estimate the length of the value as text without creating it. Stops counting just above the limit."""
    if not scalar.is_valid:
        return 4
    if isinstance(scalar, pa.DictionaryScalar):
        return estimate_characters(scalar.value)
    if isinstance(scalar, pa.StringScalar | pa.BinaryScalar | pa.LargeStringScalar | pa.LargeBinaryScalar):
        return scalar.as_buffer().size  # type: ignore[no-any-return]
    if not isinstance(scalar, pa.ListScalar | pa.StructScalar):
        return 8
    total = 2
    for item in scalar.values if isinstance(scalar, pa.ListScalar) else scalar.values():
        total += estimate_characters(item)
        if total > MAX_CELL_CHARACTERS:
            break
    return total


def read_parquet_extra_fields(path: Path, *, as_text: bool = False) -> list[pa.Field]:
    """Return the fields of unknown columns in the results; `as_text` keeps the types of numbers only."""
    types = find_extra_column_types(list_manifest_files(path))
    convert = get_0_1_0_result_type if as_text else get_result_type
    return [pa.field(name, convert(common_type)) for name, common_type in types.items() if common_type is not None]


def find_extra_column_types(files: list[Path]) -> dict[str, Any]:
    """Return the result type of each unknown column; None where the files have no common type."""
    types: dict[str, Any] = {}
    for path in files:
        with open_seekable(path) as stream, wrap_parquet_errors(path):
            file = pq.ParquetFile(stream, pre_buffer=False)
            columns = match_table_columns(path, file.schema_arrow.names, strict=False)
            skipped = find_skipped_columns(path, stream, file, columns)
        for field, name in zip(file.schema_arrow, columns.names, strict=True):
            if name not in columns.source_names and field.name not in skipped:
                field_type = get_result_type(field.type) if not pa.types.is_null(field.type) else pa.null()
                types[name] = find_common_type(types.get(name, field_type), field_type)
    return types


def find_common_type(first: Any, second: Any) -> Any | None:
    """Return the common type of a column in two files: the same type, a number type, or that of the non-empty one."""
    if first == second or pa.types.is_null(second):
        return first
    if first is None or pa.types.is_null(first):
        return first and second
    if not (is_number_type(first) and is_number_type(second)):
        return None
    schemas = [pa.schema([pa.field("x", number_type)]) for number_type in (first, second)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return None
