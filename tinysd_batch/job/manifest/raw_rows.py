"""What a reader yields: the cells of a row as text, or why there are none."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tinysd_batch.job.manifest.reading_notes import ReadingNotes

MAX_CELL_CHARACTERS = 131_072


class RawRow(NamedTuple):
    """A row as the file gives it, without the cells that are empty; a blank row has none."""

    values: dict[str, Any]  # known columns under our names
    source_names: Mapping[str, str]  # our name -> the file's
    line: int | None = None  # of the file, from 1, where the row starts; None where a file has no lines


class UnreadableRow(NamedTuple):
    """A row that cannot be read."""

    reason: str
    prompt: str | None = None
    line: int | None = None


class SkippedRows(NamedTuple):
    """Rows that are none and keep their numbers."""

    row_count: int
    is_blank: bool = True


class ReadingOptions(NamedTuple):
    """How to read, and where to write down what was noticed."""

    notes: ReadingNotes
    strict: bool = False  # unknown columns are a fault
    interpret_lines: bool = False  # in a .txt: skip comments, read the options of other programs
    compat_0_1_0: bool = False  # jobs that 0.1.0 began count rows as it did, and carry its text


def drop_long_values(values: dict[str, Any], shown: Mapping[str, str], notes: ReadingNotes) -> None:
    """Remove values of unknown columns that are too long for the results: they are no reason to lose the row."""
    for name in [name for name, value in values.items() if name not in shown and isinstance(value, str)]:
        if len(values[name]) > MAX_CELL_CHARACTERS:
            notes.record_dropped_column(name, describe_long_value(f"{len(values.pop(name)):,} characters"))


def describe_long_value(size: str) -> str:
    return f"some values are not carried into the results: {size}, at most {MAX_CELL_CHARACTERS:,}"


ReaderItem = RawRow | UnreadableRow | SkippedRows
