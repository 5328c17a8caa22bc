"""How a manifest that has changed differs from the rows a job kept, and which of its rows are new to the job."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tinysd_batch.config import excerpt
from tinysd_batch.job.manifest.files import open_manifest
from tinysd_batch.job.manifest.snapshot import NEWER, Kept, KeptRow, LateLines, RowKeeper, Snapshot, as_line, parse_line
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.text import normalize_text

SHOWN = 3  # changed rows
LINE_ENDS = b"\r\n"
Pair = tuple[int, str | None, str | None]  # row number, line as kept, line now


# What has changed


@dataclass(slots=True)
class Change:
    """How a manifest's rows differ from the ones a job kept."""

    kept: int = 0  # rows of the job
    now: int = 0
    changed: int = 0  # rows that differ from the one of the same number, as far as both go
    first: list[tuple[int, str, str]] = field(default_factory=list)  # number, kept line, line now
    gone: list[int] = field(default_factory=list)  # the first numbers of rows that are not there any more, or blank
    same_at_start: int = 0
    same_at_end: int = 0

    @property
    def is_growth(self) -> bool:
        """Whether rows came behind the kept ones at most, and all of these are what they were."""
        return not self.changed and not self.gone

    @classmethod
    def between(cls, pairs: Iterable[Pair]) -> Self:
        change = cls()
        tails = array("Q"), array("Q")  # of the rows from the first difference on
        for number, old, new in pairs:
            change.kept += old is not None
            change.now += new is not None
            if new is None and len(change.gone) < SHOWN:
                change.gone.append(number)
            same = old == new or (old is not None and new is not None and reads_alike(old, new))
            if old is not None and new is not None and not same:
                change.changed += 1
                if len(change.first) < SHOWN:
                    change.first.append((number, old, new))
            if same and not tails[0] and not tails[1]:
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
        told = told or [f"row {number} is gone" for number in self.gone]
        if before == after or 2 * self.changed <= min(before, after):
            return "; ".join([*told, *self.more()])
        words = f"from row {self.same_at_start + 1} on {before} row{'s' * (before != 1)} became {after}"
        return f"{words}; {told[0]}"

    def more(self) -> Iterator[str]:
        if self.changed > len(self.first):
            yield f"{self.changed - len(self.first):,} rows more differ"
        if self.now != self.kept:
            yield f"and there are {self.now:,} rows instead of {self.kept:,}"


def pair_rows(snapshot: Snapshot, now: Iterable[Row | InvalidRow]) -> Iterator[Pair]:
    """Each row number with its line in the job and in the manifest.

    A row of the job that had a fault has no images, so whatever has become of it counts as no change, and so does a
    row where a blank one was.
    """
    new_rows = iter(now)
    new = next(new_rows, None)
    for old in sorted_by_number(snapshot):
        while new is not None and new.number < old.number:
            line = as_line(new)
            yield new.number, line, line
            new = next(new_rows, None)
        line_now = None
        if new is not None and new.number == old.number:
            line_now = as_line(new)
            new = next(new_rows, None)
        yield old.number, old.line, old.line if old.is_invalid else line_now
    while new is not None:
        yield new.number, None, as_line(new)
        new = next(new_rows, None)


def sorted_by_number(snapshot: Snapshot) -> Iterator[KeptRow]:
    places = snapshot.find_late_lines().places
    late = sorted((row for row in snapshot.rows() if row.number in places), reverse=True) if places else []
    for row in snapshot.rows():
        if row.number in places:
            continue
        while late and late[-1].number < row.number:
            yield late.pop()
        yield row
    yield from reversed(late)


def reads_alike(old: str, new: str) -> bool:
    """Whether two lines are one row, read by the rules of different versions."""
    return common_form(old) == common_form(new)


def common_form(line: str) -> Kept:
    kept = parse_line(line)
    for name in NEWER:
        kept.pop(name, None)
    extra = {normalize_text(name): as_text(value) for name, value in kept.pop("extra").items()}
    own = {name: normalize_text(value) if isinstance(value, str) else value for name, value in kept.items()}
    return {**own, "extra": {name: text for name, text in extra.items() if text}}


