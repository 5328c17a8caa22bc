"""The results table and the journal it grows from. The driver is their only writer.

While a job runs, finished rows go to small Parquet parts under `_tinysd/journal/`, about one a second, each written
whole or not at all. At the end they are sealed into `results.parquet`, or for big jobs into `results/part-*.parquet`.
A sealed file names the journal parts it holds, so a crash between sealing and deleting loses and doubles nothing.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinysd_batch.config import excerpt
from tinysd_batch.errors import ManifestError, StorageError
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status
from tinysd_batch.storage import check_regular, write_atomically

SCHEMA_VERSION = "1"
ONE_FILE_ROWS = 100_000  # jobs up to this many rows end as one results.parquet
SEAL_ROWS = 131_072
FLUSH_EVERY_S = 1.0
FLUSH_ROWS = 4096
COVERS = b"tinysd_covers"
PART_NAME = re.compile(r"\d{8,12}", re.ASCII)  # a journal part's

TIMESTAMP = pa.timestamp("us", tz="UTC")
FIELDS = [
    pa.field("index", pa.int64()),
    pa.field("row", pa.int64()),
    pa.field("sample", pa.int32()),
    pa.field("id", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("negative_prompt", pa.string()),
    pa.field("prompt_syntax", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("steps", pa.int32()),
    pa.field("sampler", pa.string()),
    pa.field("scale", pa.float64()),
    pa.field("eta", pa.float64()),
    pa.field("image_id", pa.string()),
    pa.field("status", pa.string()),
    pa.field("file_name", pa.string()),
    pa.field("sha256", pa.string()),
    pa.field("bytes", pa.int64()),
    pa.field("error_class", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("attempts", pa.int32()),
    pa.field("degraded", pa.list_(pa.string())),
    pa.field("n_tokens", pa.int32()),
    pa.field("truncated", pa.string()),
    pa.field("negative_truncated", pa.string()),
    pa.field("model", pa.string()),
    pa.field("model_digest", pa.string()),
    pa.field("precision", pa.string()),
    pa.field("device_name", pa.string()),
    pa.field("worker", pa.string()),
    pa.field("node", pa.string()),
    pa.field("text_s", pa.float64()),
    pa.field("denoise_s", pa.float64()),
    pa.field("decode_s", pa.float64()),
    pa.field("peak_memory_bytes", pa.int64()),
    pa.field("started_at", TIMESTAMP),
    pa.field("finished_at", TIMESTAMP),
    pa.field("run_id", pa.string()),
    pa.field("version", pa.string()),
    pa.field("reused", pa.string()),
]
REQUEST_COLUMNS = ("row", "sample", "id", "prompt", "negative_prompt", "prompt_syntax", "seed")
OUR_NAMES = {field.name for field in FIELDS}


def results_schema(extra: Iterable[pa.Field]) -> pa.Schema:
    """Our columns, then the manifest's own; one of those that bears a name of ours becomes `manifest_<name>`."""
    fields = list(FIELDS)
    for field in extra:
        fields.append(field.with_name(extra_name(field.name)))
        if [one.name for one in fields].count(fields[-1].name) > 1:
            name = excerpt(field.name)
            raise ManifestError(
                f"the manifest's column {name} becomes {fields[-1].name} in the results, which is taken"
            )
    return pa.schema(fields)


def extra_name(name: str) -> str:
    return f"manifest_{name}" if name in OUR_NAMES else name


