"""A manifest's file: its name, its bytes, unpacked as they are read, and what a row of it is."""

import gzip
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.notes import ReadingNotes
from tinysd_batch.storage.atomic import check_regular

MAX_CELL_CHARACTERS = 131_072
MAX_UNPACKED_BYTES = 4 << 30  # of a .parquet.gz, which must be unpacked whole
PART_SUFFIXES = (".parquet", ".pq")  # of the files in a folder that is one table


class Line(NamedTuple):
    """A row as the file gives it, without the cells that are empty; a blank row has none."""

    values: dict[str, Any]  # known columns under our names
    shown: Mapping[str, str]  # our name -> the file's
    line: int | None = None  # of the file, from 1, where the row starts; None where a file has no lines


class Fault(NamedTuple):
    """A row that cannot be read."""

    reason: str
    prompt: str | None = None
    line: int | None = None


class SkippedRows(NamedTuple):
    """Rows that are none and keep their numbers."""

    number: int
    is_blank: bool = True


class ReadingOptions(NamedTuple):
    """How to read, and where to write down what was noticed."""

    notes: ReadingNotes
    strict: bool = False  # unknown columns are a fault
    interpret_lines: bool = False  # in a .txt: skip comments, read the options of other programs
    as_0_1_0: bool = False  # jobs that 0.1.0 began count rows as it did, and carry its text


def leave_out_long(values: dict[str, Any], shown: Mapping[str, str], notes: ReadingNotes) -> None:
    """Remove values of unknown columns that are too long for the results: they are no reason to lose the row."""
    for name in [name for name, value in values.items() if name not in shown and isinstance(value, str)]:
        if len(values[name]) > MAX_CELL_CHARACTERS:
            notes.leave_out(name, too_long(f"{len(values.pop(name)):,} characters"))


def too_long(size: str) -> str:
    return f"some values are not carried into the results: {size}, at most {MAX_CELL_CHARACTERS:,}"


RowRead = Line | Fault | SkippedRows


def is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def unpacked_name(path: Path) -> str:
    return path.stem if is_packed(path) else path.name


def bare_name(path: Path) -> str:
    """The file's name without the suffixes that say how to read it."""
    return Path(unpacked_name(path)).stem


def manifest_files(path: Path) -> list[Path]:
    """The files that hold the manifest: itself, or the Parquet parts of a folder in their order.

    Spark, Dask and pandas write a table as a folder of parts; names that begin with `_` or `.` are their own notes.
    Raises ManifestError for a folder without parts, or with tables in folders below it.
    """
    try:
        if not path.is_dir():
            return [path]
        inside = sorted((each for each in path.iterdir() if each.name[0] not in "._"), key=natural_order)
        folders = [each for each in inside if each.is_dir()]
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    parts = [each for each in inside if each.suffix.lower() in PART_SUFFIXES and each not in folders]
    if folders and not parts:
        raise ManifestError(f"{path}: its tables are in folders below it ({folders[0].name}); name one of those")
    if not parts:
        raise ManifestError(f"{path}: cannot be read: is a directory without Parquet files; name a file")
    return parts


def is_folder_of_parts(path: Path) -> bool:
    """Whether the folder is one table; the folder of a job, with its results, is not."""
    try:
        if not path.is_dir() or (path / "job.json").exists():
            return False
        return any(each.suffix.lower() in PART_SUFFIXES for each in path.iterdir())
    except OSError:
        return False


def natural_order(path: Path) -> list[tuple[bool, int, str]]:
    """`part.2` before `part.10`."""
    words = re.split(r"([0-9]+)", path.name)
    return [(word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in words]


def open_manifest(path: Path) -> Any:
    try:
        check_regular(path)
        return path.open("rb")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None


@contextmanager
def open_unpacked(path: Path) -> Iterator[Any]:
    """The file's bytes, unpacked as they are read. A fault met while reading is a ManifestError."""
    with open_manifest(path) as raw:
        try:
            yield gzip.GzipFile(fileobj=raw) if is_packed(path) else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ManifestError(f"{path}: damaged or cut off gzip: {first_line(error)}; pack it again") from None
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from None


@contextmanager
def open_whole(path: Path) -> Iterator[Any]:
    """A file that can be read in any order, which Parquet needs."""
    with open_unpacked(path) as file:
        if not is_packed(path):
            yield file
            return
        with tempfile.TemporaryFile() as whole:
            while block := file.read(1 << 20):
                whole.write(block)
                if whole.tell() > MAX_UNPACKED_BYTES:
                    raise ManifestError(f"{path}: over {MAX_UNPACKED_BYTES:,} bytes unpacked; unpack it yourself")
            whole.seek(0)
            yield whole


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
