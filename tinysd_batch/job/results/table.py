"""Read the results table of a job from its files: the sealed ones, followed by the parts of the journal."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinysd_batch.errors import StorageError
from tinysd_batch.job.manifest.formats.parquet_types import get_transport_type, replace_time_types
from tinysd_batch.job.results.columns import COLUMN_FIELDS, RESERVED_COLUMNS
from tinysd_batch.job.results.schema import (
    COVERED_PARTS_KEY,
    check_result_columns,
    list_current_names,
    read_reserved_columns,
)
from tinysd_batch.storage.atomic import check_regular_file

THREADED_READ_MIN_ROWS = 4096  # a table with more rows is read by several threads
JOURNAL_PART_NAME = re.compile(r"\d{8,12}", re.ASCII)  # of a journal part, without the suffix


@contextmanager
def table_errors(file: Path) -> Iterator[None]:
    """Turn any error that a damaged or foreign Parquet file causes in pyarrow into a StorageError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StorageError(
            f"{file}: cannot be read: {reason.rstrip('.')}; move it away and submit again: existing images are kept"
        ) from None


def read_footer(file: Path) -> Any:
    """Read the metadata of a Parquet file. Raises StorageError."""
    with table_errors(file):
        check_regular_file(file)
        with file.open("rb") as opened:  # pyarrow does not accept file names that are not UTF-8
            return pq.read_metadata(opened)


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Read and check a file of the table, all columns or some. Raises StorageError."""
    with table_errors(file):
        check_regular_file(file)
        with file.open("rb") as opened:  # pyarrow does not accept file names that are not UTF-8
            # Otherwise pyarrow fetches ahead in a thread that needs the GIL to free its buffers, which aborts a process
            # that exits meanwhile.
            parquet = pq.ParquetFile(opened, pre_buffer=False)
            schema = parquet.schema_arrow
            check_result_columns(schema)
            current_names = dict(zip(schema.names, list_current_names(schema), strict=True))
            names = None if columns is None else [name for name, current in current_names.items() if current in columns]
            table = parquet.read(columns=names, use_threads=parquet.metadata.num_rows > THREADED_READ_MIN_ROWS)
            table = table.rename_columns([current_names[name] for name in table.column_names])
        if any(table[name].null_count for name in ("row", "status") if name in table.column_names):
            raise ValueError("a row lacks its row number or status")
        table.validate(full=True)
        return table


def conform_to_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the columns of `schema`, null where it lacks one. Raises ArrowException if a cast fails."""
    positions = [(field, table.schema.get_field_index(field.name)) for field in schema]
    columns = [
        table.column(position).cast(field.type) if position >= 0 else pa.nulls(len(table), field.type)
        for field, position in positions
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def convert_times_to_text(table: pa.Table) -> pa.Table:
    """Return the table with the times in extra columns as text.

    Python's datetime has no nanoseconds and no years after 9999, which Parquet has.
    """
    for position, field in enumerate(table.schema):
        as_text = replace_time_types(field.type, lambda _: pa.string())
        if as_text != field.type and field.name not in RESERVED_COLUMNS:
            column = table.column(position)
            try:
                column = column.cast(as_text)
            except pa.ArrowException:  # an unknown time zone
                column = column.cast(get_transport_type(field.type)).cast(as_text)
            table = table.set_column(position, field.name, column)
    return table


def get_row_keys(table: pa.Table) -> tuple[Any, Any]:
    """Return the key of each row as two arrays: manifest row number, and image index, which is 0 for an invalid row."""
    return table["row"].to_numpy(), pc.fill_null(table["index"], 0).to_numpy()


def keep_newest_rows(table: pa.Table) -> pa.Table:
    """Keep the row written last for each image and each invalid manifest row, in the order of the manifest.

    Of a manifest row that was invalid and has images now, only the images are kept.
    """
    row, index = get_row_keys(table)
    order = np.lexsort((index, row))  # stable: of equal keys, the one written later comes last
    last = np.ones(len(order), bool)
    same_row = np.diff(row[order]) == 0
    last[:-1] = ~same_row | ((np.diff(index[order]) != 0) & (index[order][:-1] != 0))
    return table.take(order[last])


class ResultsTable:
    """The results table of a job: its files, and how to read them together."""

    def __init__(self, job_folder: Path) -> None:
        self.journal = job_folder / "_tinysd" / "journal"
        self.single_file = job_folder / "results.parquet"
        self.parts_folder = job_folder / "results"

    def sealed_files(self) -> list[Path]:
        """Return the existing files of the table outside of the journal."""
        single_file = [self.single_file] if self.single_file.exists() else []
        return single_file + sorted(self.parts_folder.glob("part-*.parquet"))

    def part_path(self, number: int) -> Path:
        """Return the path of a sealed part of a large job."""
        return self.parts_folder / f"part-{number:05d}.parquet"

    def convert_single_file_to_part(self) -> None:
        """Rename `results.parquet` to the first part, for a job that has become large."""
        if self.single_file.exists():
            self.parts_folder.mkdir(exist_ok=True)
            self.single_file.replace(self.part_path(0))

    def journal_parts(self) -> list[Path]:
        """Return the existing parts of the journal in the order in which they were written."""
        return sorted(part for part in self.journal.glob("*.parquet") if JOURNAL_PART_NAME.fullmatch(part.stem))

    def read_covered_parts(self) -> set[str]:
        """Return the names of journal parts whose rows are already in a sealed file. Raises StorageError."""
        names: set[str] = set()
        for file in self.sealed_files():
            with table_errors(file):
                listed = json.loads((read_footer(file).metadata or {}).get(COVERED_PARTS_KEY, b"[]"))
                names |= {name for name in listed if JOURNAL_PART_NAME.fullmatch(name)}
        return names

    def delete_covered_parts(self) -> None:
        """Delete journal parts whose rows are already in a sealed file."""
        covered = self.read_covered_parts()
        for part in self.journal_parts():
            if part.stem in covered:
                part.unlink()

    def table_files(self) -> list[Path]:
        """Return the files that make up the table, in the order in which their rows were written."""
        covered = self.read_covered_parts()
        return [*self.sealed_files(), *(part for part in self.journal_parts() if part.stem not in covered)]

    def read_schemas(self) -> Iterator[pa.Schema]:
        """Yield the schema of each file of the table. Raises StorageError."""
        for file in self.table_files():
            with table_errors(file):
                schema = read_footer(file).schema.to_arrow_schema()
                names = list_current_names(schema)
                yield pa.schema([field.with_name(name) for field, name in zip(schema, names, strict=True)])

    def list_manifest_columns(self) -> tuple[str, ...]:
        """Return the names of the manifest's own columns that the files have. Raises StorageError."""
        names: dict[str, None] = {}
        for file in self.table_files():
            with table_errors(file):
                schema = read_footer(file).schema.to_arrow_schema()
                reserved = read_reserved_columns(schema)
            names.update(dict.fromkeys(name for name in schema.names if name not in reserved))
        return tuple(names)

    def read(self, columns: list[str] | None) -> Iterator[pa.Table]:
        """Yield the content of each file, all columns or some. Of several rows of an image, the last one counts."""
        return (read_table(file, columns) for file in self.table_files())

    def read_rows(self, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        """Yield the same content row by row, with the times of extra columns as text."""
        for file in self.table_files():
            with table_errors(file):
                rows = convert_times_to_text(read_table(file, columns)).to_pylist()
            yield from rows

    def read_newest(self, columns: list[str]) -> pa.Table:
        """Read some of the reserved columns, with one row for each image and each invalid manifest row, in order."""
        schema = pa.schema([field for field in COLUMN_FIELDS if field.name in columns])
        tables = [conform_to_schema(table, schema) for table in self.read(columns)]
        return keep_newest_rows(pa.concat_tables([schema.empty_table(), *tables]))

    def read_newest_all_columns(self) -> pa.Table:
        """Read all columns, including extra ones, which may differ from file to file."""
        tables = [pa.schema(COLUMN_FIELDS).empty_table(), *self.read(None)]
        schema = pa.unify_schemas([table.schema.remove_metadata() for table in tables], promote_options="permissive")
        return keep_newest_rows(pa.concat_tables([conform_to_schema(table, schema) for table in tables]))
