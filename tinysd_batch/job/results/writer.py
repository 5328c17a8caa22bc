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
from tinysd_batch.job.manifest.formats.parquet_types import plain_schema
from tinysd_batch.job.results.schema import COVERS, FIELDS, SCHEMA_VERSION
from tinysd_batch.job.results.table import ResultsPaths, damaged_table, fit, keys_of, newest, read_footer, read_table
from tinysd_batch.storage.atomic import write_atomically
from tinysd_batch.text import storable_value

ONE_FILE_ROWS = 100_000  # jobs up to this many rows end as one results.parquet
SEAL_ROWS = 131_072
FLUSH_EVERY_S = 1.0
FLUSH_ROWS = 4096
# Texts from the system rather than the manifest, which was checked: host and device names, paths, messages.
SYSTEM_COLUMNS = (
    "error_class", "error_message", "degraded", "model", "precision", "device_name", "worker", "node", "reused",
)  # fmt: skip
NAMED_FILES = 3  # in a message


class ResultsWriter:
    """Collects rows, makes them durable about once a second, and seals them at the end."""

    def __init__(
        self, job_folder: Path, schema: pa.Schema, total_rows: int,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        """`guard` surrounds every write, and raises where another driver has taken the job over."""
        self.guard = guard
        self.paths = ResultsPaths(job_folder)
        self.schema = schema
        carried = list(schema)[len(FIELDS) :]
        self.plain_schema = plain_schema(schema, [field.name for field in carried])
        self.text_columns = [field.name for field in carried if pa.types.is_string(field.type)]
        self.big = total_rows > ONE_FILE_ROWS
        self.buffer: list[dict[str, Any]] = []
        self.last_flush = time.monotonic()
        with self.guard():
            self.paths.drop_covered_journal()
            if self.big:
                self.paths.make_one_file_a_part()
        # Names that a sealed file covers must not come again: they would be taken for leftovers and deleted.
        used = {part.stem for part in self.paths.journal_parts()} | self.paths.covered()
        self.sequence = 1 + max((int(name) for name in used), default=0)
        self.rows_in = {file: read_footer(file).num_rows for file in self.paths.files()}  # of each file of the table
        self.journal_rows = sum(self.rows_in[part] for part in self.paths.journal_parts())

    def append(self, row: dict[str, Any]) -> None:
        for name in self.text_columns:  # a job that began with text goes on with text
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                row[name] = json.dumps(value, ensure_ascii=False)
        self.buffer.append(row | {name: storable_value(row[name]) for name in SYSTEM_COLUMNS if row.get(name)})

    def flush_if_due(self) -> bool:
        """Flush when a second has passed or many rows wait; True when rows became durable."""
        due = time.monotonic() - self.last_flush >= FLUSH_EVERY_S or len(self.buffer) >= FLUSH_ROWS
        return bool(self.buffer) and due and self.flush()

    def flush(self) -> bool:
        """Make all rows durable now."""
        self.last_flush = time.monotonic()
        if not self.buffer:
            return False
        table = fit(pa.Table.from_pylist(self.buffer, self.plain_schema), self.schema)
        with self.guard():
            part = self.paths.journal / f"{self.sequence:08d}.parquet"
            write_atomically(to_parquet(table, compression="none"), part)
        self.rows_in[part] = len(self.buffer)
        self.journal_rows += len(self.buffer)
        self.sequence += 1
        self.buffer.clear()
        if self.big and self.journal_rows >= SEAL_ROWS:
            self.seal()
        return True

    def seal(self) -> None:
        """Move the journal into the results: one sorted file, or for big jobs one more part.

        Raises StorageError where somebody has deleted files of the table, once what is left is sealed.
        """
        self.flush()
        with self.guard():
            gone = self.find_lost_files()
        if parts := self.paths.journal_parts():
            self.seal_parts(parts)
        self.rows_in = {file: read_footer(file).num_rows for file in self.paths.files()}
        if gone:
            rows, names = sum(gone.values()), ", ".join(str(file) for file in sorted(gone)[:NAMED_FILES])
            more = f" and {len(gone) - NAMED_FILES:,} more" if len(gone) > NAMED_FILES else ""
            raise StorageError(
                f"{names}{more}: deleted or cut short while the job ran, with {rows:,} rows of the table; submit "
                f"again: images that are there are taken over"
            )

    def find_lost_files(self) -> dict[Path, int]:
        """Files of the table that hold fewer rows than were written to them, and how many are lost."""
        there = {*self.paths.sealed_files(), *self.paths.journal_parts()}
        left = {file: read_footer(file).num_rows if file in there else 0 for file in self.rows_in}
        return {file: rows - left[file] for file, rows in self.rows_in.items() if left[file] < rows}

    def seal_parts(self, parts: list[Path]) -> None:
        older = [self.paths.one_file] if not self.big and self.paths.one_file.exists() else []
        tables = [read_table(file) for file in [*older, *parts]]
        with damaged_table(self.paths.one_file):
            table = newest(pa.concat_tables([fit(each, self.schema) for each in tables]))
        covers = json.dumps([part.stem for part in parts]).encode()
        table = table.replace_schema_metadata({COVERS: covers, b"tinysd_schema": SCHEMA_VERSION.encode()})
        with self.guard():
            write_atomically(to_parquet(table), self.next_part() if self.big else self.paths.one_file)
            self.paths.drop_covered_journal()
        self.journal_rows = 0

    def next_part(self) -> Path:
        return self.paths.part(1 + max(map(part_number, self.paths.sealed_files()), default=-1))

    def drop_superseded(self, corrected: Iterable[int] = ()) -> None:
        """Leave the newest row of each image only: in a big job, one tried again has its older row in a sealed part.

        `corrected` are manifest rows that have no fault any more, whether their images are there or not.

        Newer parts count, and each is rewritten whole, so a crash in between leaves rows to drop, and none missing.
        """
        newer = {(row, 0) for row in corrected}
        for part in reversed(self.paths.sealed_files()):
            keys = keys_in(read_table(part, ["row", "index"]))
            if not newer.isdisjoint(keys):
                self.rewrite(part, newer)
            newer.update(keys)
            newer.update((row, 0) for row, index in keys if index)  # a fault is superseded by an image of its row

    def rewrite(self, part: Path, without: set[tuple[int, int]]) -> None:
        with damaged_table(part):
            table = fit(read_table(part), self.schema)
        table = table.filter(pa.array([key not in without for key in keys_in(table)], pa.bool_()))
        table = table.replace_schema_metadata(read_footer(part).metadata)
        with self.guard():
            write_atomically(to_parquet(table), part)
        self.rows_in[part] = len(table)


def part_number(part: Path) -> int:
    """The number in `part-00007.parquet`; -1 for another name."""
    number = part.stem.removeprefix("part-")
    return int(number) if number.isascii() and number.isdecimal() else -1


def keys_in(table: pa.Table) -> list[tuple[int, int]]:
    rows, indexes = keys_of(table)
    return list(zip(rows.tolist(), indexes.tolist(), strict=True))


def to_parquet(table: pa.Table, compression: str = "zstd") -> bytes:
    """Compressing takes more than half of the time for a few rows, which do not live long."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression)
    return bytes(sink.getvalue())
