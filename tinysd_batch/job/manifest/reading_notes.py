"""Notes about a manifest that a reader collects besides the rows: one line each for people, counts for programs."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tinysd_batch.text import excerpt

MAX_COLUMNS_LISTED = 8


@dataclass(slots=True)
class Occurrences:
    """How often something occurred, and the first row in which it did."""

    count: int = 0
    first_row: int = 0

    def add(self, row: int) -> None:
        self.count += 1
        self.first_row = self.first_row or row

    def __str__(self) -> str:
        return f"{self.count:,} (first: row {self.first_row})"


@dataclass(slots=True)
class ReadingNotes:
    """Notes of one pass over a manifest; use a new object for each pass.

    `occurrences` maps a sentence with {} for the count to how often it applies. `dropped_columns` maps a column that is
    not (or not always) copied to the results to the reason.
    """

    separator: str = ""  # between cells, where it is not the one of the file's suffix
    encoding: str = ""  # where it is not UTF-8
    blank_rows: int = 0
    occurrences: dict[str, Occurrences] = field(default_factory=dict)
    dropped_columns: dict[str, str] = field(default_factory=dict)
    advice: dict[str, None] = field(default_factory=dict)  # sentences about the whole file

    def count_occurrence(self, sentence: str, row: int) -> None:
        self.occurrences.setdefault(sentence, Occurrences()).add(row)

    def record_dropped_column(self, column: str, reason: str) -> None:
        self.dropped_columns.setdefault(column, reason)

    def add_advice(self, sentence: str) -> None:
        self.advice.setdefault(sentence)

    def lines(self) -> Iterator[str]:
        """Yield one sentence per note, without the file's name."""
        if self.encoding:
            yield f"read as {self.encoding}"
        if self.separator:
            yield f"cells are separated by {self.separator}"
        if self.blank_rows:
            yield f"{self.blank_rows:,} blank row{'s' * (self.blank_rows != 1)} skipped"
        yield from self.advice
        for sentence, occurrences in self.occurrences.items():
            yield sentence.format(occurrences)
        dropped = list(self.dropped_columns.items())
        for column, reason in dropped[:MAX_COLUMNS_LISTED]:
            yield f"column {excerpt(column)}: {reason}"
        if len(dropped) > MAX_COLUMNS_LISTED:
            yield f"{len(dropped) - MAX_COLUMNS_LISTED:,} more columns are not copied to the results"
