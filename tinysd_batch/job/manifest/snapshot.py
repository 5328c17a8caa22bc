"""Snapshot of a manifest: its rows as the job read them, in `_tinysd/rows.jsonl.gz` of the job folder.

A resumed job takes its rows from the snapshot, so a newer version that reads manifests differently cannot change them.
Rows are stored with all defaults filled in, so the manifest's quoting and column order do not matter.

Lines are in the order in which the job first read its rows, which is the order of their images: the rows of the first
run in manifest order, then rows that were appended, or corrected after an error. A line whose position is not its row
number states the row number. If a row has several lines, the last one counts. Lines are only ever appended, and
`job.json` states how many there are, so a run that is killed before it writes `job.json` changes nothing.
"""

import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from tinysd_batch.errors import StorageError
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.settings.declaration import Setting
from tinysd_batch.settings.limits import MAX_IMAGES_PER_ROW, MAX_SEED
from tinysd_batch.settings.schema import COLUMN_SETTINGS, IMAGE_SETTINGS, ImageSettings
from tinysd_batch.settings.value_types import PromptText
from tinysd_batch.storage.atomic import check_regular_file, write_atomically
from tinysd_batch.text import has_surrogates

READER_VERSION = 2  # of the rules by which manifests are read; tinysd-batch 0.1.0 used version 1
ROWS_FILE = "rows.jsonl.gz"
MAX_LINE_BYTES = 64 << 20
MAX_BUFFER_BYTES = 64 << 20  # compressed rows beyond this are buffered on disk until the job's lock is held
ROW_FIELDS = tuple(field.name for field in fields(Row) if field.name not in ("number", "settings"))
STORED_SETTINGS = {name: setting for name, setting in IMAGE_SETTINGS.items() if setting.is_column}
JSON_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
ROWS_PER_WRITE = 256
ROW_NUMBER_SUFFIX = re.compile(r',"row":(\d{1,18})}$', re.ASCII)
StoredRow = dict[str, Any]  # the fields of one line


class SnapshotRow(NamedTuple):
    """A row of the snapshot: its row number in the manifest, and its line without the row number."""

    number: int
    line: str

    @property
    def is_invalid(self) -> bool:
        return '"invalid":true' in self.line and bool(parse_snapshot_line(self.line).get("invalid"))

    def to_row(self) -> Row | InvalidRow:
        """Restore the row. Raises StorageError for a line that does not describe a row."""
        stored = parse_snapshot_line(self.line)
        if stored.get("invalid"):
            reason = stored.get("reason") or "was invalid when the job was started"  # 0.1.0 did not store the reason
            return InvalidRow(self.number, reason, stored["prompt"], stored["id"], stored["extra"], stored.get("line"))
        settings = restore_settings(tuple((name, stored[name]) for name in STORED_SETTINGS if name in stored))
        return Row(self.number, settings=settings, **{name: stored[name] for name in ROW_FIELDS})


@lru_cache(1024, typed=True)
def restore_settings(stored: tuple[tuple[str, Any], ...]) -> ImageSettings:
    """Return one shared object for equal settings. Those that rows cannot have are at their defaults."""
    return ImageSettings(**dict(stored))


def row_to_dict(row: Row | InvalidRow) -> StoredRow:
    """Return the fields to store: everything that decides the row's images and results, except its row number.

    Settings that were added later are stored only if they have an effect, so that rows of earlier versions are equal.
    """
    if isinstance(row, InvalidRow):
        stored = {"prompt": row.prompt, "id": row.id, "extra": row.extra, "reason": row.reason, "line": row.line}
        return {"invalid": True, **stored}
    stored = {name: getattr(row, name) for name in ROW_FIELDS}
    for name, setting in STORED_SETTINGS.items():
        value = getattr(row.settings, name)
        if setting.is_always_recorded or value != setting.default:
            stored[name] = value
    return stored


def row_to_line(row: Row | InvalidRow) -> str:
    return JSON_ENCODER.encode(row_to_dict(row))


def add_row_number(line: str, number: int, position: int) -> str:
    """Return the line with its row number, unless that is its position in the snapshot."""
    return line if number == position else f'{line[:-1]},"row":{number}}}'