def as_time(seconds: float | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds is not None else None


def image_row(request: ImageRequest, result: ImageResult, run: dict[str, Any]) -> dict[str, Any]:
    """One image as a row of the table; `run` gives model, model_digest, run_id and version."""
    row = {
        **{name: getattr(request, name) for name in REQUEST_COLUMNS},
        **{name: getattr(request.params, name) for name in ("width", "height", "steps", "sampler", "eta")},
        **asdict(result),
        **run,
        "scale": request.scale,
        "image_id": request.image_id,
        "status": str(result.status),
        "started_at": as_time(result.started_at),
        "finished_at": as_time(result.finished_at),
    }
    return row | {extra_name(name): value for name, value in request.extra.items()}


def invalid_row(row: InvalidRow, run: dict[str, Any]) -> dict[str, Any]:
    """A manifest row that gave no image, as a row of the table without an index."""
    now = datetime.now(UTC)
    ours = {
        "row": row.number, "id": row.id, "prompt": row.prompt, "status": str(Status.INVALID), "attempts": 0,
        "error_class": "invalid_row", "error_message": row.reason[:2000], "started_at": now, "finished_at": now,
    }  # fmt: skip
    return {**ours, **run, **{extra_name(name): value for name, value in row.extra.items()}}


def order_key(row: dict[str, Any]) -> tuple[int, int]:
    return row["row"], row["index"] or 0


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
        self.journal_rows = sum(read_footer(part).num_rows for part in self.paths.journal_parts())

    def append(self, row: dict[str, Any]) -> None:
        self.buffer.append(row)

    def flush_if_due(self) -> bool:
        """Flush when a second has passed or many rows wait; True when rows became durable."""
        due = time.monotonic() - self.last_flush >= FLUSH_EVERY_S or len(self.buffer) >= FLUSH_ROWS
        return bool(self.buffer) and due and self.flush()

    def flush(self) -> bool:
        """Make all rows durable now."""
        self.last_flush = time.monotonic()
        if not self.buffer:
            return False
        table = pa.Table.from_pylist(self.buffer, self.schema)
        with self.guard():
            part = self.paths.journal / f"{self.sequence:08d}.parquet"
            write_atomically(to_parquet(table, compression="none"), part)
        self.journal_rows += len(self.buffer)
        self.sequence += 1
        self.buffer.clear()
        if self.big and self.journal_rows >= SEAL_ROWS:
            self.seal()
        return True

    def seal(self) -> None:
        """Move the journal into the results: one sorted file, or for big jobs one more part."""
        self.flush()
        parts = self.paths.journal_parts()
        if not parts:
            return
        older = [self.paths.one_file] if not self.big and self.paths.one_file.exists() else []
        rows = [row for file in [*older, *parts] for row in read_table(file)]
        with damaged_table(self.paths.one_file):
            table = pa.Table.from_pylist(sorted(newest_of_each(rows), key=order_key), self.schema)
        covers = json.dumps([part.stem for part in parts]).encode()
        table = table.replace_schema_metadata({COVERS: covers, b"tinysd_schema": SCHEMA_VERSION.encode()})
        with self.guard():
            write_atomically(to_parquet(table), self.next_part() if self.big else self.paths.one_file)
            self.paths.drop_covered_journal()
        self.journal_rows = 0

    def next_part(self) -> Path:
        return self.paths.part(len(self.paths.sealed_files()))

    def drop_superseded(self) -> None:
        """Leave the newest row of each image only: in a big job, one tried again has its older row in a sealed part.

        Newer parts count, and each is rewritten whole, so a crash in between leaves rows to drop, and none missing.
        """
        newer: set[tuple[int, int]] = set()
        for part in reversed(self.paths.sealed_files()):
            keys = [order_key(row) for row in read_table(part, ["row", "index"])]
            if not newer.isdisjoint(keys):
                self.rewrite(part, newer)
            newer.update(keys)

    def rewrite(self, part: Path, without: set[tuple[int, int]]) -> None:
        kept = [row for row in read_table(part) if order_key(row) not in without]
        with damaged_table(part):
            table = pa.Table.from_pylist(kept, self.schema)
        table = table.replace_schema_metadata(read_footer(part).metadata)
        with self.guard():
            write_atomically(to_parquet(table), part)


def newest_of_each(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per image (and per invalid manifest row): the last one written."""
    return list({order_key(row): row for row in rows}.values())


def to_parquet(table: pa.Table, compression: str = "zstd") -> bytes:
    """Compressing takes more than half of the time for a few rows, which do not live long."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression)
    return bytes(sink.getvalue())


@contextmanager
def damaged_table(file: Path) -> Iterator[None]:
    """Whatever a damaged or foreign table makes pyarrow do becomes a StorageError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StorageError(
            f"{file}: cannot be read: {reason}; move it away and submit again: pictures that are there are taken over"
        ) from None


def read_footer(file: Path) -> Any:
    """Raises StorageError."""
    with damaged_table(file):
        check_regular(file)
        with file.open("rb") as opened:  # pyarrow takes no names that are no UTF-8
            return pq.read_metadata(opened)


def read_table(file: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Raises StorageError."""
    with damaged_table(file):
        check_regular(file)
        with file.open("rb") as opened:  # pyarrow takes no names that are no UTF-8
            parquet = pq.ParquetFile(opened)
            check_columns(parquet.schema_arrow)
            table = parquet.read(columns=columns, use_threads=parquet.metadata.num_rows > FLUSH_ROWS)
        if any(table[name].null_count for name in ("row", "status") if name in table.column_names):
            raise ValueError("a row has no number or no status")
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows


def check_columns(schema: pa.Schema) -> None:
    """Raises ValueError where one of our columns is missing or holds something else."""
    for field in FIELDS:
        position = schema.get_field_index(field.name)
        if position < 0 or schema.field(position).type != field.type:
            raise ValueError(f"column {field.name} is not the {field.type} that was written")


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

    def read_rows(self, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        """All rows, sealed first, of the columns asked for, or of all; of an image's rows the last one counts."""
        covered = self.covered()
        for file in [*self.sealed_files(), *(part for part in self.journal_parts() if part.stem not in covered)]:
            yield from read_table(file, columns)
