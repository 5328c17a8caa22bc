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
from tinysd_batch.job.manifest.formats.parquet_types import plain_type, with_times_as
from tinysd_batch.job.results.schema import COVERS, FIELDS, check_columns
from tinysd_batch.storage.atomic import check_regular

MANY_ROWS = 4096  # from which on a table is read by several threads
PART_NAME = re.compile(r"\d{8,12}", re.ASCII)  # a journal part's


@contextmanager
def damaged_table(file: Path) -> Iterator[None]:
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
    with damaged_table(file):
        check_regular(file)
        with file.open("rb") as opened:  # pyarrow takes no names that are no UTF-8
            return pq.read_metadata(opened)


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Raises StorageError."""
    with damaged_table(file):
        check_regular(file)
        with file.open("rb") as opened:  # pyarrow takes no names that are no UTF-8
            parquet = pq.ParquetFile(opened)
            check_columns(parquet.schema_arrow)
            table = parquet.read(columns=columns, use_threads=parquet.metadata.num_rows > MANY_ROWS)
        if any(table[name].null_count for name in ("row", "status") if name in table.column_names):
            raise ValueError("a row has no number or no status")
        table.validate(full=True)
        return table


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of `schema`, empty where it has none. Raises ArrowException where that cannot be."""
    positions = [(field, table.schema.get_field_index(field.name)) for field in schema]
    columns = [
        table.column(at).cast(field.type) if at >= 0 else pa.nulls(len(table), field.type) for field, at in positions
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def readable(table: pa.Table) -> pa.Table:
    """The table with carried times as text: Python has none of nanoseconds, or beyond the year 9999."""
    ours = {field.name for field in FIELDS}
    for position, field in enumerate(table.schema):
        as_text = with_times_as(field.type, lambda _: pa.string())
        if as_text != field.type and field.name not in ours:
            column = table.column(position)
            try:
                column = column.cast(as_text)
            except pa.ArrowException:  # a time zone that is not known here
                column = column.cast(plain_type(field.type)).cast(as_text)
            table = table.set_column(position, field.name, column)
    return table


def keys_of(table: pa.Table) -> tuple[Any, Any]:
    """What tells rows apart, as two arrays: manifest row, and the image's index, which is 0 for an invalid row."""
    return table["row"].to_numpy(), pc.fill_null(table["index"], 0).to_numpy()


def newest(table: pa.Table) -> pa.Table:
    """One row per image (and per invalid manifest row), the last one written, in the manifest's order.

    A manifest row that had a fault and has images now has only those.
    """
    row, index = keys_of(table)
    order = np.lexsort((index, row))  # stable: what was written later stays behind
    last = np.ones(len(order), bool)
    same_row = np.diff(row[order]) == 0
    last[:-1] = ~same_row | ((np.diff(index[order]) != 0) & (index[order][:-1] != 0))
    return table.take(order[last])


class ResultsPaths:
    """Where results and journal of a job lie, and how to read them together."""

    def __init__(self, job_folder: Path) -> None:
        self.journal = job_folder / "_tinysd" / "journal"
        self.one_file = job_folder / "results.parquet"
        self.parts_folder = job_folder / "results"

    def sealed_files(self) -> list[Path]:
        return ([self.one_file] if self.one_file.exists() else []) + sorted(self.parts_folder.glob("part-*.parquet"))

    def part(self, number: int) -> Path:
        return self.parts_folder / f"part-{number:05d}.parquet"

    def make_one_file_a_part(self) -> None:
        """A job that has grown big goes on in parts, and its first results become the first of them."""
        if self.one_file.exists():
            self.parts_folder.mkdir(exist_ok=True)
            self.one_file.replace(self.part(0))

    def journal_parts(self) -> list[Path]:
        return sorted(part for part in self.journal.glob("*.parquet") if PART_NAME.fullmatch(part.stem))

    def covered(self) -> set[str]:
        """Names of journal parts that a sealed file already holds."""
        names: set[str] = set()
        for file in self.sealed_files():
            with damaged_table(file):
                listed = json.loads((read_footer(file).metadata or {}).get(COVERS, b"[]"))
                names |= {name for name in listed if PART_NAME.fullmatch(name)}
        return names

    def drop_covered_journal(self) -> None:
        covered = self.covered()
        for part in self.journal_parts():
            if part.stem in covered:
                part.unlink()

    def files(self) -> list[Path]:
        """Those that hold the table, in the order in which their rows were written."""
        covered = self.covered()
        return [*self.sealed_files(), *(part for part in self.journal_parts() if part.stem not in covered)]

    def schemas(self) -> Iterator[pa.Schema]:
        """Of each file that holds the table. Raises StorageError."""
        for file in self.files():
            with damaged_table(file):
                yield read_footer(file).schema.to_arrow_schema()

    def read(self, columns: list[str] | None) -> Iterator[pa.Table]:
        """All rows, of the columns asked for, or of all; of an image's rows the last one counts."""
        return (read_table(file, columns) for file in self.files())

    def read_rows(self, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        """The same, row by row."""
        for file in self.files():
            with damaged_table(file):
                rows = readable(read_table(file, columns)).to_pylist()
            yield from rows

    def read_newest(self, columns: list[str]) -> pa.Table:
        """Some of our columns, of the row that counts for each image (and invalid manifest row), in order."""
        schema = pa.schema([field for field in FIELDS if field.name in columns])
        return newest(pa.concat_tables([schema.empty_table(), *(fit(table, schema) for table in self.read(columns))]))

    def read_newest_whole(self) -> pa.Table:
        """The same with all columns, the manifest's own ones, too, which may differ from file to file."""
        tables = [pa.schema(FIELDS).empty_table(), *self.read(None)]
        schema = pa.unify_schemas([table.schema.remove_metadata() for table in tables], promote_options="permissive")
        return newest(pa.concat_tables([fit(table, schema) for table in tables]))
