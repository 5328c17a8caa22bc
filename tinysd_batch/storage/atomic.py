"""Files that are whole or not there: write beside, sync, then publish under the final name."""

import contextlib
import errno
import fcntl
import glob
import os
import platform
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from tinysd_batch.errors import JobLockedError, OccupiedPathError, StorageError
from tinysd_batch.storage.filesystem import NO_LINKS, NO_RENAME, NoLocksError, lock_handle, patiently, sync, sync_path
from tinysd_batch.storage.filesystem import is_transient as is_transient
from tinysd_batch.storage.filesystem import storage_errors as storage_errors
from tinysd_batch.text import storable_text

TEMPORARY_PREFIX = ".tmp-"
MAX_FILE_BYTES = 100_000_000  # a larger picture is not one of ours
MAX_HOLDER_BYTES = 1000
LOCK_ATTEMPTS = 4
LOCK_WAIT_S = 0.05
TAKE_OVER_S = 10.0  # a write takes less
GUARD_WAIT_S = 60.0  # where nobody asked to take anything over: for a write of another onto a slow disk


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
            sync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@patiently
def sync_found_file(path: Path) -> None:
    """Make a file durable that was found rather than written: whoever wrote it may have died before syncing its folder.

    Raises StorageError.
    """
    with storage_errors(path):
        sync_path(path)
        sync_path(path.parent)


@patiently
def write_atomically(data: bytes, path: Path) -> None:
    """Put `data` at `path`, replacing what is there. Readers see the old file or the new one, never a part."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with synced_temporary(data, path.parent) as temporary:
            temporary.replace(path)
        sync_path(path.parent)


@patiently
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
                if error.errno not in (errno.EEXIST, *NO_LINKS):
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


def share(source: Path, path: Path, scratch: Path, is_same: Callable[[bytes], bool]) -> None:
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
        if not lock_handle(folder, path.parent, fcntl.LOCK_EX):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path.parent))
        there = b""
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_FILE_BYTES:
            there = path.read_bytes()
        if is_same(there):
            sync_path(path)
        else:
            there = data
            move(temporary, path, data)
        sync(folder)
        return there
    finally:
        os.close(folder)


def move(temporary: Path, path: Path, data: bytes) -> None:
    """Rename a temporary file, or write it beside `path` where its folder is on another file system."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        with synced_temporary(data, path.parent) as beside:
            beside.replace(path)


def sweep_temporaries(*folders: Path) -> None:
    """Remove what killed writers left in these folders. Only the driver that holds the job's lock may do this."""
    for folder in folders:
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)


class Lock:
    """A job's lock in our hands. `guard` surrounds every write that another driver could take for its own."""

    def __init__(self, handle: int, path: Path) -> None:
        self.handle = handle
        self.path = path
        self.depth = 0

    def is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat(follow_symlinks=False))
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Nobody takes the job over meanwhile; raise JobLockedError when somebody has, while we were stopped, say."""
        with contextlib.ExitStack() as gate:
            if self.depth == 0:
                gate.enter_context(gate_of(self.path, GUARD_WAIT_S))
                if not self.is_ours():
                    raise JobLockedError(
                        f"{self.path.parent.parent}: another tinysd-batch ({holder_of(self.path)}) has taken this job "
                        f"over; this one writes nothing more. What is done is safe, and the same command goes on"
                    )
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1


@contextlib.contextmanager
def gate_of(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the folder of the lock `path` for the time of a write. Raises JobLockedError after `wait_s`."""
    with storage_errors(path.parent):
        folder = os.open(path.parent, os.O_RDONLY)
    try:
        deadline = time.monotonic() + wait_s
        while not try_lock(folder, path.parent):
            if time.monotonic() >= deadline:
                raise in_a_write(path)
            time.sleep(0.1)
        yield
    finally:
        os.close(folder)


def in_a_write(path: Path) -> JobLockedError:
    """Somebody was stopped in the middle of a write, or the disk hangs. Whoever signed `path` may well be ourselves."""
    told = holder_of(path)
    ours = told.startswith(f"{holder_here()} ")
    who = "a process that had this job before" if ours else f"another tinysd-batch ({told})"
    return JobLockedError(
        f"{path.parent.parent}: {who} is in the middle of a write; end it with kill -9 first. What is done is "
        f"safe, and the same command goes on"
    )


