"""What a reader yields for each row: its cells, or the reason why it cannot be read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tinysd_batch.job.manifest.reading_notes import ReadingNotes

MAX_CELL_CHARACTERS = 131_072


class RawRow(NamedTuple):
    """A row as the file gives it, without its empty cells. A blank row has no values."""

    values: dict[str, Any]  # known columns under our names
    source_names: Mapping[str, str]  # our name -> the file's name
    line: int | None = None  # line of the file where the row starts, from 1; None for formats without lines


class UnreadableRow(NamedTuple):
    """A row that cannot be read."""

    reason: str
    prompt: str | None = None
    line: int | None = None


class SkippedRows(NamedTuple):
    """Consecutive rows that are skipped but keep their row numbers: blank ones or comments."""

    row_count: int
    is_blank: bool = True


class ReadingOptions(NamedTuple):
    """How to read a manifest, and where to collect notes about it."""

    notes: ReadingNotes
    strict: bool = False  # unknown columns are an error
    interpret_lines: bool = False  # in a .txt: skip comments, parse the options of other programs
    own_columns: frozenset[str] = frozenset()  # names that stay the manifest's own, whatever is known by them
    compat_0_1_0: bool = False  # for jobs started by 0.1.0: split rows and convert extra columns as it did


ReaderItem = RawRow | UnreadableRow | SkippedRows


def drop_long_values(values: dict[str, Any], source_names: Mapping[str, str], notes: ReadingNotes) -> None:
    """Remove values of extra columns that are too long for the results; the row itself stays valid."""
    for name in [name for name, value in values.items() if name not in source_names and isinstance(value, str)]:
        if len(values[name]) > MAX_CELL_CHARACTERS:
            notes.record_dropped_column(name, describe_long_value(f"{len(values.pop(name)):,} characters"))


def describe_long_value(size: str) -> str:
    return f"some values are not copied to the results: {size}, at most {MAX_CELL_CHARACTERS:,}"
