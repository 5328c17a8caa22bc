"""Write files so that a reader sees a whole file or none: write a temporary file, sync it, then rename or link it."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from tinysd_batch.errors import OccupiedPathError, StorageError
from tinysd_batch.storage.filesystem import (
    NO_LINKS_ERRNOS,
    NO_RENAME_ERRNOS,
    NoLocksError,
    retry_transient_errors,
    storage_errors,
    sync_handle,
    sync_path,
    try_flock,
    try_lock,
)

TEMPORARY_PREFIX = ".tmp-"
MAX_FILE_BYTES = 100_000_000  # a larger image file was not written by this program


def check_regular_file(path: Path) -> None:
    """Raise OSError for a folder, and for a pipe or device, where reading may never end."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read an untrusted file. Raises OSError, also if it is larger than `max_bytes`."""
    check_regular_file(path)
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"Over {max_bytes:,} bytes", str(path))
    return data


@contextlib.contextmanager
def synced_temporary(data: bytes, folder: Path) -> Iterator[Path]:
    """Write `data` to a temporary file in `folder` and sync it; remove the file at the end if it still exists."""
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            sync_handle(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@retry_transient_errors
def sync_existing_file(path: Path) -> None:
    """Make a file durable that another process wrote: that process may have died before it synced the folder.

    Raises:
        StorageError: The file or its folder could not be synced.
    """
    with storage_errors(path):
        sync_path(path)
        sync_path(path.parent)


@retry_transient_errors
def write_atomically(data: bytes, path: Path) -> None:
    """Write `data` to `path`, replacing an existing file. Readers see the old or the new content, never a mixture."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with synced_temporary(data, path.parent) as temporary:
            temporary.replace(path)
        sync_path(path.parent)


@retry_transient_errors
def publish(data: bytes, path: Path, scratch: Path, is_same: Callable[[bytes], bool]) -> bytes:
    """Write `data` to `path` unless the same image is already there.

    The first writer wins and a late writer keeps the existing file, so a file whose hash is in the results table never
    changes.

    Args:
        data: Content of the new file.
        path: Final path.
        scratch: Folder on the same file system, for the file while it is being written.
        is_same: Gets the bytes of an existing file and returns whether they are the image to be written.

    Returns:
        The content of the file at `path`: `data`, or that of the existing file.
    """
    with storage_errors(path):
        make_image_folder(path.parent)
        scratch.mkdir(parents=True, exist_ok=True)
        with synced_temporary(data, scratch) as temporary:
            try:
                os.link(temporary, path, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EEXIST, *NO_LINKS_ERRNOS):
                    raise
                return replace_unless_same(data, temporary, path, is_same)
        sync_path(path.parent)
    return data


def make_image_folder(folder: Path) -> None:
    """Create a folder for images and its missing parents, and sync each parent that may be opened."""
    if folder.is_symlink():
        raise StorageError(f"{folder}: is a symbolic link; images are not written through links")
    if folder.is_dir():
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(created):
        with contextlib.suppress(PermissionError):
            sync_path(path.parent)


def link_or_copy(source: Path, path: Path, scratch: Path, is_same: Callable[[bytes], bool]) -> None:
    """Make `path` a hard link to `source`, or a copy if the file system does not allow that or `path` exists.

    The folder of a new link is not synced: the caller syncs it once for many files. `scratch` and `is_same` are those
    of `publish`, which writes the copy.
    """
    with storage_errors(path):
        make_image_folder(path.parent)
        try:
            os.link(source, path, follow_symlinks=False)
        except OSError:
            publish(read_file(source), path, scratch, is_same)


def replace_unless_same(data: bytes, temporary: Path, path: Path, is_same: Callable[[bytes], bool]) -> bytes:
    """Publish where `path` exists or hard links do not work. A lock on the folder admits one writer at a time."""
    if path.is_dir() and not path.is_symlink():
        raise OccupiedPathError(
            f"{path}: a folder is in the image's place; move it away, then submit with --retry-failed"
        )
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        if not try_flock(folder, path.parent, fcntl.LOCK_EX):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path.parent))
        existing = b""
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_FILE_BYTES:
            existing = path.read_bytes()
        if is_same(existing):
            sync_path(path)
        else:
            existing = data
            move_temporary(temporary, path, data)
        sync_handle(folder)
        return existing
    finally:
        os.close(folder)


def move_temporary(temporary: Path, path: Path, data: bytes) -> None:
    """Rename a temporary file, or write another one next to `path` if `temporary` is on another file system."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in NO_RENAME_ERRNOS:
            raise
        with synced_temporary(data, path.parent) as sibling:
            sibling.replace(path)


def remove_temporaries(*folders: Path) -> None:
    """Remove temporary files that killed writers left in these folders. The caller must hold the job's lock."""
    for folder in folders:
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` at the end, or removed after an error.

    `path` must not exist. Temporary folders that killed processes left for the same `path` are removed first.
    """
    parent, prefix = path.absolute().parent, f"{TEMPORARY_PREFIX}{path.name}-"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{glob.escape(prefix)}*"):
        remove_if_abandoned(leftover)
    temporary = parent / f"{prefix}{uuid.uuid4().hex}"
    temporary.mkdir()
    handle = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(NoLocksError):  # `remove_if_abandoned` removes nothing there, either
            try_lock(handle, parent)
        yield temporary
        for file in temporary.rglob("*"):
            sync_path(file)
        temporary.rename(path)
        sync_path(parent)
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_if_abandoned(folder: Path) -> None:
    """Remove a folder unless a running process holds its lock or the file system has no locks."""
    with contextlib.suppress(OSError, StorageError):
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            if try_lock(handle, folder):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
