"""Merge the rows a job kept with those of its manifest as it is now."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tinysd_batch.job.manifest.snapshot import OutOfOrderLines, Snapshot, SnapshotRow, SnapshotWriter
from tinysd_batch.records import InvalidRow, Row


@dataclass(slots=True)
class RowMerger:
    """Puts the manifest's new rows behind a job's own, and counts them as they come."""

    snapshot: Snapshot
    last: int  # number of the job's last row
    appended: int = 0
    corrected: int = 0  # had a fault or were blank, and can be generated now

    def merge(self, now: Iterable[Row | InvalidRow], kept: SnapshotWriter | None = None) -> Iterator[Row | InvalidRow]:
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
        added, new_rows = SnapshotWriter(), iter(now)
        late = self.snapshot.find_out_of_order_lines()
        new = next(new_rows, None)
        for place, old in enumerate(self.snapshot.lines(), start=1):
            is_late = old.number in late.positions
            while new is not None and (new.number < old.number or (is_late and new.number == old.number)):
                self.add_if_new(new, late, added)
                new = next(new_rows, None)
            if is_late:
                yield old.to_row(), late.positions[old.number] == place
            elif new is None or new.number > old.number:
                yield old.to_row(), True
            else:
                yield self.choose_line(old, new, added)
                new = next(new_rows, None)
        while new is not None and new.number <= self.last:
            self.add_if_new(new, late, added)
            new = next(new_rows, None)
        yield from ((row, True) for row in added.rows())
        while new is not None:
            self.appended += 1
            yield new, True
            new = next(new_rows, None)

    def choose_line(
        self, old: SnapshotRow, new: Row | InvalidRow, added: SnapshotWriter
    ) -> tuple[Row | InvalidRow, bool]:
        """What stands in the old line's place, and whether it counts."""
        if not old.is_invalid:
            return old.to_row(), True
        if isinstance(new, InvalidRow):
            return new, True
        self.add(new, added)
        return old.to_row(), False

    def add_if_new(self, new: Row | InvalidRow, late: OutOfOrderLines, added: SnapshotWriter) -> None:
        """Add a row without a line in its place: it was blank, or was added late and may have a fault."""
        if new.number in late.invalid_rows and isinstance(new, Row):
            late.positions[new.number] = 0  # none of the lines that are there counts
            self.add(new, added)
        elif new.number not in late.positions:
            self.add(new, added)

    def add(self, row: Row | InvalidRow, added: SnapshotWriter) -> None:
        self.corrected += isinstance(row, Row)
        added.add(row)
