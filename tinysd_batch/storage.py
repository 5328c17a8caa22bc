"""Files that are whole or not there: write beside, sync, then publish under the final name."""

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from tinysd_batch.errors import JobLockedError, StorageError

TEMPORARY_PREFIX = ".tmp-"
MAX_FILE_BYTES = 100_000_000  # a larger picture is not one of ours
MAX_HOLDER_BYTES = 1000
LOCK_ATTEMPTS = 4
LOCK_WAIT_S = 0.05
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # file systems without hard links


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only, forbidden, broken or vanished disk into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(f"{path}: {reason}; make room or choose another folder, then try again") from error


def check_regular(path: Path) -> None:
    """Raises OSError for what is no file: a folder, or a pipe or device, whose reading may never end."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_file(path: Path, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """What a file holds that anybody may have put there. Raises OSError, also for more than `most_bytes`."""
    check_regular(path)
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
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(data: bytes, path: Path) -> None:
    """Put `data` at `path`, replacing what is there. Readers see the old file or the new one, never a part."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with synced_temporary(data, path.parent) as temporary:
            temporary.replace(path)
        sync_folder(path.parent)


def publish(data: bytes, path: Path, scratch: Path, is_same: Callable[[bytes], bool]) -> bytes:
    """Put `data` at `path` unless the same thing is there already; return what the file holds now.

    `is_same` tells from a file's bytes whether it is the image we wanted to write. The first writer wins: a late one
    adopts its file, so a file whose hash is in the results table never changes. `scratch` is a folder on the same file
    system, for the file while it is being written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.is_symlink():
            raise StorageError(f"{path.parent}: is a symbolic link; pictures are not written through links")
        scratch.mkdir(parents=True, exist_ok=True)
        with synced_temporary(data, scratch) as temporary:
            try:
                os.link(temporary, path, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EEXIST, *NO_LINKS):
                    raise
                return replace_unless_same(data, temporary, path, is_same)
        sync_folder(path.parent)
    return data


def share(source: Path, path: Path, scratch: Path, is_same: Callable[[bytes], bool]) -> None:
    """Make `path` the same file as `source`, or a copy where file systems do not allow that.

    The folder is not synced: the caller does that once for many. `is_same` is `publish`'s, for what is there already.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.is_symlink():
            raise StorageError(f"{path.parent}: is a symbolic link; pictures are not written through links")
        try:
            os.link(source, path, follow_symlinks=False)
        except OSError:
            publish(read_file(source), path, scratch, is_same)


def replace_unless_same(data: bytes, temporary: Path, path: Path, is_same: Callable[[bytes], bool]) -> bytes:
    """Publish where something may be in the way, one writer at a time."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        there = b""
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_FILE_BYTES:
            there = path.read_bytes()
        if is_same(there):
            return there
        temporary.replace(path)
        os.fsync(folder)
        return data
    finally:
        os.close(folder)


def sweep_temporaries(*folders: Path) -> None:
    """Remove what killed writers left in these folders. Only the driver that holds the job's lock may do this."""
    for folder in folders:
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)


class Lock:
    """A lock file that this process holds, for as long as nobody takes it away by removing the file."""

    def __init__(self, handle: int, path: Path) -> None:
        self.handle = handle
        self.path = path

    def is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat(follow_symlinks=False))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raise JobLockedError once another process may have the job: a driver that stood still must write nothing."""
        if not self.is_ours():
            raise JobLockedError(
                f"{self.path.parent.parent}: the lock of this job was taken away while we worked on it; nothing "
                f"more is written. What is done is safe, and the same command goes on"
            )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[Lock]:
    """Hold `path` as a lock, which the kernel frees when we die; raise JobLockedError when another process has it."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_regular(path)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        take_lock(handle, path)
        yield Lock(handle, path)
    finally:
        os.close(handle)


def take_lock(handle: int, path: Path) -> None:
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == LOCK_ATTEMPTS - 1:
                raise held_by_another(path) from None
        time.sleep(LOCK_WAIT_S)  # `status` holds it for a moment, too
    if not Lock(handle, path).is_ours():
        raise JobLockedError(f"{path.parent.parent}: another tinysd-batch has just given this job up; try again")
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    with storage_errors(path):
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()} since {since}\n".encode())


def held_by_another(path: Path) -> JobLockedError:
    """The error that says who holds a lock, by the holder's own word."""
    told = read_file(path, MAX_HOLDER_BYTES).decode("utf-8", "replace").strip() or "where, it does not say"
    return JobLockedError(
        f"{path.parent.parent}: another tinysd-batch ({told}) works on this job; wait for it or stop it"
    )


def check_unlocked(path: Path) -> None:
    """Raise JobLockedError while another process holds `path`. Takes nothing and writes nothing."""
    with storage_errors(path):
        if not path.exists():
            return
        check_regular(path)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise held_by_another(path) from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` at the end; after an error nothing of it is left. `path` must not exist."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = path.absolute().parent / f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync_folder(file)
        temporary.rename(path)
        sync_folder(path.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
