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
from tinysd_batch.storage.atomic import check_regular, read_file
from tinysd_batch.storage.filesystem import (
    NoLocksError,
    lock_handle,
    try_lock,
)
from tinysd_batch.storage.filesystem import is_transient as is_transient
from tinysd_batch.storage.filesystem import storage_errors as storage_errors
from tinysd_batch.text import storable_text

MAX_HOLDER_BYTES = 1000

LOCK_ATTEMPTS = 4

LOCK_WAIT_S = 0.05

TAKE_OVER_S = 10.0  # a write takes less

GUARD_WAIT_S = 60.0  # where nobody asked to take anything over: for a write of another onto a slow disk


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
