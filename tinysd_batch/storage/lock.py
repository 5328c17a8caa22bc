"""Lock a job so that one process at a time writes to it.

The lock is an flock on a file, which the kernel releases when its holder dies. Another process may take the job over
between two writes of the holder: every write takes a second lock on the file's folder (the "write gate") and then
checks that the lock file is still its own.
"""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tinysd_batch.errors import JobLockedError
from tinysd_batch.storage.atomic import check_regular_file, read_file
from tinysd_batch.storage.filesystem import NoLocksError, storage_errors, try_flock, try_lock
from tinysd_batch.text import make_text_storable

MAX_HOLDER_BYTES = 1000
LOCK_ATTEMPTS = 4
LOCK_WAIT_S = 0.05
TAKE_OVER_WAIT_S = 10.0  # longer than a write takes
GUARD_WAIT_S = 60.0  # longer than another process's write to a slow disk takes


class FileLock:
    """A lock that this process holds. Every write to the job runs inside `guard`."""

    def __init__(self, handle: int, path: Path) -> None:
        self.handle = handle
        self.path = path
        self.guard_depth = 0

    def is_held(self) -> bool:
        """Whether the locked file is still the one at `path`; False once another process has taken the job over."""
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat(follow_symlinks=False))
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Keep other processes from taking the job over during a write. May be nested.

        Raises:
            JobLockedError: Another process has taken the job over, for example while this one was suspended.
        """
        with contextlib.ExitStack() as gate:
            if self.guard_depth == 0:
                gate.enter_context(hold_write_gate(self.path, GUARD_WAIT_S))
                if not self.is_held():
                    raise taken_over_error(self.path)
            self.guard_depth += 1
            try:
                yield
            finally:
                self.guard_depth -= 1


@contextlib.contextmanager
def hold_write_gate(path: Path, wait_s: float) -> Iterator[None]:
    """Lock the folder of the lock file `path` for one write. Raises JobLockedError after `wait_s`."""
    with storage_errors(path.parent):
        folder = os.open(path.parent, os.O_RDONLY)
    try:
        deadline = time.monotonic() + wait_s
        while not try_lock(folder, path.parent):
            if time.monotonic() >= deadline:
                raise write_in_progress_error(path)
            time.sleep(0.1)
        yield
    finally:
        os.close(folder)


def taken_over_error(path: Path) -> JobLockedError:
    return JobLockedError(
        f"{path.parent.parent}: another tinysd-batch ({read_lock_holder(path)}) has taken this job over; this one "
        f"writes nothing more. Finished images are safe; run the same command again to resume the job"
    )


def write_in_progress_error(path: Path) -> JobLockedError:
    """Return the error for a process that was suspended during a write, or whose disk does not respond.

    If the lock file names this process, the write belongs to an earlier holder.
    """
    holder = read_lock_holder(path)
    is_own = holder.startswith(f"{describe_own_process()} ")
    writer = "a process that had this job before" if is_own else f"another tinysd-batch ({holder})"
    return JobLockedError(
        f"{path.parent.parent}: {writer} is in the middle of a write; end it with kill -9 first. Finished images are "
        f"safe; run the same command again to resume the job"
    )


def describe_own_process() -> str:
    """Return `process 1234 on hostname`."""
    return f"process {os.getpid()} on {make_text_storable(platform.node())}"


def read_lock_holder(path: Path) -> str:
    """Read which process holds the lock, as `write_lock_holder` wrote it."""
    holder = ""
    with contextlib.suppress(OSError):
        holder = read_file(path, MAX_HOLDER_BYTES).decode("utf-8", "replace").strip()
    return holder or "unknown process"


def lock_held_error(path: Path, advice: str) -> JobLockedError:
    return JobLockedError(
        f"{path.parent.parent}: another tinysd-batch ({read_lock_holder(path)}) is working on this job; {advice}"
    )


@contextlib.contextmanager
def hold_lock(path: Path, take_over: bool = False) -> Iterator[FileLock]:
    """Hold the lock file `path`, which is created if it does not exist.

    Args:
        path: The lock file, in a subfolder of the folder that messages name.
        take_over: Take the lock from a process that holds it; that process notices before its next write.

    Raises:
        JobLockedError: Another process holds the lock.
        NoLocksError: The file system has no locks. Nothing that was created for the lock remains.
    """
    with clean_up_if_unlockable(path):
        lock = acquire_lock(path, take_over)
    try:
        write_lock_holder(lock.handle, path)
        yield lock
    finally:
        os.close(lock.handle)


@contextlib.contextmanager
def clean_up_if_unlockable(path: Path) -> Iterator[None]:
    """Remove a new lock file and its new folders if the file system turns out to have no locks."""
    created = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    try:
        yield
    except NoLocksError:
        for each in created:
            with contextlib.suppress(OSError):
                each.unlink() if each == path else each.rmdir()
        raise


def acquire_lock(path: Path, take_over: bool) -> FileLock:
    """Lock the file `path`, which is created if it does not exist. Raises JobLockedError or StorageError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_lock_file(path)
    try:
        if not try_lock_with_retries(handle, path):
            if not take_over:
                advice = "wait for it, stop it, or if neither is possible, take the job from it with --take-over"
                raise lock_held_error(path, advice)
            held_by_other, handle = handle, replace_lock_file(path)
            os.close(held_by_other)
        lock = FileLock(handle, path)
        if not lock.is_held():
            raise JobLockedError(f"{path.parent.parent}: another tinysd-batch has just released this job; try again")
        with contextlib.suppress(JobLockedError), hold_write_gate(path, 0.0):
            pass  # every write needs the gate: raise now if files can be locked and folders cannot
    except BaseException:
        os.close(handle)
        raise
    return lock


def open_lock_file(path: Path) -> int:
    if path.exists():
        check_regular_file(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def try_lock_with_retries(handle: int, path: Path) -> bool:
    """Lock the open file `path`, trying again because `status` and `verify` hold the lock for a moment, too."""
    for _ in range(LOCK_ATTEMPTS - 1):
        if try_lock(handle, path.parent):
            return True
        time.sleep(LOCK_WAIT_S)
    return try_lock(handle, path.parent)


def write_lock_holder(handle: int, path: Path) -> None:
    """Write this process's name and the time into the lock file."""
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    with storage_errors(path):
        os.ftruncate(handle, 0)
        os.write(handle, f"{describe_own_process()} since {since}\n".encode())


def replace_lock_file(path: Path) -> int:
    """Replace the lock file of another process, between two of its writes, with one that is already locked."""
    new = path.with_name(f"{path.name}.new")
    with hold_write_gate(path, TAKE_OVER_WAIT_S), storage_errors(path):
        new.unlink(missing_ok=True)  # left by a process that was killed at this point
        handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try_flock(handle, path.parent, fcntl.LOCK_EX)
        new.replace(path)
    return handle


def check_unlocked(path: Path) -> None:
    """Raise JobLockedError if another process holds the lock `path`. Writes nothing and keeps no lock."""
    if is_locked(path):
        raise lock_held_error(path, "wait for it or stop it")


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock `path` now; always False if the file system has no locks."""
    with storage_errors(path):
        if not path.exists():
            return False
        check_regular_file(path)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return not try_flock(handle, path.parent, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except NoLocksError:
            return False
        finally:
            os.close(handle)