def holder_here() -> str:
    return f"process {os.getpid()} on {storable_text(platform.node())}"


def try_lock(handle: int, folder: Path) -> bool:
    """Lock an open file or folder, unless another process has locked it. Raises StorageError."""
    with storage_errors(folder):
        return lock_handle(handle, folder)


def holder_of(path: Path) -> str:
    """Who holds a lock, by the holder's own word."""
    told = ""
    with contextlib.suppress(OSError):
        told = read_file(path, MAX_HOLDER_BYTES).decode("utf-8", "replace").strip()
    return told or "which one, it does not say"


def held_by_another(path: Path, advice: str) -> JobLockedError:
    return JobLockedError(f"{path.parent.parent}: another tinysd-batch ({holder_of(path)}) works on this job; {advice}")


@contextlib.contextmanager
def lock(path: Path, take_over: bool = False) -> Iterator[Lock]:
    """Hold `path` as a lock, which the kernel frees when we die; raise JobLockedError when another process has it.

    With `take_over` it is taken from one that has it, who finds out before its next write.
    """
    with without_traces(path):
        held = take(path, take_over)
    try:
        sign(held.handle, path)
        yield held
    finally:
        os.close(held.handle)


@contextlib.contextmanager
def without_traces(path: Path) -> Iterator[None]:
    """Remove a new lock file and the folders made for it where the file system turns out to have no locks."""
    new = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    try:
        yield
    except NoLocksError:
        for each in new:
            with contextlib.suppress(OSError):
                each.unlink() if each == path else each.rmdir()
        raise


def take(path: Path, take_over: bool) -> Lock:
    """Lock the file `path`, which is made if need be."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_lock(path)
    try:
        if not try_for_a_moment(handle, path):
            if not take_over:
                advice = "wait for it, stop it, or where that cannot be, take the job from it with --take-over"
                raise held_by_another(path, advice)
            theirs, handle = handle, take_from_holder(path)
            os.close(theirs)
        held = Lock(handle, path)
        if not held.is_ours():
            raise JobLockedError(f"{path.parent.parent}: another tinysd-batch has just given this job up; try again")
        with contextlib.suppress(JobLockedError), gate_of(path, 0.0):
            pass  # every later write needs it: raises where files can be locked and folders cannot
    except BaseException:
        os.close(handle)
        raise
    return held


def open_lock(path: Path) -> int:
    if path.exists():
        check_regular(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def try_for_a_moment(handle: int, path: Path) -> bool:
    """`status` holds it for a moment, too."""
    for _ in range(LOCK_ATTEMPTS - 1):
        if try_lock(handle, path.parent):
            return True
        time.sleep(LOCK_WAIT_S)
    return try_lock(handle, path.parent)


def sign(handle: int, path: Path) -> None:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    with storage_errors(path):
        os.ftruncate(handle, 0)
        os.write(handle, f"{holder_here()} since {since}\n".encode())


def take_from_holder(path: Path) -> int:
    """Put a lock of our own in the place of another's, between two of its writes. It is ours before it is there."""
    new = path.with_name(f"{path.name}.new")
    with gate_of(path, TAKE_OVER_S), storage_errors(path):
        new.unlink(missing_ok=True)  # of one that was killed here
        handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        lock_handle(handle, path.parent, fcntl.LOCK_EX)
        new.replace(path)
    return handle


def check_unlocked(path: Path) -> None:
    """Raise JobLockedError while another process holds `path`. Takes nothing and writes nothing."""
    if is_locked(path):
        raise held_by_another(path, "wait for it or stop it")


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock `path` now; never where the file system has no locks."""
    with storage_errors(path):
        if not path.exists():
            return False
        check_regular(path)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return not lock_handle(handle, path.parent, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except NoLocksError:
            return False
        finally:
            os.close(handle)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` at the end; after an error nothing of it is left. `path` must not exist.

    What a killed process left of the same `path` is removed first.
    """
    parent, prefix = path.absolute().parent, f"{TEMPORARY_PREFIX}{path.name}-"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{glob.escape(prefix)}*"):
        remove_abandoned(leftover)
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


def remove_abandoned(folder: Path) -> None:
    """Remove a folder, unless a process that lives holds its lock, or the file system has no locks."""
    with contextlib.suppress(OSError, StorageError):
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            if try_lock(handle, folder):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
