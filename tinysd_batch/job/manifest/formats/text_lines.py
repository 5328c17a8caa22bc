"""Read the lines of a text manifest within bounds: a small compressed file can hold gigabytes without a line end."""

import codecs
import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.files import open_decompressed
from tinysd_batch.job.manifest.raw_rows import UnreadableRow
from tinysd_batch.job.manifest.reading_notes import ReadingNotes

MAX_LINE_CHARACTERS = 8 << 20  # leaves room for images as text: the column is dropped and the row stays
MAX_RECORD_CHARACTERS = 262_144  # of a CSV row that spans several lines; most often a quote is not closed
DETECTION_BYTES = 4096
UTF_16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UTF_32_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


@contextmanager
def open_text(path: Path, notes: ReadingNotes) -> Iterator[io.TextIOWrapper]:
    """Open the file as text. Bytes that are not UTF-8 become lone surrogates, so that only their row is invalid."""
    encoding = detect_encoding(path)
    notes.encoding = "" if encoding == "utf-8" else encoding.upper()
    with open_decompressed(path) as file:
        errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
        try:
            yield io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: not {encoding.upper()}: {error.reason}; save the file as UTF-8") from None


def detect_encoding(path: Path) -> str:
    """Return "utf-8" or "utf-16". Raises ManifestError for an empty file and for other encodings."""
    start = read_first_bytes(path)
    if not start.strip() and len(start) < DETECTION_BYTES:
        raise ManifestError(f"{path}: the file is empty; it needs a prompt for each row")
    if start[:2] in UTF_16_BOMS and start[:4] not in UTF_32_BOMS:
        return "utf-16"
    if start[:4] in UTF_32_BOMS or b"\0" in start.split(b"\n", 1)[0]:
        encoding = "UTF-32" if start[:4] in UTF_32_BOMS else "UTF-16 without a byte-order mark"
        raise ManifestError(f"{path}: not UTF-8 (it looks like {encoding}); save the file as UTF-8")
    return "utf-8"


def read_first_bytes(path: Path) -> bytes:
    with open_decompressed(path) as file:
        start: bytes = file.read(DETECTION_BYTES)
        return start


class BoundedLineReader:
    """Iterate over lines with their line ends. A too long line raises csv.Error; the next call continues after it."""

    def __init__(self, file: io.TextIOWrapper, *, compat_0_1_0: bool = False) -> None:
        self.readline = file.readline
        self.compat_0_1_0 = compat_0_1_0
        self.number = 0  # of the last line read, from 1
        self.starts_record = True  # whether the next line starts a row
        self.length = 0  # characters of the current row

    def start_record(self) -> None:
        self.starts_record = True
        self.length = 0

    def __iter__(self) -> "BoundedLineReader":
        return self

    def __next__(self) -> str:
        limit = MAX_LINE_CHARACTERS if self.starts_record else max(0, MAX_RECORD_CHARACTERS - self.length)
        line = self.readline(limit + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > limit:
            while line and line[-1] not in "\r\n":
                line = self.readline(MAX_RECORD_CHARACTERS)
            raise csv.Error(f"over {limit + self.length:,} characters")
        self.length += len(line)
        if self.starts_record:
            self.starts_record = False
            # Concatenated files have byte-order marks at the start of later lines. For 0.1.0 a mark alone was a row.
            if line[0] == "\ufeff" and (self.number == 1 or not self.compat_0_1_0):
                return line.lstrip("\ufeff")
        return line

    def describe_error(self, error: csv.Error) -> str:
        return str(error)


def read_records(reader: Iterator[Any], lines: BoundedLineReader) -> Iterator[tuple[int, Any]]:
    """Yield the first line number of each row, and what `reader` returns for its lines or an UnreadableRow."""
    while True:
        lines.start_record()
        first = lines.number + 1
        try:
            yield first, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, UnreadableRow(lines.describe_error(error), line=first)
