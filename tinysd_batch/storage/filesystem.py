"""Detect and work around operations that a file system does not support.

Every local Linux file system supports file locks, fsync on a folder, and hard links. Network, FUSE and FAT file systems
lack some of these, and each reports it with a different errno. `storage` works without hard links and without folder
fsync. It does not work without locks, because two runs could then write to the same job.
"""

import contextlib
import errno
import fcntl
import functools
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from tinysd_batch.errors import StorageError

UNSUPPORTED_ERRNOS = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
# ENOLCK: NFS without lockd; ENOSYS: Lustre mounted with noflock
NO_LOCKS_ERRNOS = UNSUPPORTED_ERRNOS | {errno.ENOLCK, errno.EBADF, errno.EPERM}
NO_FOLDER_SYNC_ERRNOS = UNSUPPORTED_ERRNOS | {errno.EBADF}  # EINVAL: CIFS, sshfs, 9p
# EPERM: FAT; EXDEV: mergerfs, OpenAFS
NO_LINKS_ERRNOS = UNSUPPORTED_ERRNOS | {errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK}
NO_RENAME_ERRNOS = frozenset({errno.EXDEV})  # mergerfs, or another file system mounted inside the job folder
WRITE_ATTEMPTS = 6  # with 0.5, 1, 2, 4 and 8 s between them, each varied at random by up to half
TRANSIENT_ERRNOS = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EINTR, errno.EIO,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
LOCK_HELD_ERRNOS = frozenset({errno.EAGAIN, errno.EACCES})  # EACCES: CIFS
P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn any OSError (disk full, read-only, permission denied, ...) into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        reason = next(iter((error.strerror or str(error)).splitlines()), type(error).__name__)
        raise StorageError(f"{path}: {reason}; make room or choose another folder, then try again") from error


def is_transient(error: BaseException) -> bool:
    """Whether the cause of a StorageError may go away by itself, such as a network file system that is unreachable."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in TRANSIENT_ERRNOS


def retry_transient_errors(write: Callable[P, R]) -> Callable[P, R]:
    """Decorate a repeatable write so that it waits and tries again after a transient StorageError."""

    @functools.wraps(write)
    def write_with_retries(*args: P.args, **kwargs: P.kwargs) -> R:
        for attempt in range(WRITE_ATTEMPTS - 1):
            try:
                return write(*args, **kwargs)
            except StorageError as error:
                if not is_transient(error):
                    raise
            time.sleep(0.5 * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311 - not used for security
        return write(*args, **kwargs)

    return write_with_retries


class NoLocksError(StorageError):
    """The file system has no locks."""


def try_flock(handle: int, folder: Path, operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Lock an open file or folder; return False if another process holds the lock.

    Raises:
        NoLocksError: The file system of `folder` has no locks.
        OSError: Locking failed for another reason.
    """
    try:
        fcntl.flock(handle, operation)
    except OSError as error:
        if error.errno in LOCK_HELD_ERRNOS:
            return False
        if error.errno in NO_LOCKS_ERRNOS:
            raise NoLocksError(
                f"{folder}: this file system has no locks (Lustre: mount with -o flock; NFS: start lockd); "
                f"choose a folder on another one"
            ) from None
        raise
    return True


def sync_handle(handle: int) -> None:
    """Make an open file or folder durable.

    A folder is skipped if the file system cannot sync folders. A file is never skipped.

    Raises:
        OSError: The file or folder could not be synced.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC_ERRNOS or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise


def sync_path(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power failure. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_handle(handle)
    finally:
        os.close(handle)


def try_lock(handle: int, folder: Path) -> bool:
    """Do what `try_flock` does without waiting, and raise StorageError instead of OSError."""
    with storage_errors(folder):
        return try_flock(handle, folder)
