"""The manifest's rows as the job took them, kept in the job folder as `_tinysd/rows.jsonl.gz`.

With them a manifest that has changed can be told from one that has only grown, the difference can be shown, and another
job can take over what is the same. A row is kept with all its settings filled in, so neither quotes nor the order of
columns matter. Of a row that could not be made, its faults are not kept: their wording may change between versions.
"""

import gzip
import hashlib
import json
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Self

from tinysd_batch.config import MAX_SEED, excerpt
from tinysd_batch.errors import StorageError
from tinysd_batch.records import InvalidRow, Row, SamplingParams
from tinysd_batch.storage import check_regular, write_atomically

ROWS_FILE = "rows.jsonl.gz"
MAX_LINE_BYTES = 64 << 20
MEMORY_BYTES = 64 << 20  # packed rows beyond this wait on disk until the job's lock is held
SHOWN = 3  # changed rows
OWN = tuple(each.name for each in fields(Row) if each.name not in ("number", "params"))
SHARED = tuple(each.name for each in fields(SamplingParams))
ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
PACKED_TOGETHER = 256  # rows
Kept = dict[str, Any]


def kept_form(row: Row | InvalidRow) -> Kept:
    """What is kept of a row: all that decides its images and its lines of the table, but for its number."""
    if isinstance(row, InvalidRow):
        return {"invalid": True, "prompt": row.prompt, "id": row.id, "extra": row.extra}
    own = {name: getattr(row, name) for name in OWN}
    return own | {name: getattr(row.params, name) for name in SHARED}


def as_line(row: Row | InvalidRow) -> str:
    return ENCODER.encode(kept_form(row))


class RowKeeper:
    """Packs rows as they are read, before anything may be written to the job folder."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - lives as long as we do
        self.packer = gzip.GzipFile(fileobj=self.file, mode="wb", compresslevel=1, mtime=0)
        self.lines: list[str] = []  # not packed yet
        self.count = 0

    def add(self, row: Row | InvalidRow) -> None:
        self.lines.append(as_line(row) + "\n")
        self.count += 1
        if len(self.lines) >= PACKED_TOGETHER:
            self.pack()

    def pack(self) -> None:
        self.packer.write("".join(self.lines).encode())
        self.lines.clear()

    def save(self, state: Path) -> None:
        """Write them all. Raises StorageError."""
        self.pack()
        self.packer.close()
        self.file.seek(0)
        write_atomically(self.file.read(), state / ROWS_FILE)


def read_kept_lines(state: Path, count: int) -> Iterator[str]:
    """The first `count` rows, each as `as_line` wrote it. Raises StorageError for a damaged or short file."""
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
            f"{path}: cannot be read: {reason}; bring the manifest back to what it was, or name another folder with -o"
        ) from None


def parse_line(line: str) -> Kept:
    """A kept row again. Raises StorageError for what `as_line` did not write: job folders may come from anybody."""
    try:
        kept = json.loads(line)
        if not (isinstance(kept["extra"], dict) and isinstance(kept["id"], str | None)):
            raise TypeError("id or extra")
        if not kept.get("invalid"):
            images = [kept["n_iter"], kept["n_samples"]]
            seed = [] if kept["seed"] is None else [kept["seed"]]
            if not all(type(number) is int and 0 <= number <= MAX_SEED for number in images + seed):
                raise TypeError("n_iter, n_samples or seed")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise StorageError(f"{ROWS_FILE}: not a row of a job: {error}; name another folder with -o") from None
    return dict(kept)


@dataclass(slots=True)
class Change:
    """How a manifest's rows differ from the ones a job kept."""

    kept: int  # rows of the job
    now: int = 0
    changed: int = 0  # rows that differ from the one of the same number, as far as both go
    first: list[tuple[int, str, str]] = field(default_factory=list)  # number, kept line, line now
    same_at_start: int = 0
    same_at_end: int = 0

    @property
    def appended(self) -> int | None:
        """How many rows came behind the kept ones; None where any of those differs or is gone."""
        return self.now - self.kept if not self.changed and self.now >= self.kept else None

    @classmethod
    def between(cls, kept_lines: Iterable[str], lines_now: Iterable[str]) -> Self:
        change = cls(0)
        tails = array("Q"), array("Q")  # of the rows from the first difference on
        for number, (old, new) in enumerate(zip_longest(kept_lines, lines_now), start=1):
            change.kept += old is not None
            change.now += new is not None
            if old is not None and new is not None and old != new:
                change.changed += 1
                if len(change.first) < SHOWN:
                    change.first.append((number, old, new))
            if old == new and not tails[0] and not tails[1]:
                change.same_at_start += 1
                continue
            for tail, line in zip(tails, (old, new), strict=True):
                if line is not None:
                    tail.append(short_hash(line))
        change.same_at_end = common_end(*tails)
        return change

    def __str__(self) -> str:
        """`row 57: prompt 'tabby cta' is now 'tabby cat'; row 60: seed 7 is now nothing; and 12 rows more`"""
        same = self.same_at_start + self.same_at_end
        before, after = self.kept - same, self.now - same
        if not before:
            return f"{rows(self.same_at_start + 1, after)} new, before {self.same_at_end} of the old ones"
        if not after:
            return f"{rows(self.same_at_start + 1, before)} gone"
        told = [f"row {number}: {difference(old, new)}" for number, old, new in self.first]
        if before == after or 2 * self.changed <= min(before, after):
            return "; ".join([*told, *self.more()])
        words = f"from row {self.same_at_start + 1} on {before} row{'s' * (before != 1)} became {after}"
        return f"{words}; {told[0]}"

    def more(self) -> Iterator[str]:
        if self.changed > len(self.first):
            yield f"{self.changed - len(self.first):,} rows more differ"
        if self.now != self.kept:
            yield f"and there are {self.now:,} rows instead of {self.kept:,}"


def rows(first: int, count: int) -> str:
    return f"row {first} is" if count == 1 else f"rows {first} to {first + count - 1} are"


def short_hash(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest())


def common_end(one: "array[int]", other: "array[int]") -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def difference(old: str, new: str) -> str:
    """`prompt 'cta' is now 'cat', seed 7 is now nothing`"""
    before, after = flat(parse_line(old)), flat(parse_line(new))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if after.get("invalid"):
        return f"is faulty now: prompt {shown(after.get('prompt'))}"
    if before.get("invalid"):
        return "was faulty, and can be made now"
    return ", ".join(f"{name} {shown(before.get(name))} is now {shown(after.get(name))}" for name in names[:SHOWN])


def flat(kept: Kept) -> Kept:
    """With the carried columns beside ours."""
    return {**kept.pop("extra"), **kept}


def shown(value: object) -> str:
    return "nothing" if value in (None, "") else excerpt(value, 40) if isinstance(value, str) else f"{value}"
