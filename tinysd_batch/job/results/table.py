"""The results table as it lies in files, and how they are read together: sealed ones, then the journal's parts."""

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
from tinysd_batch.job.results.schema import COVERED_PARTS_KEY, RESULT_FIELDS, check_result_columns
from tinysd_batch.storage.atomic import check_regular_file

THREADED_READ_MIN_ROWS = 4096  # from which on a table is read by several threads
JOURNAL_PART_NAME = re.compile(r"\d{8,12}", re.ASCII)  # a journal part's


@contextmanager
def table_errors(file: Path) -> Iterator[None]:
    """Whatever a damaged or foreign table makes pyarrow do becomes a StorageError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StorageError(
            f"{file}: cannot be read: {reason.rstrip('.')}; move it away and submit again: images that are there are "
            f"taken over"
        ) from None


def read_footer(file: Path) -> Any:
    """Raises StorageError."""
    with table_errors(file):
        check_regular_file(file)
        with file.open("rb") as opened:  # pyarrow takes no names that are no UTF-8
            return pq.read_metadata(opened)


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Raises StorageError."""
    with table_errors(file):
        check_regular_file(file)
        with file.open("rb") as opened:  # pyarrow takes no names that are no UTF-8
            parquet = pq.ParquetFile(opened)
            check_result_columns(parquet.schema_arrow)
            table = parquet.read(columns=columns, use_threads=parquet.metadata.num_rows > THREADED_READ_MIN_ROWS)
        if any(table[name].null_count for name in ("row", "status") if name in table.column_names):
            raise ValueError("a row has no number or no status")
        table.validate(full=True)
        return table


def conform_to_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of `schema`, empty where it has none. Raises ArrowException where that cannot be."""
    positions = [(field, table.schema.get_field_index(field.name)) for field in schema]
    columns = [
        table.column(at).cast(field.type) if at >= 0 else pa.nulls(len(table), field.type) for field, at in positions
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def convert_times_to_text(table: pa.Table) -> pa.Table:
    """The table with carried times as text: Python has none of nanoseconds, or beyond the year 9999."""
    ours = {field.name for field in RESULT_FIELDS}
    for position, field in enumerate(table.schema):
        as_text = replace_time_types(field.type, lambda _: pa.string())
        if as_text != field.type and field.name not in ours:
            column = table.column(position)
            try:
                column = column.cast(as_text)
            except pa.ArrowException:  # a time zone that is not known here
                column = column.cast(get_transport_type(field.type)).cast(as_text)
            table = table.set_column(position, field.name, column)
    return table


def get_row_keys(table: pa.Table) -> tuple[Any, Any]:
    """What tells rows apart, as two arrays: manifest row, and the image's index, which is 0 for an invalid row."""
    return table["row"].to_numpy(), pc.fill_null(table["index"], 0).to_numpy()


def keep_newest_rows(table: pa.Table) -> pa.Table:
    """One row per image (and per invalid manifest row), the last one written, in the manifest's order.

    A manifest row that had a fault and has images now has only those.
    """
    row, index = get_row_keys(table)
    order = np.lexsort((index, row))  # stable: what was written later stays behind
    last = np.ones(len(order), bool)
    same_row = np.diff(row[order]) == 0
    last[:-1] = ~same_row | ((np.diff(index[order]) != 0) & (index[order][:-1] != 0))
    return table.take(order[last])


class ResultsTable:
    """Where results and journal of a job lie, and how to read them together."""

    def __init__(self, job_folder: Path) -> None:
        self.journal = job_folder / "_tinysd" / "journal"
        self.single_file = job_folder / "results.parquet"
        self.parts_folder = job_folder / "results"

    def sealed_files(self) -> list[Path]:
        return ([self.single_file] if self.single_file.exists() else []) + sorted(
            self.parts_folder.glob("part-*.parquet")
        )

    def part_path(self, number: int) -> Path:
        return self.parts_folder / f"part-{number:05d}.parquet"

    def convert_single_file_to_part(self) -> None:
        """A job that has grown big goes on in parts, and its first results become the first of them."""
        if self.single_file.exists():
            self.parts_folder.mkdir(exist_ok=True)
            self.single_file.replace(self.part_path(0))

    def journal_parts(self) -> list[Path]:
        return sorted(part for part in self.journal.glob("*.parquet") if JOURNAL_PART_NAME.fullmatch(part.stem))

    def read_covered_parts(self) -> set[str]:
        """Names of journal parts that a sealed file already holds."""
        names: set[str] = set()
        for file in self.sealed_files():
            with table_errors(file):
                listed = json.loads((read_footer(file).metadata or {}).get(COVERED_PARTS_KEY, b"[]"))
                names |= {name for name in listed if JOURNAL_PART_NAME.fullmatch(name)}
        return names

    def delete_covered_parts(self) -> None:
        covered = self.read_covered_parts()
        for part in self.journal_parts():
            if part.stem in covered:
                part.unlink()

    def table_files(self) -> list[Path]:
        """Those that hold the table, in the order in which their rows were written."""
        covered = self.read_covered_parts()
        return [*self.sealed_files(), *(part for part in self.journal_parts() if part.stem not in covered)]

    def read_schemas(self) -> Iterator[pa.Schema]:
        """Of each file that holds the table. Raises StorageError."""
        for file in self.table_files():
            with table_errors(file):
                yield read_footer(file).schema.to_arrow_schema()

    def read(self, columns: list[str] | None) -> Iterator[pa.Table]:
        """All rows, of the columns asked for, or of all; of an image's rows the last one counts."""
        return (read_table(file, columns) for file in self.table_files())

    def read_rows(self, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        """The same, row by row."""
        for file in self.table_files():
            with table_errors(file):
                rows = convert_times_to_text(read_table(file, columns)).to_pylist()
            yield from rows

    def read_newest(self, columns: list[str]) -> pa.Table:
        """Some of our columns, of the row that counts for each image (and invalid manifest row), in order."""
        schema = pa.schema([field for field in RESULT_FIELDS if field.name in columns])
        return keep_newest_rows(
            pa.concat_tables(
                [schema.empty_table(), *(conform_to_schema(table, schema) for table in self.read(columns))]
            )
        )

    def read_newest_all_columns(self) -> pa.Table:
        """The same with all columns, the manifest's own ones, too, which may differ from file to file."""
        tables = [pa.schema(RESULT_FIELDS).empty_table(), *self.read(None)]
        schema = pa.unify_schemas([table.schema.remove_metadata() for table in tables], promote_options="permissive")
        return keep_newest_rows(pa.concat_tables([conform_to_schema(table, schema) for table in tables]))
