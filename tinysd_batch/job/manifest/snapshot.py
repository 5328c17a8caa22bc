"""The manifest's rows as the job read them, kept in the job folder as `_tinysd/rows.jsonl.gz`: the snapshot.

A job takes its rows from here, so that a newer version that reads manifests differently changes nothing in it. A row is
kept with all its settings filled in, so neither quotes nor the order of columns matter. Lines are in the order in which
the job learned of its rows, which is the order of their images: those of the first run as the manifest has them, then
rows that were appended, or that had a fault and are good now. A line out of its place says which row it is; of several
lines of a row the last one counts. Lines are only ever added at the end, so that a run that is killed before it writes
`job.json`, which says how many there are, changes nothing.
"""

import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from tinysd_batch.config import (
    MAX_IMAGES_PER_ROW,
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    MAX_SIDE_PX,
    MAX_STEPS,
    SAMPLERS,
)
from tinysd_batch.errors import StorageError
from tinysd_batch.model.text.prompt_syntax import SYNTAXES
from tinysd_batch.records import InvalidRow, Row, SamplingParams
from tinysd_batch.storage.atomic import check_regular_file, write_atomically
from tinysd_batch.text import has_surrogates

READER_VERSION = 2  # counts the versions of the rules by which manifests are read; 0.1.0 read them by the first
ROWS_FILE = "rows.jsonl.gz"
MAX_LINE_BYTES = 64 << 20
MAX_BUFFER_BYTES = 64 << 20  # packed rows beyond this wait on disk until the job's lock is held
ROW_FIELDS = tuple(each.name for each in fields(Row) if each.name not in ("number", "params"))
PARAM_FIELDS = tuple(each.name for each in fields(SamplingParams))
JSON_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
ROWS_PER_WRITE = 256  # rows
ROW_NUMBER_SUFFIX = re.compile(r',"row":(\d{1,18})}$', re.ASCII)
StoredRow = dict[str, Any]


class SnapshotRow(NamedTuple):
    """A row of the snapshot: its number in the manifest, and its line without that."""

    number: int
    line: str

    @property
    def is_invalid(self) -> bool:
        return '"invalid":true' in self.line and bool(parse_snapshot_line(self.line).get("invalid"))

    def to_row(self) -> Row | InvalidRow:
        """The row again. Raises StorageError for what no reading of a manifest gives."""
        kept = parse_snapshot_line(self.line)
        if kept.get("invalid"):
            reason = kept.get("reason") or "had a fault when the job was started"  # 0.1.0 did not keep it
            return InvalidRow(self.number, reason, kept["prompt"], kept["id"], kept["extra"], kept.get("line"))
        params = restore_params(*(kept[name] for name in PARAM_FIELDS))
        return Row(self.number, params=params, **{name: kept[name] for name in ROW_FIELDS})


@lru_cache(1024, typed=True)
def restore_params(*values: Any) -> SamplingParams:
    return SamplingParams(*values)


def row_to_dict(row: Row | InvalidRow) -> StoredRow:
    """What is kept of a row: all that decides its images and its lines of the table, but for its number."""
    if isinstance(row, InvalidRow):
        shown = {"reason": row.reason, "line": row.line}
        return {"invalid": True, "prompt": row.prompt, "id": row.id, "extra": row.extra, **shown}
    own = {name: getattr(row, name) for name in ROW_FIELDS}
    return own | {name: getattr(row.params, name) for name in PARAM_FIELDS}


def row_to_line(row: Row | InvalidRow) -> str:
    return JSON_ENCODER.encode(row_to_dict(row))


def add_row_number(line: str, number: int, place: int) -> str:
    """The line as the snapshot holds it at this place."""
    return line if number == place else f'{line[:-1]},"row":{number}}}'


class SnapshotWriter:
    """Packs rows as they are read, before anything may be written to the job folder."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.SpooledTemporaryFile(MAX_BUFFER_BYTES)  # noqa: SIM115 - lives as long as we do
        self.gzip_file = gzip.GzipFile(fileobj=self.file, mode="wb", compresslevel=1, mtime=0)
        self.lines: list[str] = []  # not packed yet
        self.count = 0
        self.highest_row_number = 0  # the highest row number
        self.out_of_order = 0  # that come after one of the same or a higher number

    def add(self, row: Row | InvalidRow) -> None:
        self.count += 1
        self.out_of_order += row.number <= self.highest_row_number
        self.highest_row_number = max(self.highest_row_number, row.number)
        self.lines.append(add_row_number(row_to_line(row), row.number, self.count) + "\n")
        if len(self.lines) >= ROWS_PER_WRITE:
            self.pack()

    def pack(self) -> None:
        self.gzip_file.write("".join(self.lines).encode())
        self.lines.clear()

    def close(self) -> None:
        """Pack what is left; nothing more can be added."""
        self.pack()
        self.gzip_file.close()
        self.file.seek(0)

    def save(self, state: Path) -> None:
        """Write them all. Raises StorageError."""
        self.close()
        write_atomically(self.file.read(), state / ROWS_FILE)

    def rows(self) -> Iterator[Row | InvalidRow]:
        """Close, and read the rows back in the order in which they were added."""
        self.close()
        with gzip.open(self.file) as lines:
            yield from (row.to_row() for row in parse_snapshot_rows(line.decode().rstrip("\n") for line in lines))


@dataclass(slots=True)
class OutOfOrderLines:
    """Lines that come after one of the same or a higher row number: of rows that were corrected or filled in."""

    positions: dict[int, int] = field(default_factory=dict)  # row number -> place of its last such line, from 1
    invalid_rows: set[int] = field(default_factory=set)  # row numbers of which that line has a fault


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The rows that a job folder holds, of which the first `count` lines are the job's."""

    state: Path
    count: int
    out_of_order: int = 0  # of them, that come after one of the same or a higher number

    @property
    def exists(self) -> bool:
        return (self.state / ROWS_FILE).exists()

    def lines(self) -> Iterator[SnapshotRow]:
        """All lines in their order. Raises StorageError for a damaged or short file."""
        return parse_snapshot_rows(read_snapshot_lines(self.state, self.count))

    def rows(self) -> Iterator[SnapshotRow]:
        """The lines that count, in the order of their images. Raises StorageError."""
        late = self.find_out_of_order_lines()
        for place, row in enumerate(self.lines(), start=1):
            if late.positions.get(row.number, place) == place:
                yield row

    def find_out_of_order_lines(self) -> OutOfOrderLines:
        """A pass over the whole file where there are any."""
        late = OutOfOrderLines()
        highest = 0
        for place, row in enumerate(self.lines() if self.out_of_order else (), start=1):
            if row.number <= highest:
                late.positions[row.number] = place
                (late.invalid_rows.add if row.is_invalid else late.invalid_rows.discard)(row.number)
            highest = max(highest, row.number)
        return late


