"""How a manifest that has changed differs from the rows a job kept, and which of its rows are new to the job."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

from tinysd_batch.job.manifest.snapshot import (
    FIELDS_SINCE_0_2_0,
    Snapshot,
    SnapshotRow,
    StoredRow,
    parse_snapshot_line,
    row_to_line,
)
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.text import excerpt, normalize_text

MAX_CHANGES_SHOWN = 3  # changed rows
LinePair = tuple[int, str | None, str | None]  # row number, line as kept, line now


# What has changed


@dataclass(slots=True)
class ManifestDiff:
    """How a manifest's rows differ from the ones a job kept."""

    old_count: int = 0  # rows of the job
    new_count: int = 0
    changed_count: int = 0  # rows that differ from the one of the same number, as far as both go
    first_changes: list[tuple[int, str, str]] = field(default_factory=list)  # number, kept line, line now
    first_missing: list[int] = field(
        default_factory=list
    )  # the first numbers of rows that are not there any more, or blank
    common_at_start: int = 0
    common_at_end: int = 0

    @property
    def is_append_only(self) -> bool:
        """Whether rows came behind the kept ones at most, and all of these are what they were."""
        return not self.changed_count and not self.first_missing

    @classmethod
    def from_pairs(cls, pairs: Iterable[LinePair]) -> Self:
        change = cls()
        tails = array("Q"), array("Q")  # of the rows from the first difference on
        for number, old, new in pairs:
            change.old_count += old is not None
            change.new_count += new is not None
            if new is None and len(change.first_missing) < MAX_CHANGES_SHOWN:
                change.first_missing.append(number)
            same = old == new or (old is not None and new is not None and are_equivalent(old, new))
            if old is not None and new is not None and not same:
                change.changed_count += 1
                if len(change.first_changes) < MAX_CHANGES_SHOWN:
                    change.first_changes.append((number, old, new))
            if same and not tails[0] and not tails[1]:
                change.common_at_start += 1
                continue
            for tail, line in zip(tails, (old, new), strict=True):
                if line is not None:
                    tail.append(hash_line(line))
        change.common_at_end = count_common_at_end(*tails)
        return change

    def __str__(self) -> str:
        """`row 57: prompt 'tabby cta' is now 'tabby cat'; row 60: seed 7 is now nothing; and 12 rows more`"""
        same = self.common_at_start + self.common_at_end
        before, after = self.old_count - same, self.new_count - same
        if not before:
            return f"{describe_row_range(self.common_at_start + 1, after)} new, before {self.common_at_end} of the old ones"
        if not after:
            return f"{describe_row_range(self.common_at_start + 1, before)} gone"
        told = [f"row {number}: {describe_difference(old, new)}" for number, old, new in self.first_changes]
        told = told or [f"row {number} is gone" for number in self.first_missing]
        if before == after or 2 * self.changed_count <= min(before, after):
            return "; ".join([*told, *self.describe_rest()])
        words = f"from row {self.common_at_start + 1} on {before} row{'s' * (before != 1)} became {after}"
        return f"{words}; {told[0]}"

    def describe_rest(self) -> Iterator[str]:
        if self.changed_count > len(self.first_changes):
            yield f"{self.changed_count - len(self.first_changes):,} rows more differ"
        if self.new_count != self.old_count:
            yield f"and there are {self.new_count:,} rows instead of {self.old_count:,}"


def pair_rows(snapshot: Snapshot, now: Iterable[Row | InvalidRow]) -> Iterator[LinePair]:
    """Each row number with its line in the job and in the manifest.

    A row of the job that had a fault has no images, so whatever has become of it counts as no change, and so does a
    row where a blank one was.
    """
    new_rows = iter(now)
    new = next(new_rows, None)
    for old in sort_by_row_number(snapshot):
        while new is not None and new.number < old.number:
            line = row_to_line(new)
            yield new.number, line, line
            new = next(new_rows, None)
        line_now = None
        if new is not None and new.number == old.number:
            line_now = row_to_line(new)
            new = next(new_rows, None)
        yield old.number, old.line, old.line if old.is_invalid else line_now
    while new is not None:
        yield new.number, None, row_to_line(new)
        new = next(new_rows, None)


def sort_by_row_number(snapshot: Snapshot) -> Iterator[SnapshotRow]:
    places = snapshot.find_out_of_order_lines().positions
    late = sorted((row for row in snapshot.rows() if row.number in places), reverse=True) if places else []
    for row in snapshot.rows():
        if row.number in places:
            continue
        while late and late[-1].number < row.number:
            yield late.pop()
        yield row
    yield from reversed(late)


def are_equivalent(old: str, new: str) -> bool:
    """Whether two lines are one row, read by the rules of different versions."""
    return normalize_line(old) == normalize_line(new)


def normalize_line(line: str) -> StoredRow:
    kept = parse_snapshot_line(line)
    for name in FIELDS_SINCE_0_2_0:
        kept.pop(name, None)
    extra = {normalize_text(name): extra_value_to_text(value) for name, value in kept.pop("extra").items()}
    own = {name: normalize_text(value) if isinstance(value, str) else value for name, value in kept.items()}
    return {**own, "extra": {name: text for name, text in extra.items() if text}}


def extra_value_to_text(value: object) -> str:
    if value is None:
        return ""
    return normalize_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def describe_row_range(first: int, count: int) -> str:
    return f"row {first} is" if count == 1 else f"rows {first} to {first + count - 1} are"


def hash_line(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest())


def count_common_at_end(one: "array[int]", other: "array[int]") -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def describe_difference(old: str, new: str) -> str:
    """`prompt 'cta' is now 'cat', seed 7 is now nothing`"""
    before, after = flatten_extra(parse_snapshot_line(old)), flatten_extra(parse_snapshot_line(new))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if after.get("invalid"):
        return f"is faulty now: prompt {format_value(after.get('prompt'))}"
    return ", ".join(
        f"{name} {format_value(before.get(name))} is now {format_value(after.get(name))}"
        for name in names[:MAX_CHANGES_SHOWN]
    )


def flatten_extra(kept: StoredRow) -> StoredRow:
    """With the carried columns beside ours."""
    return {**kept.pop("extra"), **kept}


def format_value(value: object) -> str:
    return "nothing" if value in (None, "") else excerpt(value, 40) if isinstance(value, str) else f"{value}"


# What is new
