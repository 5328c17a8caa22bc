"""Ends the Ray processes of a driver that died without doing so itself, by kill -9 say.

Without it Ray's workers go on for seconds and its agents for a minute. It is a process of its own, which lives on for
the moment that takes. Ray's processes are known by a word in their environment, which all that Ray starts for us
inherits, or by an open file, mostly a log, in the folder of our Ray session: some overwrite their environment.

It also ends them when they do not start in time: calls into Ray's native code cannot be interrupted in the driver. When
it is done it removes the session's folder.

It is run by its path with nothing but the standard library, which starts in milliseconds. It reads its standard input:
anything on it means that Ray has started, its end that the driver is no more.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK_VARIABLE = "TINYSD_BATCH_DRIVER"  # the variable; its value is one driver's own
KILL_TIMEOUT_S = 10.0
KILL_INTERVAL_S = 0.05


def find_marked_processes(mark: str, folders: list[str]) -> Iterator[int]:
    """Ids of our user's processes whose environment holds the mark, or that have a file of these folders open."""
    needle = f"{MARK_VARIABLE}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone
            if needle in (process / "environ").read_bytes().split(b"\0") or has_open_file(process, folders):
                yield int(process.name)


def has_open_file(process: Path, folders: list[str]) -> bool:
    """Whether it is Ray's, by the title that Ray gave it (somebody may read a log), and has such a file open."""
    is_rays = (process / "comm").read_text().startswith("ray::")
    return is_rays and any(str(file.readlink()).startswith(tuple(folders)) for file in (process / "fd").iterdir())


def kill_processes(mark: str, folders: list[str]) -> None:
    """Kill them, and those that they start meanwhile."""
    until = time.monotonic() + KILL_TIMEOUT_S
    quiet = 0
    while quiet < 2 and time.monotonic() < until:
        found = list(find_marked_processes(mark, folders))
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(KILL_INTERVAL_S)


def wait_for_start(limit_s: float) -> bool:
    """Whether the driver sent word, or ended, in time."""
    ready, _, _ = select.select([sys.stdin.buffer], [], [], limit_s)
    return bool(ready)


def main() -> None:
    """Arguments: the mark, and for a Ray of our own its folder and the seconds in which it must start."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    mark, *more = sys.argv[1:]
    folders = [f"{folder}/" for folder in more[:1]]
    if len(more) > 1 and not wait_for_start(float(more[1])):
        kill_processes(mark, folders)
    sys.stdin.buffer.read()  # until the driver is no more
    kill_processes(mark, folders)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