def parse_snapshot_rows(lines: Iterable[str]) -> Iterator[SnapshotRow]:
    for place, line in enumerate(lines, start=1):
        explicit = ROW_NUMBER_SUFFIX.search(line)
        yield SnapshotRow(int(explicit[1]), line[: explicit.start()] + "}") if explicit else SnapshotRow(place, line)


def read_snapshot_lines(state: Path, count: int) -> Iterator[str]:
    path = state / ROWS_FILE
    try:
        check_regular_file(path)
        with gzip.open(path) as file:
            for number in range(count):
                line = file.readline(MAX_LINE_BYTES)
                if not line.endswith(b"\n"):
                    raise EOFError(f"it holds {number} whole rows of {count}")
                yield line.decode().rstrip("\n")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StorageError(
            f"{path}: cannot be read: {reason}; restore it from a backup, or name another folder with -o and take "
            f"the images over with --reuse {state.parent}"
        ) from None


def parse_snapshot_line(line: str) -> StoredRow:
    """The content of a line. Raises StorageError for what `as_line` did not write: anybody may make a job folder."""
    try:
        kept = json.loads(line)
        check_stored_row(kept)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise StorageError(f"{ROWS_FILE}: not a row of a job: {error}; name another folder with -o") from None
    return dict(kept)


def check_stored_row(kept: StoredRow) -> None:
    """Raises KeyError, TypeError or ValueError for values that no manifest's row has."""
    rules = INVALID_ROW_CHECKS if kept.get("invalid") else ROW_CHECKS
    for name, is_good in rules.items():
        if not is_good(kept[name] if name not in FIELDS_SINCE_0_2_0 else kept.get(name)):
            raise ValueError(name)
    if not kept.get("invalid") and kept["n_iter"] * kept["n_samples"] > MAX_IMAGES_PER_ROW:
        raise ValueError("n_iter x n_samples")


def is_integer_between(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def is_number_up_to(value: object, most: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= most  # type: ignore[operator]  # NaN is not below anything


def is_valid_prompt(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_PROMPT_CHARACTERS and is_storable(value)


def is_storable_text_or_none(value: object) -> bool:
    return value is None or (isinstance(value, str) and is_storable(value))


def is_storable(text: str) -> bool:
    return "\0" not in text and not has_surrogates(text)


INVALID_ROW_CHECKS: dict[str, Callable[[Any], bool]] = {
    "extra": lambda value: isinstance(value, dict),
    "id": is_storable_text_or_none,
    "prompt": is_storable_text_or_none,
    "reason": is_storable_text_or_none,
    "line": lambda value: value is None or is_integer_between(value, 1, MAX_SEED),
}
FIELDS_SINCE_0_2_0 = ("reason", "line")  # which 0.1.0 did not keep
ROW_CHECKS: dict[str, Callable[[Any], bool]] = {
    "extra": lambda value: isinstance(value, dict),
    "id": is_storable_text_or_none,
    "prompt": is_valid_prompt,
    "negative_prompt": is_valid_prompt,
    "prompt_syntax": lambda value: value in SYNTAXES,
    "sampler": lambda value: value in SAMPLERS,
    "seed": lambda value: value is None or is_integer_between(value, 0, MAX_SEED),
    "steps": partial(is_integer_between, least=1, most=MAX_STEPS),
    "width": partial(is_integer_between, least=1, most=MAX_SIDE_PX),
    "height": partial(is_integer_between, least=1, most=MAX_SIDE_PX),
    "n_iter": partial(is_integer_between, least=1, most=MAX_IMAGES_PER_ROW),
    "n_samples": partial(is_integer_between, least=1, most=MAX_IMAGES_PER_ROW),
    "scale": partial(is_number_up_to, most=100),
    "eta": partial(is_number_up_to, most=1),
}
