"""The file of a manifest: its name, its bytes (decompressed while reading), and whether it has changed."""

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

MAX_DECOMPRESSED_BYTES = 4 << 30  # of a .parquet.gz, which must be decompressed completely
PARQUET_SUFFIXES = (".parquet", ".pq")
LINE_ENDS = b"\r\n"


def is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def remove_gz_suffix(path: Path) -> str:
    return path.stem if is_gzipped(path) else path.name


def get_manifest_stem(path: Path) -> str:
    """Return the file name without the suffixes of its format and compression."""
    return Path(remove_gz_suffix(path)).stem


def list_manifest_files(path: Path) -> list[Path]:
    """Return the files of the manifest: the path itself, or the Parquet files of a folder in natural order.

    Spark, Dask and pandas write a table as a folder of Parquet files; names that begin with `_` or `.` are their
    metadata.

    Raises:
        ManifestError: the folder holds no Parquet files, or only in its subfolders.
    """
    try:
        if not path.is_dir():
            return [path]
        entries = sorted((entry for entry in path.iterdir() if entry.name[0] not in "._"), key=natural_sort_key)
        folders = [entry for entry in entries if entry.is_dir()]
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    files = [entry for entry in entries if entry.suffix.lower() in PARQUET_SUFFIXES and entry not in folders]
    if folders and not files:
        raise ManifestError(f"{path}: its tables are in subfolders ({folders[0].name}); name one of them")
    if not files:
        raise ManifestError(f"{path}: cannot be read: is a directory without Parquet files; name a file")
    return files


def is_parquet_folder(path: Path) -> bool:
    """Whether the path is a folder of Parquet files that form one table. A job folder is not, despite its results."""
    try:
        if not path.is_dir() or (path / "job.json").exists():
            return False
        return any(entry.suffix.lower() in PARQUET_SUFFIXES for entry in path.iterdir())
    except OSError:
        return False


def natural_sort_key(path: Path) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts `part.2` before `part.10`."""
    words = re.split(r"([0-9]+)", path.name)
    return [(word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in words]


def open_manifest(path: Path) -> Any:
    """Open a regular file for reading bytes. Raises ManifestError."""
    try:
        check_regular_file(path)
        return path.open("rb")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None


@contextmanager
def open_decompressed(path: Path) -> Iterator[Any]:
    """Open the file, decompressing it while reading. Errors while reading become ManifestError."""
    with open_manifest(path) as raw:
        try:
            yield gzip.GzipFile(fileobj=raw) if is_gzipped(path) else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ManifestError(
                f"{path}: damaged or truncated gzip: {summarize_error(error)}; compress the file again"
            ) from None
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror or summarize_error(error)}") from None


@contextmanager
def open_seekable(path: Path) -> Iterator[Any]:
    """Open the file for random access, which Parquet needs."""
    with open_decompressed(path) as file:
        if not is_gzipped(path):
            yield file
            return
        with tempfile.TemporaryFile() as decompressed:
            while block := file.read(1 << 20):
                decompressed.write(block)
                if decompressed.tell() > MAX_DECOMPRESSED_BYTES:
                    raise ManifestError(
                        f"{path}: over {MAX_DECOMPRESSED_BYTES:,} bytes when decompressed; decompress the file first"
                    )
            decompressed.seek(0)
            yield decompressed


def summarize_error(error: BaseException) -> str:
    """Return the first line of the message, or the type's name where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def compute_fingerprint(path: Path) -> str:
    """Return BLAKE2b of the manifest's bytes as 32 hex digits; for a folder, of its files' names, sizes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for file in list_manifest_files(path):
        if file != path:
            digest.update(f"{file.name}/{file.stat().st_size}/".encode("utf-8", "surrogateescape"))
        with open_manifest(file) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def starts_with_fingerprint(manifest: Path, fingerprint: str, size: int | None) -> bool:
    """Whether the manifest starts with the bytes of that fingerprint, followed by a line end.

    Then its first rows are unchanged, whatever the rules by which they are read.

    Args:
        size: How many bytes the fingerprint was computed from. None or 0 (unknown): try every line end.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open_manifest(manifest) as file:
        if size:
            while size and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
            is_line_end = block[-1:] in (b"\n", b"\r") or file.read(1) in (b"\n", b"\r")
            return not size and is_line_end and digest.hexdigest() == fingerprint
        for line in file:
            content = line.rstrip(LINE_ENDS)
            for part in (content, line[len(content) :]):
                digest.update(part)
                if part and digest.copy().hexdigest() == fingerprint:
                    return True
    return False


def read_manifest_stamp(manifest: Path) -> tuple[int, int]:
    """Return total size and latest modification time: a quick check whether any file of the manifest was modified."""
    try:
        stats = [file.stat() for file in list_manifest_files(manifest)]
    except FileNotFoundError:
        raise ManifestError(f"{manifest}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{manifest}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
