"""What a reader noticed about a manifest besides its rows: one line each for people, and counts for programs."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tinysd_batch.text import excerpt

MAX_COLUMNS_LISTED = 8  # columns in one line


@dataclass(slots=True)
class Occurrences:
    """How often something was seen, and in which row first."""

    count: int = 0
    first_row: int = 0

    def add(self, row: int) -> None:
        self.count += 1
        self.first_row = self.first_row or row

    def __str__(self) -> str:
        return f"{self.count:,} (first: row {self.first_row})"


@dataclass(slots=True)
class ReadingNotes:
    """Filled while a manifest is read once; use a new object for each pass.

    `rows` maps what was seen in rows, a sentence with {} for the number, to how often; `left_out` maps a column that is
    not (always) carried into the results to what becomes of it.
    """

    separator: str = ""  # what stands between cells where it is not what the file's suffix says
    encoding: str = ""  # where it is not UTF-8
    blank_rows: int = 0
    occurrences: dict[str, Occurrences] = field(default_factory=dict)
    dropped_columns: dict[str, str] = field(default_factory=dict)
    advice: dict[str, None] = field(default_factory=dict)  # sentences about the whole file

    def count_occurrence(self, what: str, row: int) -> None:
        self.occurrences.setdefault(what, Occurrences()).add(row)

    def record_dropped_column(self, column: str, what: str) -> None:
        self.dropped_columns.setdefault(column, what)

    def add_advice(self, sentence: str) -> None:
        self.advice.setdefault(sentence)

    def lines(self) -> Iterator[str]:
        """One sentence for each kind of thing, without the file's name."""
        if self.encoding:
            yield f"read as {self.encoding}"
        if self.separator:
            yield f"{self.separator} between cells"
        if self.blank_rows:
            yield f"{self.blank_rows:,} blank row{'s' * (self.blank_rows != 1)} skipped"
        yield from self.advice
        for what, sightings in self.occurrences.items():
            yield what.format(sightings)
        named = list(self.dropped_columns.items())
        for column, what in named[:MAX_COLUMNS_LISTED]:
            yield f"column {excerpt(column)}: {what}"
        if len(named) > MAX_COLUMNS_LISTED:
            yield f"{len(named) - MAX_COLUMNS_LISTED:,} more columns are not carried into the results"