def as_text(value: object) -> str:
    if value is None:
        return ""
    return normalize_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


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
    return ", ".join(f"{name} {shown(before.get(name))} is now {shown(after.get(name))}" for name in names[:SHOWN])


def flat(kept: Kept) -> Kept:
    """With the carried columns beside ours."""
    return {**kept.pop("extra"), **kept}


def shown(value: object) -> str:
    return "nothing" if value in (None, "") else excerpt(value, 40) if isinstance(value, str) else f"{value}"


# What is new


def begins_with(manifest: Path, fingerprint: str, size: int | None) -> bool:
    """Whether the manifest's bytes begin with those of that fingerprint, and go on with a new line.

    Then its first rows are what they were, however they are read. `size` is how many bytes these were, where that is
    known; else every end of a line is tried.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open_manifest(manifest) as file:
        if size:
            while size and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
            ends_a_line = block[-1:] in (b"\n", b"\r") or file.read(1) in (b"\n", b"\r")
            return not size and ends_a_line and digest.hexdigest() == fingerprint
        for line in file:
            bare = line.rstrip(LINE_ENDS)
            for part in (bare, line[len(bare) :]):
                digest.update(part)
                if part and digest.copy().hexdigest() == fingerprint:
                    return True
    return False


@dataclass(slots=True)
class Merger:
    """Puts the manifest's new rows behind a job's own, and counts them as they come."""

    snapshot: Snapshot
    last: int  # number of the job's last row
    appended: int = 0
    corrected: int = 0  # had a fault or were blank, and can be generated now

    def merge(self, now: Iterable[Row | InvalidRow], kept: RowKeeper | None = None) -> Iterator[Row | InvalidRow]:
        """The job's rows in their order, then those that can be generated now, then appended ones.

        Rows that the job could generate keep the reading they began with, whatever the manifest says of them. One that
        had a fault and still has one is given as it is now. `kept` gets the lines of the next snapshot: those of this
        one, and the new ones behind them.
        """
        for row, counts in self.merge_lines(now):
            if kept is not None:
                kept.add(row)
            if counts:
                yield row

    def merge_lines(self, now: Iterable[Row | InvalidRow]) -> Iterator[tuple[Row | InvalidRow, bool]]:
        """The lines of the next snapshot, and whether a line counts: it does not where the row has a later one."""
        added, new_rows = RowKeeper(), iter(now)
        late = self.snapshot.find_late_lines()
        new = next(new_rows, None)
        for place, old in enumerate(self.snapshot.lines(), start=1):
            is_late = old.number in late.places
            while new is not None and (new.number < old.number or (is_late and new.number == old.number)):
                self.add_if_new(new, late, added)
                new = next(new_rows, None)
            if is_late:
                yield old.read(), late.places[old.number] == place
            elif new is None or new.number > old.number:
                yield old.read(), True
            else:
                yield self.choose(old, new, added)
                new = next(new_rows, None)
        while new is not None and new.number <= self.last:
            self.add_if_new(new, late, added)
            new = next(new_rows, None)
        yield from ((row, True) for row in added.rows())
        while new is not None:
            self.appended += 1
            yield new, True
            new = next(new_rows, None)

    def choose(self, old: KeptRow, new: Row | InvalidRow, added: RowKeeper) -> tuple[Row | InvalidRow, bool]:
        """What stands in the old line's place, and whether it counts."""
        if not old.is_invalid:
            return old.read(), True
        if isinstance(new, InvalidRow):
            return new, True
        self.add(new, added)
        return old.read(), False

    def add_if_new(self, new: Row | InvalidRow, late: LateLines, added: RowKeeper) -> None:
        """Add a row without a line in its place: it was blank, or was added late and may have a fault."""
        if new.number in late.faulty and isinstance(new, Row):
            late.places[new.number] = 0  # none of the lines that are there counts
            self.add(new, added)
        elif new.number not in late.places:
            self.add(new, added)

    def add(self, row: Row | InvalidRow, added: RowKeeper) -> None:
        self.corrected += isinstance(row, Row)
        added.add(row)
