"""The results table and the journal it grows from. The driver is their only writer.

While a job runs, finished rows go to small Parquet parts under `_tinysd/journal/`, about one a second, each written
whole or not at all. At the end they are sealed into `results.parquet`, or for big jobs into `results/part-*.parquet`.
A sealed file names the journal parts it holds, so a crash between sealing and deleting loses and doubles nothing.
Sealing compares the files with what was written to them, so that files which somebody deletes meanwhile are noticed.
"""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinysd_batch.errors import StorageError
from tinysd_batch.job.manifest.formats.parquet_types import apply_transport_types
from tinysd_batch.job.results.schema import COVERED_PARTS_KEY, RESULT_FIELDS, SCHEMA_VERSION
from tinysd_batch.job.results.table import (
    ResultsTable,
    conform_to_schema,
    get_row_keys,
    keep_newest_rows,
    read_footer,
    read_table,
    table_errors,
)
from tinysd_batch.storage.atomic import write_atomically
from tinysd_batch.text import make_value_storable

MAX_SINGLE_FILE_ROWS = 100_000  # jobs up to this many rows end as one results.parquet
SEAL_ROWS = 131_072
FLUSH_EVERY_S = 1.0
FLUSH_ROWS = 4096
# Texts from the system rather than the manifest, which was checked: host and device names, paths, messages.
SYSTEM_COLUMNS = (
    "error_class", "error_message", "degraded", "model", "precision", "device_name", "worker", "node", "reused",
)  # fmt: skip
MAX_NAMED_FILES = 3  # in a message


