"""A manifest's file: its name, its bytes, unpacked as they are read, and what a row of it is."""

import gzip
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tinysd_batch.errors import ManifestError
from tinysd_batch.storage import check_regular

MAX_CELL_CHARACTERS = 131_072
MAX_UNPACKED_BYTES = 4 << 30  # of a .parquet.gz, which must be unpacked whole


class Line(NamedTuple):
    """A row as the file gives it, without the cells that are empty."""

    values: dict[str, Any]  # known columns under our names
    shown: Mapping[str, str]  # our name -> the file's


class Fault(NamedTuple):
    """A row that cannot be read."""

    reason: str
    prompt: str | None = None


def is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def unpacked_name(path: Path) -> str:
    return path.stem if is_packed(path) else path.name


def bare_name(path: Path) -> str:
    """The file's name without the suffixes that say how to read it."""
    return Path(unpacked_name(path)).stem


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
