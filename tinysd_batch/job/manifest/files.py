"""A manifest's file: its name, its bytes, unpacked as they are read, and what a row of it is."""

import gzip
import hashlib
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ManifestError
from tinysd_batch.storage.atomic import check_regular_file

MAX_DECOMPRESSED_BYTES = 4 << 30  # of a .parquet.gz, which must be unpacked whole
PARQUET_SUFFIXES = (".parquet", ".pq")  # of the files in a folder that is one table


def is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def remove_gz_suffix(path: Path) -> str:
    return path.stem if is_gzipped(path) else path.name


def get_manifest_stem(path: Path) -> str:
    """The file's name without the suffixes that say how to read it."""
    return Path(remove_gz_suffix(path)).stem


def list_manifest_files(path: Path) -> list[Path]:
    """The files that hold the manifest: itself, or the Parquet parts of a folder in their order.

    Spark, Dask and pandas write a table as a folder of parts; names that begin with `_` or `.` are their own notes.
    Raises ManifestError for a folder without parts, or with tables in folders below it.
    """
    try:
        if not path.is_dir():
            return [path]
        inside = sorted((each for each in path.iterdir() if each.name[0] not in "._"), key=natural_sort_key)
        folders = [each for each in inside if each.is_dir()]
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    parts = [each for each in inside if each.suffix.lower() in PARQUET_SUFFIXES and each not in folders]
    if folders and not parts:
        raise ManifestError(f"{path}: its tables are in folders below it ({folders[0].name}); name one of those")
    if not parts:
        raise ManifestError(f"{path}: cannot be read: is a directory without Parquet files; name a file")
    return parts


def is_parquet_folder(path: Path) -> bool:
    """Whether the folder is one table; the folder of a job, with its results, is not."""
    try:
        if not path.is_dir() or (path / "job.json").exists():
            return False
        return any(each.suffix.lower() in PARQUET_SUFFIXES for each in path.iterdir())
    except OSError:
        return False


def natural_sort_key(path: Path) -> list[tuple[bool, int, str]]:
    """`part.2` before `part.10`."""
    words = re.split(r"([0-9]+)", path.name)
    return [(word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in words]


def open_manifest(path: Path) -> Any:
    try:
        check_regular_file(path)
        return path.open("rb")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None


@contextmanager
def open_decompressed(path: Path) -> Iterator[Any]:
    """The file's bytes, unpacked as they are read. A fault met while reading is a ManifestError."""
    with open_manifest(path) as raw:
        try:
            yield gzip.GzipFile(fileobj=raw) if is_gzipped(path) else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ManifestError(f"{path}: damaged or cut off gzip: {summarize_error(error)}; pack it again") from None
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror or summarize_error(error)}") from None


@contextmanager
def open_seekable(path: Path) -> Iterator[Any]:
    """A file that can be read in any order, which Parquet needs."""
    with open_decompressed(path) as file:
        if not is_gzipped(path):
            yield file
            return
        with tempfile.TemporaryFile() as whole:
            while block := file.read(1 << 20):
                whole.write(block)
                if whole.tell() > MAX_DECOMPRESSED_BYTES:
                    raise ManifestError(f"{path}: over {MAX_DECOMPRESSED_BYTES:,} bytes unpacked; unpack it yourself")
            whole.seek(0)
            yield whole


def summarize_error(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def compute_fingerprint(path: Path) -> str:
    """BLAKE2b of the manifest's bytes, 32 hex digits; for a folder of its parts' names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in list_manifest_files(path):
        if part != path:
            digest.update(f"{part.name}/{part.stat().st_size}/".encode("utf-8", "surrogateescape"))
        with open_manifest(part) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


LINE_ENDS = b"\r\n"


def starts_with_fingerprint(manifest: Path, fingerprint: str, size: int | None) -> bool:
    """Whether the manifest's bytes begin with those of that fingerprint, and go on with a new line.

    Then its first rows are what they were, however they are read. `size` is how many bytes these were, where that is
    known; else every end of a line is tried.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open_manifest(manifest) as file:
        if size:
            while size and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
            ends_a_line = block[-1:] in (b"\n", b"\r") or file.read(1) in (b"\n", b"\r")
            return not size and ends_a_line and digest.hexdigest() == fingerprint
        for line in file:
            bare = line.rstrip(LINE_ENDS)
            for part in (bare, line[len(bare) :]):
                digest.update(part)
                if part and digest.copy().hexdigest() == fingerprint:
                    return True
    return False


def read_manifest_stamp(manifest: Path) -> tuple[int, int]:
    """Size and time of the last change: what tells quickly that a file, or one of a folder's parts, was touched."""
    try:
        parts = [file.stat() for file in list_manifest_files(manifest)]
    except FileNotFoundError:
        raise ManifestError(f"{manifest}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{manifest}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    return sum(part.st_size for part in parts), max(part.st_mtime_ns for part in parts)