class ResultsWriter:
    """Collects rows, makes them durable about once a second, and seals them at the end."""

    def __init__(
        self, job_folder: Path, schema: pa.Schema, total_rows: int,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        """`guard` surrounds every write, and raises where another driver has taken the job over."""
        self.guard = guard
        self.table = ResultsTable(job_folder)
        self.schema = schema
        carried = list(schema)[len(RESULT_FIELDS) :]
        self.plain_schema = apply_transport_types(schema, [field.name for field in carried])
        self.text_columns = [field.name for field in carried if pa.types.is_string(field.type)]
        self.is_multi_part = total_rows > MAX_SINGLE_FILE_ROWS
        self.buffer: list[dict[str, Any]] = []
        self.last_flush = time.monotonic()
        with self.guard():
            self.table.delete_covered_parts()
            if self.is_multi_part:
                self.table.convert_single_file_to_part()
        # Names that a sealed file covers must not come again: they would be taken for leftovers and deleted.
        used = {part.stem for part in self.table.journal_parts()} | self.table.read_covered_parts()
        self.next_part_number = 1 + max((int(name) for name in used), default=0)
        self.row_counts = {
            file: read_footer(file).num_rows for file in self.table.table_files()
        }  # of each file of the table
        self.journal_rows = sum(self.row_counts[part] for part in self.table.journal_parts())

    def append(self, row: dict[str, Any]) -> None:
        for name in self.text_columns:  # a job that began with text goes on with text
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                row[name] = json.dumps(value, ensure_ascii=False)
        self.buffer.append(row | {name: make_value_storable(row[name]) for name in SYSTEM_COLUMNS if row.get(name)})

    def flush_if_due(self) -> bool:
        """Flush when a second has passed or many rows wait; True when rows became durable."""
        due = time.monotonic() - self.last_flush >= FLUSH_EVERY_S or len(self.buffer) >= FLUSH_ROWS
        return bool(self.buffer) and due and self.flush()

    def flush(self) -> bool:
        """Make all rows durable now."""
        self.last_flush = time.monotonic()
        if not self.buffer:
            return False
        table = conform_to_schema(pa.Table.from_pylist(self.buffer, self.plain_schema), self.schema)
        with self.guard():
            part = self.table.journal / f"{self.next_part_number:08d}.parquet"
            write_atomically(to_parquet(table, compression="none"), part)
        self.row_counts[part] = len(self.buffer)
        self.journal_rows += len(self.buffer)
        self.next_part_number += 1
        self.buffer.clear()
        if self.is_multi_part and self.journal_rows >= SEAL_ROWS:
            self.seal()
        return True

    def seal(self) -> None:
        """Move the journal into the results: one sorted file, or for big jobs one more part.

        Raises StorageError where somebody has deleted files of the table, once what is left is sealed.
        """
        self.flush()
        with self.guard():
            gone = self.find_lost_files()
        if parts := self.table.journal_parts():
            self.seal_journal(parts)
        self.row_counts = {file: read_footer(file).num_rows for file in self.table.table_files()}
        if gone:
            rows, names = sum(gone.values()), ", ".join(str(file) for file in sorted(gone)[:MAX_NAMED_FILES])
            more = f" and {len(gone) - MAX_NAMED_FILES:,} more" if len(gone) > MAX_NAMED_FILES else ""
            raise StorageError(
                f"{names}{more}: deleted or cut short while the job ran, with {rows:,} rows of the table; submit "
                f"again: images that are there are taken over"
            )

    def find_lost_files(self) -> dict[Path, int]:
        """Files of the table that hold fewer rows than were written to them, and how many are lost."""
        there = {*self.table.sealed_files(), *self.table.journal_parts()}
        left = {file: read_footer(file).num_rows if file in there else 0 for file in self.row_counts}
        return {file: rows - left[file] for file, rows in self.row_counts.items() if left[file] < rows}

    def seal_journal(self, parts: list[Path]) -> None:
        older = [self.table.single_file] if not self.is_multi_part and self.table.single_file.exists() else []
        tables = [read_table(file) for file in [*older, *parts]]
        with table_errors(self.table.single_file):
            table = keep_newest_rows(pa.concat_tables([conform_to_schema(each, self.schema) for each in tables]))
        covers = json.dumps([part.stem for part in parts]).encode()
        table = table.replace_schema_metadata({COVERED_PARTS_KEY: covers, b"tinysd_schema": SCHEMA_VERSION.encode()})
        with self.guard():
            write_atomically(to_parquet(table), self.next_part_path() if self.is_multi_part else self.table.single_file)
            self.table.delete_covered_parts()
        self.journal_rows = 0

    def next_part_path(self) -> Path:
        return self.table.part_path(1 + max(map(parse_part_number, self.table.sealed_files()), default=-1))

    def delete_superseded_rows(self, corrected: Iterable[int] = ()) -> None:
        """Leave the newest row of each image only: in a big job, one tried again has its older row in a sealed part.

        `corrected` are manifest rows that have no fault any more, whether their images are there or not.

        Newer parts count, and each is rewritten whole, so a crash in between leaves rows to drop, and none missing.
        """
        newer = {(row, 0) for row in corrected}
        for part in reversed(self.table.sealed_files()):
            keys = list_row_keys(read_table(part, ["row", "index"]))
            if not newer.isdisjoint(keys):
                self.rewrite_part(part, newer)
            newer.update(keys)
            newer.update((row, 0) for row, index in keys if index)  # a fault is superseded by an image of its row

    def rewrite_part(self, part: Path, without: set[tuple[int, int]]) -> None:
        with table_errors(part):
            table = conform_to_schema(read_table(part), self.schema)
        table = table.filter(pa.array([key not in without for key in list_row_keys(table)], pa.bool_()))
        table = table.replace_schema_metadata(read_footer(part).metadata)
        with self.guard():
            write_atomically(to_parquet(table), part)
        self.row_counts[part] = len(table)


def parse_part_number(part: Path) -> int:
    """The number in `part-00007.parquet`; -1 for another name."""
    number = part.stem.removeprefix("part-")
    return int(number) if number.isascii() and number.isdecimal() else -1


def list_row_keys(table: pa.Table) -> list[tuple[int, int]]:
    rows, indexes = get_row_keys(table)
    return list(zip(rows.tolist(), indexes.tolist(), strict=True))


def to_parquet(table: pa.Table, compression: str = "zstd") -> bytes:
    """Compressing takes more than half of the time for a few rows, which do not live long."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression)
    return bytes(sink.getvalue())
