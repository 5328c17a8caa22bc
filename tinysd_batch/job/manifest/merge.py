"""Merge the rows of a job with those of its manifest, which may have changed since the last run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tinysd_batch.job.manifest.snapshot import OutOfOrderLines, Snapshot, SnapshotRow, SnapshotWriter
from tinysd_batch.records import InvalidRow, Row


@dataclass(slots=True)
class RowMerger:
    """Append the manifest's new rows to those of the job, and count them while they are read."""

    snapshot: Snapshot
    last_row_number: int  # of the job
    appended: int = 0
    corrected: int = 0  # rows that were invalid or blank, and are valid now

    def merge(
        self, manifest_rows: Iterable[Row | InvalidRow], writer: SnapshotWriter | None = None
    ) -> Iterator[Row | InvalidRow]:
        """Yield the job's rows in their order, then those that are valid only now, then the appended ones.

        A row that was valid before stays as the job first read it, whatever the manifest says now. A row that was
        invalid and still is comes as the manifest has it now.

        Args:
            manifest_rows: All rows of the manifest as it is now.
            writer: Receives the lines of the next snapshot: the lines of this one, followed by the new ones.
        """
        for row, is_last_line in self.merge_lines(manifest_rows):
            if writer is not None:
                writer.add(row)
            if is_last_line:
                yield row

    def merge_lines(self, manifest_rows: Iterable[Row | InvalidRow]) -> Iterator[tuple[Row | InvalidRow, bool]]:
        """Yield the lines of the next snapshot, and whether each is the last of its row: only that one counts."""
        added, new_rows = SnapshotWriter(), iter(manifest_rows)
        late = self.snapshot.find_out_of_order_lines()
        new = next(new_rows, None)
        for position, old in enumerate(self.snapshot.lines(), start=1):
            is_late = old.number in late.positions
            while new is not None and (new.number < old.number or (is_late and new.number == old.number)):
                self.add_if_new(new, late, added)
                new = next(new_rows, None)
            if is_late:
                yield old.to_row(), late.positions[old.number] == position
            elif new is None or new.number > old.number:
                yield old.to_row(), True
            else:
                yield self.choose_line(old, new, added)
                new = next(new_rows, None)
        while new is not None and new.number <= self.last_row_number:
            self.add_if_new(new, late, added)
            new = next(new_rows, None)
        yield from ((row, True) for row in added.read_back())
        while new is not None:
            self.appended += 1
            yield new, True
            new = next(new_rows, None)

    def choose_line(
        self, old: SnapshotRow, new: Row | InvalidRow, added: SnapshotWriter
    ) -> tuple[Row | InvalidRow, bool]:
        """Return the line at the position of the old one, and whether it is its row's last line."""
        if not old.is_invalid:
            return old.to_row(), True
        if isinstance(new, InvalidRow):
            return new, True
        self.add(new, added)
        return old.to_row(), False

    def add_if_new(self, new: Row | InvalidRow, late: OutOfOrderLines, added: SnapshotWriter) -> None:
        """Add a row that has no line in order: it was blank, or its late line is invalid and it is valid now."""
        if new.number in late.invalid_rows and isinstance(new, Row):
            late.positions[new.number] = 0  # none of its existing lines is the last one
            self.add(new, added)
        elif new.number not in late.positions:
            self.add(new, added)

    def add(self, row: Row | InvalidRow, added: SnapshotWriter) -> None:
        self.corrected += isinstance(row, Row)
        added.add(row)
