"""What a file system may be unable to do, how that looks, and what is done then.

Locks, syncing a folder and hard links exist on every local Linux file system. Network, FUSE and FAT file systems lack
some of them, and each reports that with an errno of its own. `storage` works without hard links and without folder
sync. It does not work without locks, since two runs could then write into one job.
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
NO_LOCKS_ERRNOS = UNSUPPORTED_ERRNOS | {
    errno.ENOLCK,
    errno.EBADF,
    errno.EPERM,
}  # ENOLCK: NFS without lockd; ENOSYS: Lustre, noflock
NO_FOLDER_SYNC_ERRNOS = UNSUPPORTED_ERRNOS | {errno.EBADF}  # EINVAL: CIFS, sshfs, 9p
NO_LINKS_ERRNOS = UNSUPPORTED_ERRNOS | {
    errno.EPERM,
    errno.EACCES,
    errno.EXDEV,
    errno.EMLINK,
}  # EPERM: FAT; EXDEV: mergerfs, OpenAFS
NO_RENAME_ERRNOS = frozenset({errno.EXDEV})  # mergerfs, or another file system mounted inside the job folder
WRITE_ATTEMPTS = (
    6  # at a write that fails by what may pass, with 0.5, 1, 2, 4 and 8 seconds between, give or take a half
)
TRANSIENT_ERRNOS = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EINTR, errno.EIO,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
LOCK_HELD_ERRNOS = frozenset({errno.EAGAIN, errno.EACCES})  # EACCES: CIFS
P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only, forbidden, broken or vanished disk into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        reason = next(iter((error.strerror or str(error)).splitlines()), type(error).__name__)
        raise StorageError(f"{path}: {reason}; make room or choose another folder, then try again") from error


def is_transient(error: BaseException) -> bool:
    """Whether a StorageError's cause may pass by itself: a network file system that is away for a while, say."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in TRANSIENT_ERRNOS


def retry_transient_errors(write: Callable[P, R]) -> Callable[P, R]:
    """Have a write that can be repeated wait and try again, before it raises what may be transient."""

    @functools.wraps(write)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R:
        for attempt in range(WRITE_ATTEMPTS - 1):
            try:
                return write(*args, **kwargs)
            except StorageError as error:
                if not is_transient(error):
                    raise
            time.sleep(0.5 * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
        return write(*args, **kwargs)

    return tried


class NoLocksError(StorageError):
    """The file system has no locks."""


def try_flock(handle: int, folder: Path, operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Lock an open file or folder; False where another process holds it.

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
    """Make an open file or folder durable. A folder's sync is skipped where the file system has none, a file's never.

    Raises OSError.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC_ERRNOS or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise


def sync_path(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_handle(handle)
    finally:
        os.close(handle)


def try_lock(handle: int, folder: Path) -> bool:
    """Lock an open file or folder, unless another process has locked it. Raises StorageError."""
    with storage_errors(folder):
        return try_flock(handle, folder)
