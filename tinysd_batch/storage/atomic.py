"""Files that are whole or not there: write beside, sync, then publish under the final name."""

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
    sync_handle,
    sync_path,
    try_flock,
    try_lock,
)
from tinysd_batch.storage.filesystem import is_transient as is_transient
from tinysd_batch.storage.filesystem import storage_errors as storage_errors

TEMPORARY_PREFIX = ".tmp-"
MAX_FILE_BYTES = 100_000_000  # a larger picture is not one of ours


def check_regular_file(path: Path) -> None:
    """Raises OSError for what is no file: a folder, or a pipe or device, whose reading may never end."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_file(path: Path, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """What a file holds that anybody may have put there. Raises OSError, also for more than `most_bytes`."""
    check_regular_file(path)
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"Over {most_bytes:,} bytes", str(path))
    return data


@contextlib.contextmanager
def synced_temporary(data: bytes, folder: Path) -> Iterator[Path]:
    """A file in `folder` that holds `data` on disk; gone afterwards, whatever happens."""
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
    """Make a file durable that was found rather than written: whoever wrote it may have died before syncing its folder.

    Raises StorageError.
    """
    with storage_errors(path):
        sync_path(path)
        sync_path(path.parent)


@retry_transient_errors
def write_atomically(data: bytes, path: Path) -> None:
    """Put `data` at `path`, replacing what is there. Readers see the old file or the new one, never a part."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with synced_temporary(data, path.parent) as temporary:
            temporary.replace(path)
        sync_path(path.parent)


@retry_transient_errors
def publish(data: bytes, path: Path, scratch: Path, is_same: Callable[[bytes], bool]) -> bytes:
    """Put `data` at `path` unless the same thing is there already; return what the file holds now.

    `is_same` tells from a file's bytes whether it is the image we wanted to write. The first writer wins: a late one
    adopts its file, so a file whose hash is in the results table never changes. `scratch` is a folder on the same file
    system, for the file while it is being written.
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
    """Make a folder for images and those around it, durably where these can be read."""
    if folder.is_symlink():
        raise StorageError(f"{folder}: is a symbolic link; images are not written through links")
    if folder.is_dir():
        return
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(new):
        with contextlib.suppress(PermissionError):
            sync_path(each.parent)


def link_or_copy(source: Path, path: Path, scratch: Path, is_same: Callable[[bytes], bool]) -> None:
    """Make `path` the same file as `source`, or a copy where file systems do not allow that.

    The folder is not synced: the caller does that once for many. `is_same` is `publish`'s, for what is there already.
    """
    with storage_errors(path):
        make_image_folder(path.parent)
        try:
            os.link(source, path, follow_symlinks=False)
        except OSError:
            publish(read_file(source), path, scratch, is_same)


def replace_unless_same(data: bytes, temporary: Path, path: Path, is_same: Callable[[bytes], bool]) -> bytes:
    """Publish where something may be in the way, or where there are no hard links; one writer at a time."""
    if path.is_dir() and not path.is_symlink():
        raise OccupiedPathError(
            f"{path}: a folder is in the image's place; move it away, then submit with --retry-failed"
        )
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        if not try_flock(folder, path.parent, fcntl.LOCK_EX):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path.parent))
        there = b""
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_FILE_BYTES:
            there = path.read_bytes()
        if is_same(there):
            sync_path(path)
        else:
            there = data
            move_temporary(temporary, path, data)
        sync_handle(folder)
        return there
    finally:
        os.close(folder)


def move_temporary(temporary: Path, path: Path, data: bytes) -> None:
    """Rename a temporary file, or write it beside `path` where its folder is on another file system."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in NO_RENAME_ERRNOS:
            raise
        with synced_temporary(data, path.parent) as beside:
            beside.replace(path)


def remove_temporaries(*folders: Path) -> None:
    """Remove what killed writers left in these folders. Only the driver that holds the job's lock may do this."""
    for folder in folders:
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` at the end; after an error nothing of it is left. `path` must not exist.

    What a killed process left of the same `path` is removed first.
    """
    parent, prefix = path.absolute().parent, f"{TEMPORARY_PREFIX}{path.name}-"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{glob.escape(prefix)}*"):
        remove_if_abandoned(leftover)
    temporary = parent / f"{prefix}{uuid.uuid4().hex}"
    temporary.mkdir()
    handle = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(NoLocksError):  # then `remove_abandoned` removes nothing either
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
    """Remove a folder, unless a process that lives holds its lock, or the file system has no locks."""
    with contextlib.suppress(OSError, StorageError):
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            if try_lock(handle, folder):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
