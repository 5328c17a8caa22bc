"""Compare a manifest with the rows a job read from it before, and describe how they differ."""

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

MAX_CHANGES_SHOWN = 3
LinePair = tuple[int, str | None, str | None]  # row number, snapshot line, line of the manifest now


@dataclass(slots=True)
class ManifestDiff:
    """How the rows of a manifest differ from those in a job's snapshot."""

    old_count: int = 0
    new_count: int = 0
    changed_count: int = 0  # rows that are in both and differ
    first_changes: list[tuple[int, str, str]] = field(default_factory=list)  # row number, old line, new line
    first_missing: list[int] = field(default_factory=list)  # row numbers that are blank or missing now
    common_at_start: int = 0
    common_at_end: int = 0

    @property
    def is_append_only(self) -> bool:
        """Whether all old rows are unchanged. Then only new rows were added."""
        return not self.changed_count and not self.first_missing

    @classmethod
    def from_pairs(cls, pairs: Iterable[LinePair]) -> Self:
        """Compare the lines of each pair. Only hashes of differing rows are kept in memory."""
        diff = cls()
        tails = array("Q"), array("Q")  # hashes of the old and new rows from the first difference on
        for number, old, new in pairs:
            diff.old_count += old is not None
            diff.new_count += new is not None
            if new is None and len(diff.first_missing) < MAX_CHANGES_SHOWN:
                diff.first_missing.append(number)
            is_same = old == new or (old is not None and new is not None and are_equivalent(old, new))
            if old is not None and new is not None and not is_same:
                diff.changed_count += 1
                if len(diff.first_changes) < MAX_CHANGES_SHOWN:
                    diff.first_changes.append((number, old, new))
            if is_same and not tails[0] and not tails[1]:
                diff.common_at_start += 1
                continue
            for tail, line in zip(tails, (old, new), strict=True):
                if line is not None:
                    tail.append(hash_line(line))
        diff.common_at_end = count_common_at_end(*tails)
        return diff

    def __str__(self) -> str:
        """`row 57: prompt 'tabby cta' is now 'tabby cat'; row 60: seed 7 is now (empty); 12 more rows differ`"""
        common = self.common_at_start + self.common_at_end
        old_count, new_count = self.old_count - common, self.new_count - common
        first = self.common_at_start + 1
        if not old_count:
            return f"{describe_row_range(first, new_count)} new, before {self.common_at_end} of the old ones"
        if not new_count:
            return f"{describe_row_range(first, old_count)} missing"
        changes = [f"row {number}: {describe_difference(old, new)}" for number, old, new in self.first_changes]
        changes = changes or [f"row {number} is missing" for number in self.first_missing]
        if old_count == new_count or 2 * self.changed_count <= min(old_count, new_count):
            return "; ".join([*changes, *self.describe_rest()])
        rows = f"{old_count} row{'s' * (old_count != 1)}"
        return f"from row {first} on, {rows} became {new_count}; {changes[0]}"

    def describe_rest(self) -> Iterator[str]:
        if self.changed_count > len(self.first_changes):
            yield f"{self.changed_count - len(self.first_changes):,} more rows differ"
        if self.new_count != self.old_count:
            yield f"and there are {self.new_count:,} rows instead of {self.old_count:,}"


def pair_rows(snapshot: Snapshot, manifest_rows: Iterable[Row | InvalidRow]) -> Iterator[LinePair]:
    """Pair the job's line and the manifest's line of each row number.

    A row that was invalid or blank before has no images, so any change of it counts as no change.
    """
    new_rows = iter(manifest_rows)
    new = next(new_rows, None)
    for old in sort_by_row_number(snapshot):
        while new is not None and new.number < old.number:
            line = row_to_line(new)
            yield new.number, line, line
            new = next(new_rows, None)
        new_line = None
        if new is not None and new.number == old.number:
            new_line = row_to_line(new)
            new = next(new_rows, None)
        yield old.number, old.line, old.line if old.is_invalid else new_line
    while new is not None:
        yield new.number, None, row_to_line(new)
        new = next(new_rows, None)


def sort_by_row_number(snapshot: Snapshot) -> Iterator[SnapshotRow]:
    late_numbers = snapshot.find_out_of_order_lines().positions.keys()
    late = sorted((row for row in snapshot.rows() if row.number in late_numbers), reverse=True) if late_numbers else []
    for row in snapshot.rows():
        if row.number in late_numbers:
            continue
        while late and late[-1].number < row.number:
            yield late.pop()
        yield row
    yield from reversed(late)


def are_equivalent(old: str, new: str) -> bool:
    """Whether two lines describe the same row, read by the rules of different versions."""
    return normalize_line(old) == normalize_line(new)


def normalize_line(line: str) -> StoredRow:
    """Return the line's fields in the form in which lines of different versions can be compared."""
    stored = parse_snapshot_line(line)
    for name in FIELDS_SINCE_0_2_0:
        stored.pop(name, None)
    extra = {normalize_text(name): extra_value_to_text(value) for name, value in stored.pop("extra").items()}
    known = {name: normalize_text(value) if isinstance(value, str) else value for name, value in stored.items()}
    return {**known, "extra": {name: text for name, text in extra.items() if text}}


def extra_value_to_text(value: object) -> str:
    if value is None:
        return ""
    return normalize_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def describe_row_range(first: int, count: int) -> str:
    return f"row {first} is" if count == 1 else f"rows {first} to {first + count - 1} are"


def hash_line(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest())


def count_common_at_end(old: "array[int]", new: "array[int]") -> int:
    count = 0
    for old_hash, new_hash in zip(reversed(old), reversed(new), strict=False):
        if old_hash != new_hash:
            break
        count += 1
    return count


def describe_difference(old: str, new: str) -> str:
    """Return `prompt 'cta' is now 'cat', seed 7 is now (empty)` for two lines."""
    before, after = flatten_extra(parse_snapshot_line(old)), flatten_extra(parse_snapshot_line(new))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if after.get("invalid"):
        return f"is invalid now: prompt {format_value(after.get('prompt'))}"
    return ", ".join(
        f"{name} {format_value(before.get(name))} is now {format_value(after.get(name))}"
        for name in names[:MAX_CHANGES_SHOWN]
    )


def flatten_extra(stored: StoredRow) -> StoredRow:
    """Return the fields with the extra columns next to the known ones."""
    return {**stored.pop("extra"), **stored}


def format_value(value: object) -> str:
    return "(empty)" if value in (None, "") else excerpt(value, 40) if isinstance(value, str) else f"{value}"
