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
from tinysd_batch.storage.atomic import check_regular, write_atomically
from tinysd_batch.text import has_surrogates

READER = 2  # counts the versions of the rules by which manifests are read; 0.1.0 read them by the first
ROWS_FILE = "rows.jsonl.gz"
MAX_LINE_BYTES = 64 << 20
MEMORY_BYTES = 64 << 20  # packed rows beyond this wait on disk until the job's lock is held
OWN = tuple(each.name for each in fields(Row) if each.name not in ("number", "params"))
SHARED = tuple(each.name for each in fields(SamplingParams))
ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
PACKED_TOGETHER = 256  # rows
NUMBER = re.compile(r',"row":(\d{1,18})}$', re.ASCII)
Kept = dict[str, Any]


class KeptRow(NamedTuple):
    """A row of the snapshot: its number in the manifest, and its line without that."""

    number: int
    line: str

    @property
    def is_invalid(self) -> bool:
        return '"invalid":true' in self.line and bool(parse_line(self.line).get("invalid"))

    def read(self) -> Row | InvalidRow:
        """The row again. Raises StorageError for what no reading of a manifest gives."""
        kept = parse_line(self.line)
        if kept.get("invalid"):
            reason = kept.get("reason") or "had a fault when the job was started"  # 0.1.0 did not keep it
            return InvalidRow(self.number, reason, kept["prompt"], kept["id"], kept["extra"], kept.get("line"))
        params = kept_params(*(kept[name] for name in SHARED))
        return Row(self.number, params=params, **{name: kept[name] for name in OWN})


@lru_cache(1024, typed=True)
def kept_params(*values: Any) -> SamplingParams:
    return SamplingParams(*values)


def kept_form(row: Row | InvalidRow) -> Kept:
    """What is kept of a row: all that decides its images and its lines of the table, but for its number."""
    if isinstance(row, InvalidRow):
        shown = {"reason": row.reason, "line": row.line}
        return {"invalid": True, "prompt": row.prompt, "id": row.id, "extra": row.extra, **shown}
    own = {name: getattr(row, name) for name in OWN}
    return own | {name: getattr(row.params, name) for name in SHARED}


def as_line(row: Row | InvalidRow) -> str:
    return ENCODER.encode(kept_form(row))


def numbered(line: str, number: int, place: int) -> str:
    """The line as the snapshot holds it at this place."""
    return line if number == place else f'{line[:-1]},"row":{number}}}'


class RowKeeper:
    """Packs rows as they are read, before anything may be written to the job folder."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - lives as long as we do
        self.packer = gzip.GzipFile(fileobj=self.file, mode="wb", compresslevel=1, mtime=0)
        self.lines: list[str] = []  # not packed yet
        self.count = 0
        self.last_number = 0  # the highest row number
        self.out_of_order = 0  # that come after one of the same or a higher number

    def add(self, row: Row | InvalidRow) -> None:
        self.count += 1
        self.out_of_order += row.number <= self.last_number
        self.last_number = max(self.last_number, row.number)
        self.lines.append(numbered(as_line(row), row.number, self.count) + "\n")
        if len(self.lines) >= PACKED_TOGETHER:
            self.pack()

    def pack(self) -> None:
        self.packer.write("".join(self.lines).encode())
        self.lines.clear()

    def close(self) -> None:
        """Pack what is left; nothing more can be added."""
        self.pack()
        self.packer.close()
        self.file.seek(0)

    def save(self, state: Path) -> None:
        """Write them all. Raises StorageError."""
        self.close()
        write_atomically(self.file.read(), state / ROWS_FILE)

    def rows(self) -> Iterator[Row | InvalidRow]:
        """Close, and read the rows back in the order in which they were added."""
        self.close()
        with gzip.open(self.file) as lines:
            yield from (row.read() for row in with_numbers(line.decode().rstrip("\n") for line in lines))


@dataclass(slots=True)
class LateLines:
    """Lines that come after one of the same or a higher row number: of rows that were corrected or filled in."""

    places: dict[int, int] = field(default_factory=dict)  # row number -> place of its last such line, from 1
    faulty: set[int] = field(default_factory=set)  # row numbers of which that line has a fault


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The rows that a job folder holds, of which the first `count` lines are the job's."""

    state: Path
    count: int
    out_of_order: int = 0  # of them, that come after one of the same or a higher number

    @property
    def is_there(self) -> bool:
        return (self.state / ROWS_FILE).exists()

    def lines(self) -> Iterator[KeptRow]:
        """All lines in their order. Raises StorageError for a damaged or short file."""
        return with_numbers(read_kept_lines(self.state, self.count))

    def rows(self) -> Iterator[KeptRow]:
        """The lines that count, in the order of their images. Raises StorageError."""
        late = self.find_late_lines()
        for place, row in enumerate(self.lines(), start=1):
            if late.places.get(row.number, place) == place:
                yield row

    def find_late_lines(self) -> LateLines:
        """A pass over the whole file where there are any."""
        late = LateLines()
        highest = 0
        for place, row in enumerate(self.lines() if self.out_of_order else (), start=1):
            if row.number <= highest:
                late.places[row.number] = place
                (late.faulty.add if row.is_invalid else late.faulty.discard)(row.number)
            highest = max(highest, row.number)
        return late


