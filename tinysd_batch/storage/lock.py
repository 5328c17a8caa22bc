"""Lock a folder, so that one process at a time writes to it."""

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
from tinysd_batch.storage.filesystem import (
    NoLocksError,
    try_flock,
    try_lock,
)
from tinysd_batch.storage.filesystem import is_transient as is_transient
from tinysd_batch.storage.filesystem import storage_errors as storage_errors
from tinysd_batch.text import make_text_storable

MAX_HOLDER_BYTES = 1000

LOCK_ATTEMPTS = 4

LOCK_WAIT_S = 0.05

TAKE_OVER_WAIT_S = 10.0  # a write takes less

GUARD_WAIT_S = 60.0  # where nobody asked to take anything over: for a write of another onto a slow disk


class FileLock:
    """A job's lock in our hands. `guard` surrounds every write that another driver could take for its own."""

    def __init__(self, handle: int, path: Path) -> None:
        self.handle = handle
        self.path = path
        self.guard_depth = 0

    def is_held(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat(follow_symlinks=False))
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Nobody takes the job over meanwhile; raise JobLockedError when somebody has, while we were stopped, say."""
        with contextlib.ExitStack() as gate:
            if self.guard_depth == 0:
                gate.enter_context(hold_write_gate(self.path, GUARD_WAIT_S))
                if not self.is_held():
                    raise JobLockedError(
                        f"{self.path.parent.parent}: another tinysd-batch ({read_lock_holder(self.path)}) has taken this job "
                        f"over; this one writes nothing more. What is done is safe, and the same command goes on"
                    )
            self.guard_depth += 1
            try:
                yield
            finally:
                self.guard_depth -= 1


@contextlib.contextmanager
def hold_write_gate(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the folder of the lock `path` for the time of a write. Raises JobLockedError after `wait_s`."""
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


def write_in_progress_error(path: Path) -> JobLockedError:
    """Somebody was stopped in the middle of a write, or the disk hangs. Whoever signed `path` may well be ourselves."""
    told = read_lock_holder(path)
    ours = told.startswith(f"{describe_own_process()} ")
    who = "a process that had this job before" if ours else f"another tinysd-batch ({told})"
    return JobLockedError(
        f"{path.parent.parent}: {who} is in the middle of a write; end it with kill -9 first. What is done is "
        f"safe, and the same command goes on"
    )


def describe_own_process() -> str:
    return f"process {os.getpid()} on {make_text_storable(platform.node())}"


def read_lock_holder(path: Path) -> str:
    """Who holds a lock, by the holder's own word."""
    told = ""
    with contextlib.suppress(OSError):
        told = read_file(path, MAX_HOLDER_BYTES).decode("utf-8", "replace").strip()
    return told or "which one, it does not say"


def lock_held_error(path: Path, advice: str) -> JobLockedError:
    return JobLockedError(
        f"{path.parent.parent}: another tinysd-batch ({read_lock_holder(path)}) works on this job; {advice}"
    )


@contextlib.contextmanager
def hold_lock(path: Path, take_over: bool = False) -> Iterator[FileLock]:
    """Hold `path` as a lock, which the kernel frees when we die; raise JobLockedError when another process has it.

    With `take_over` it is taken from one that has it, who finds out before its next write.
    """
    with clean_up_if_unlockable(path):
        held = acquire_lock(path, take_over)
    try:
        write_lock_holder(held.handle, path)
        yield held
    finally:
        os.close(held.handle)


@contextlib.contextmanager
def clean_up_if_unlockable(path: Path) -> Iterator[None]:
    """Remove a new lock file and the folders made for it where the file system turns out to have no locks."""
    new = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    try:
        yield
    except NoLocksError:
        for each in new:
            with contextlib.suppress(OSError):
                each.unlink() if each == path else each.rmdir()
        raise


def acquire_lock(path: Path, take_over: bool) -> FileLock:
    """Lock the file `path`, which is made if need be."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_lock_file(path)
    try:
        if not try_lock_with_retries(handle, path):
            if not take_over:
                advice = "wait for it, stop it, or where that cannot be, take the job from it with --take-over"
                raise lock_held_error(path, advice)
            theirs, handle = handle, replace_lock_file(path)
            os.close(theirs)
        held = FileLock(handle, path)
        if not held.is_held():
            raise JobLockedError(f"{path.parent.parent}: another tinysd-batch has just given this job up; try again")
        with contextlib.suppress(JobLockedError), hold_write_gate(path, 0.0):
            pass  # every later write needs it: raises where files can be locked and folders cannot
    except BaseException:
        os.close(handle)
        raise
    return held


def open_lock_file(path: Path) -> int:
    if path.exists():
        check_regular_file(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def try_lock_with_retries(handle: int, path: Path) -> bool:
    """`status` holds it for a moment, too."""
    for _ in range(LOCK_ATTEMPTS - 1):
        if try_lock(handle, path.parent):
            return True
        time.sleep(LOCK_WAIT_S)
    return try_lock(handle, path.parent)


def write_lock_holder(handle: int, path: Path) -> None:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    with storage_errors(path):
        os.ftruncate(handle, 0)
        os.write(handle, f"{describe_own_process()} since {since}\n".encode())


def replace_lock_file(path: Path) -> int:
    """Put a lock of our own in the place of another's, between two of its writes. It is ours before it is there."""
    new = path.with_name(f"{path.name}.new")
    with hold_write_gate(path, TAKE_OVER_WAIT_S), storage_errors(path):
        new.unlink(missing_ok=True)  # of one that was killed here
        handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try_flock(handle, path.parent, fcntl.LOCK_EX)
        new.replace(path)
    return handle


def check_unlocked(path: Path) -> None:
    """Raise JobLockedError while another process holds `path`. Takes nothing and writes nothing."""
    if is_locked(path):
        raise lock_held_error(path, "wait for it or stop it")


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock `path` now; never where the file system has no locks."""
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
