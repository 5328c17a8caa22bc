"""How a manifest that has changed differs from the rows a job kept, and which of its rows are new to the job."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

from tinysd_batch.job.manifest.snapshot import NEWER, Kept, KeptRow, Snapshot, as_line, parse_line
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.text import excerpt, normalize_text

SHOWN = 3  # changed rows
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