def with_numbers(lines: Iterable[str]) -> Iterator[KeptRow]:
    for place, line in enumerate(lines, start=1):
        explicit = NUMBER.search(line)
        yield KeptRow(int(explicit[1]), line[: explicit.start()] + "}") if explicit else KeptRow(place, line)


def read_kept_lines(state: Path, count: int) -> Iterator[str]:
    path = state / ROWS_FILE
    try:
        check_regular(path)
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


def parse_line(line: str) -> Kept:
    """The content of a line. Raises StorageError for what `as_line` did not write: anybody may make a job folder."""
    try:
        kept = json.loads(line)
        check_kept(kept)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise StorageError(f"{ROWS_FILE}: not a row of a job: {error}; name another folder with -o") from None
    return dict(kept)


def check_kept(kept: Kept) -> None:
    """Raises KeyError, TypeError or ValueError for values that no manifest's row has."""
    rules = RULES_OF_INVALID if kept.get("invalid") else RULES
    for name, is_good in rules.items():
        if not is_good(kept[name] if name not in NEWER else kept.get(name)):
            raise ValueError(name)
    if not kept.get("invalid") and kept["n_iter"] * kept["n_samples"] > MAX_IMAGES_PER_ROW:
        raise ValueError("n_iter x n_samples")


def is_integer(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def is_number(value: object, most: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= most  # type: ignore[operator]  # NaN is not below anything


def is_prompt(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_PROMPT_CHARACTERS and is_storable(value)


def is_text_or_none(value: object) -> bool:
    return value is None or (isinstance(value, str) and is_storable(value))


def is_storable(text: str) -> bool:
    return "\0" not in text and not has_surrogates(text)


RULES_OF_INVALID: dict[str, Callable[[Any], bool]] = {
    "extra": lambda value: isinstance(value, dict),
    "id": is_text_or_none,
    "prompt": is_text_or_none,
    "reason": is_text_or_none,
    "line": lambda value: value is None or is_integer(value, 1, MAX_SEED),
}
NEWER = ("reason", "line")  # which 0.1.0 did not keep
RULES: dict[str, Callable[[Any], bool]] = {
    "extra": lambda value: isinstance(value, dict),
    "id": is_text_or_none,
    "prompt": is_prompt,
    "negative_prompt": is_prompt,
    "prompt_syntax": lambda value: value in SYNTAXES,
    "sampler": lambda value: value in SAMPLERS,
    "seed": lambda value: value is None or is_integer(value, 0, MAX_SEED),
    "steps": partial(is_integer, least=1, most=MAX_STEPS),
    "width": partial(is_integer, least=1, most=MAX_SIDE_PX),
    "height": partial(is_integer, least=1, most=MAX_SIDE_PX),
    "n_iter": partial(is_integer, least=1, most=MAX_IMAGES_PER_ROW),
    "n_samples": partial(is_integer, least=1, most=MAX_IMAGES_PER_ROW),
    "scale": partial(is_number, most=100),
    "eta": partial(is_number, most=1),
}