class SnapshotWriter:
    """Compress rows while they are read, into a buffer: nothing may be written to the job folder yet."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.SpooledTemporaryFile(MAX_BUFFER_BYTES)  # noqa: SIM115 - lives as long as the writer
        self.gzip_file = gzip.GzipFile(fileobj=self.file, mode="wb", compresslevel=1, mtime=0)
        self.pending_lines: list[str] = []  # not compressed yet
        self.count = 0
        self.highest_row_number = 0
        self.out_of_order = 0  # lines after one with the same or a higher row number

    def add(self, row: Row | InvalidRow) -> None:
        self.count += 1
        self.out_of_order += row.number <= self.highest_row_number
        self.highest_row_number = max(self.highest_row_number, row.number)
        self.pending_lines.append(add_row_number(row_to_line(row), row.number, self.count) + "\n")
        if len(self.pending_lines) >= ROWS_PER_WRITE:
            self.write_pending()

    def write_pending(self) -> None:
        self.gzip_file.write("".join(self.pending_lines).encode())
        self.pending_lines.clear()

    def close(self) -> None:
        """Compress the pending lines. No more rows can be added."""
        self.write_pending()
        self.gzip_file.close()
        self.file.seek(0)

    def save(self, state_folder: Path) -> None:
        """Write the snapshot to the state folder. Raises StorageError."""
        self.close()
        write_atomically(self.file.read(), state_folder / ROWS_FILE)

    def read_back(self) -> Iterator[Row | InvalidRow]:
        """Close the writer, and read the rows back in the order in which they were added."""
        self.close()
        with gzip.open(self.file) as lines:
            yield from (row.to_row() for row in parse_snapshot_rows(line.decode().rstrip("\n") for line in lines))


@dataclass(slots=True)
class OutOfOrderLines:
    """Lines after one with the same or a higher row number. Their rows were invalid or blank, and were corrected."""

    positions: dict[int, int] = field(default_factory=dict)  # row number -> position of its last such line, from 1
    invalid_rows: set[int] = field(default_factory=set)  # row numbers for which that line is invalid


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The snapshot in a job folder. Only its first `count` lines belong to the job."""

    state_folder: Path
    count: int
    out_of_order: int = 0  # how many of them follow one with the same or a higher row number

    @property
    def exists(self) -> bool:
        return (self.state_folder / ROWS_FILE).exists()

    def lines(self) -> Iterator[SnapshotRow]:
        """Yield all lines in file order. Raises StorageError for a damaged or short file."""
        return parse_snapshot_rows(read_snapshot_lines(self.state_folder, self.count))

    def rows(self) -> Iterator[SnapshotRow]:
        """Yield the last line of each row, in the order of the rows' images. Raises StorageError."""
        late = self.find_out_of_order_lines()
        for position, row in enumerate(self.lines(), start=1):
            if late.positions.get(row.number, position) == position:
                yield row

    def find_out_of_order_lines(self) -> OutOfOrderLines:
        """Find the lines that replace or fill in earlier ones. Reads the whole file, if there are any."""
        late = OutOfOrderLines()
        highest = 0
        for position, row in enumerate(self.lines() if self.out_of_order else (), start=1):
            if row.number <= highest:
                late.positions[row.number] = position
                (late.invalid_rows.add if row.is_invalid else late.invalid_rows.discard)(row.number)
            highest = max(highest, row.number)
        return late


def parse_snapshot_rows(lines: Iterable[str]) -> Iterator[SnapshotRow]:
    """Split each line into its row number and the rest. A line without a row number has its position as number."""
    for position, line in enumerate(lines, start=1):
        match = ROW_NUMBER_SUFFIX.search(line)
        yield SnapshotRow(int(match[1]), line[: match.start()] + "}") if match else SnapshotRow(position, line)


def read_snapshot_lines(state_folder: Path, count: int) -> Iterator[str]:
    """Yield the first `count` lines. Raises StorageError for a damaged or short file."""
    path = state_folder / ROWS_FILE
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
            f"the images over with --reuse {state_folder.parent}"
        ) from None


def parse_snapshot_line(line: str) -> StoredRow:
    """Parse and check a line. Raises StorageError for one that `row_to_line` did not write: folders are not trusted."""
    try:
        stored = json.loads(line)
        check_stored_row(stored)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise StorageError(f"{ROWS_FILE}: not a row of a job: {error}; name another folder with -o") from None
    return dict(stored)


def check_stored_row(stored: StoredRow) -> None:
    """Raise KeyError, TypeError or ValueError for values that no row of a manifest has."""
    checks = INVALID_ROW_CHECKS if stored.get("invalid") else ROW_CHECKS
    for name, is_valid in checks.items():
        if not is_valid(stored.get(name) if name in FIELDS_SINCE_0_2_0 else stored[name]):
            raise ValueError(name)
    if stored.get("invalid"):
        return
    for name, setting in COLUMN_SETTINGS.items():
        if (name in stored or is_always_stored(name)) and not is_valid_setting(setting, stored[name]):
            raise ValueError(name)
    if stored["n_iter"] * stored["n_samples"] > MAX_IMAGES_PER_ROW:
        raise ValueError("n_iter x n_samples")


def is_integer_between(value: object, minimum: int, maximum: int) -> bool:
    return type(value) is int and minimum <= value <= maximum


def is_always_stored(name: str) -> bool:
    return name in ROW_FIELDS or STORED_SETTINGS[name].is_always_recorded


def is_valid_setting(setting: Setting, value: object) -> bool:
    is_optional = setting.default is None and not setting.model_default
    return (is_optional and value is None) or setting.value_type.is_valid(value)


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
FIELDS_SINCE_0_2_0 = ("reason", "line")  # of invalid rows; 0.1.0 did not store them
ROW_CHECKS: dict[str, Callable[[Any], bool]] = {
    "extra": lambda value: isinstance(value, dict),
    "id": is_storable_text_or_none,
    "prompt": PromptText().is_valid,
}
