"""Write the results table and its journal. The driver is their only writer.

While a job runs, finished rows are written to small Parquet parts in `_tinysd/journal/`, about one part per second,
each atomically. At the end they are sealed into `results.parquet`, or into `results/part-*.parquet` for a large job. A
sealed file lists the journal parts that it contains, so a crash between sealing and deleting neither loses nor
duplicates rows. Sealing compares the files with the row counts that were written, to detect files that somebody deleted
during the run.
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
from tinysd_batch.job.results.columns import COLUMN_FIELDS
from tinysd_batch.job.results.schema import COVERED_PARTS_KEY, FILE_METADATA
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

MAX_SINGLE_FILE_ROWS = 100_000  # a job with at most this many rows ends as one results.parquet
SEAL_ROWS = 131_072
FLUSH_EVERY_S = 1.0
FLUSH_ROWS = 4096
# Text from the system, such as host names, paths and messages. Unlike the manifest, it has not been checked.
SYSTEM_COLUMNS = (
    "error_class", "error_message", "degraded", "model", "precision", "device_name", "worker", "node", "reused",
)  # fmt: skip
MAX_NAMED_FILES = 3  # in an error message


class ResultsWriter:
    """Collect rows, write them to the journal about once per second, and seal the journal at the end."""

    def __init__(
        self,
        job_folder: Path,
        schema: pa.Schema,
        total_rows: int,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Prepare to add rows to the table of a job.

        Args:
            job_folder: The job's folder.
            schema: Schema of the table, from `build_results_schema`.
            total_rows: Number of rows that the table has when the job is finished.
            guard: Context of every write, which raises JobLockedError if another driver has taken the job over.
        """
        self.guard = guard
        self.table = ResultsTable(job_folder)
        self.schema = schema
        extra_fields = list(schema)[len(COLUMN_FIELDS) :]
        self.plain_schema = apply_transport_types(schema, [field.name for field in extra_fields])
        self.text_columns = [field.name for field in extra_fields if pa.types.is_string(field.type)]
        self.is_multi_part = total_rows > MAX_SINGLE_FILE_ROWS
        self.buffer: list[dict[str, Any]] = []
        self.last_flush = time.monotonic()
        with self.guard():
            self.table.delete_covered_parts()
            if self.is_multi_part:
                self.table.convert_single_file_to_part()
        # A part must not get a name that a sealed file lists: it would be deleted as a leftover.
        used = {part.stem for part in self.table.journal_parts()} | self.table.read_covered_parts()
        self.next_part_number = 1 + max((int(name) for name in used), default=0)
        self.row_counts = {file: read_footer(file).num_rows for file in self.table.table_files()}
        self.journal_rows = sum(self.row_counts[part] for part in self.table.journal_parts())

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, which becomes durable with the next `flush`."""
        for name in self.text_columns:  # a column that was text in the first run remains text
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                row[name] = json.dumps(value, ensure_ascii=False)
        self.buffer.append(row | {name: make_value_storable(row[name]) for name in SYSTEM_COLUMNS if row.get(name)})

    def flush_if_due(self) -> bool:
        """Flush if a second has passed or many rows are buffered; return whether rows became durable."""
        is_due = time.monotonic() - self.last_flush >= FLUSH_EVERY_S or len(self.buffer) >= FLUSH_ROWS
        return bool(self.buffer) and is_due and self.flush()

    def flush(self) -> bool:
        """Write all buffered rows to the journal now; return whether there were any."""
        self.last_flush = time.monotonic()
        if not self.buffer:
            return False
        table = conform_to_schema(pa.Table.from_pylist(self.buffer, self.plain_schema), self.schema)
        table = table.replace_schema_metadata(FILE_METADATA)
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
        """Move the rows of the journal to `results.parquet`, or to a new part for a large job.

        Raises:
            StorageError: Files of the table were deleted during the run. The remaining ones are sealed first.
        """
        self.flush()
        with self.guard():
            lost_rows = self.find_lost_files()
        if parts := self.table.journal_parts():
            self.seal_journal(parts)
        self.row_counts = {file: read_footer(file).num_rows for file in self.table.table_files()}
        if lost_rows:
            names = ", ".join(str(file) for file in sorted(lost_rows)[:MAX_NAMED_FILES])
            more = f" and {len(lost_rows) - MAX_NAMED_FILES:,} more" if len(lost_rows) > MAX_NAMED_FILES else ""
            raise StorageError(
                f"{names}{more}: deleted or cut short while the job ran, with {sum(lost_rows.values()):,} rows of the "
                f"table; submit again: existing images are kept"
            )

    def find_lost_files(self) -> dict[Path, int]:
        """Return the files of the table that have fewer rows than were written, with the number of missing rows."""
        existing = {*self.table.sealed_files(), *self.table.journal_parts()}
        current = {file: read_footer(file).num_rows if file in existing else 0 for file in self.row_counts}
        return {file: rows - current[file] for file, rows in self.row_counts.items() if current[file] < rows}

    def seal_journal(self, parts: list[Path]) -> None:
        """Write the rows of journal parts to a sealed file, then delete the parts."""
        is_extending = not self.is_multi_part and self.table.single_file.exists()
        tables = [read_table(file) for file in [*([self.table.single_file] if is_extending else []), *parts]]
        with table_errors(self.table.single_file):
            table = keep_newest_rows(pa.concat_tables([conform_to_schema(part, self.schema) for part in tables]))
        covers = json.dumps([part.stem for part in parts]).encode()
        table = table.replace_schema_metadata({**FILE_METADATA, COVERED_PARTS_KEY: covers})
        with self.guard():
            write_atomically(to_parquet(table), self.next_part_path() if self.is_multi_part else self.table.single_file)
            self.table.delete_covered_parts()
        self.journal_rows = 0

    def next_part_path(self) -> Path:
        """Return the path of a new part, numbered after the existing ones."""
        return self.table.part_path(1 + max(map(parse_part_number, self.table.sealed_files()), default=-1))

    def delete_superseded_rows(self, corrected: Iterable[int] = ()) -> None:
        """Keep only the newest row of each image.

        In a large job, the older row of an image that was generated again is in an earlier part. Parts are processed
        from the newest to the oldest and each is rewritten atomically, so a crash leaves some superseded rows but loses
        none.

        Args:
            corrected: Manifest rows that are no longer invalid, whether their images exist or not.
        """
        newer = {(row, 0) for row in corrected}
        for part in reversed(self.table.sealed_files()):
            keys = list_row_keys(read_table(part, ["row", "index"]))
            if not newer.isdisjoint(keys):
                self.rewrite_part(part, newer)
            newer.update(keys)
            newer.update((row, 0) for row, index in keys if index)  # an image supersedes the fault of its row

    def rewrite_part(self, part: Path, without: set[tuple[int, int]]) -> None:
        """Rewrite a part without the rows that have one of these keys."""
        with table_errors(part):
            table = conform_to_schema(read_table(part), self.schema)
        table = table.filter(pa.array([key not in without for key in list_row_keys(table)], pa.bool_()))
        covers = (read_footer(part).metadata or {}).get(COVERED_PARTS_KEY, b"[]")
        table = table.replace_schema_metadata({**FILE_METADATA, COVERED_PARTS_KEY: covers})
        with self.guard():
            write_atomically(to_parquet(table), part)
        self.row_counts[part] = len(table)


def parse_part_number(part: Path) -> int:
    """Return the number in `part-00007.parquet`, and -1 for any other name."""
    number = part.stem.removeprefix("part-")
    return int(number) if number.isascii() and number.isdecimal() else -1


def list_row_keys(table: pa.Table) -> list[tuple[int, int]]:
    """Return the keys of `get_row_keys` as pairs."""
    rows, indexes = get_row_keys(table)
    return list(zip(rows.tolist(), indexes.tolist(), strict=True))


def to_parquet(table: pa.Table, compression: str = "zstd") -> bytes:
    """Serialize a table. Journal parts are not compressed, which would take more than half of the time."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression)
    return bytes(sink.getvalue())
