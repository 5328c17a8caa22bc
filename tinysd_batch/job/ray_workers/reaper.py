"""End the Ray processes of a driver that was killed.

Without this process Ray's workers would run on for seconds and its agents for a minute. The reaper outlives the driver
by the moment that this takes. It recognizes Ray's processes by a mark in their environment, which all processes that
Ray starts inherit, or by an open file (mostly a log) in the session's folder, because some replace their environment.

It also ends processes that do not start in time: calls into Ray's native code cannot be interrupted in the driver. At
the end it removes the session's folder.

It is run by its path and uses only the standard library, so that it starts in milliseconds. It reads its standard
input: any data means that Ray has started, and the end of the stream that the driver has ended.
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

MARK_VARIABLE = "TINYSD_BATCH_DRIVER"  # an environment variable; its value identifies one driver
KILL_TIMEOUT_S = 10.0
KILL_INTERVAL_S = 0.05


def find_marked_processes(mark: str, folders: list[str]) -> Iterator[int]:
    """Yield the IDs of this user's processes that have the mark in their environment or a file in the folders open."""
    needle = f"{MARK_VARIABLE}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it belongs to another user, or has ended
            if needle in (process / "environ").read_bytes().split(b"\0") or has_open_file(process, folders):
                yield int(process.name)


def has_open_file(process: Path, folders: list[str]) -> bool:
    """Whether a process has a file in the folders open and is Ray's by its title. A user may be reading a log there."""
    is_ray_process = (process / "comm").read_text().startswith("ray::")
    return is_ray_process and any(
        str(file.readlink()).startswith(tuple(folders)) for file in (process / "fd").iterdir()
    )


def kill_processes(mark: str, folders: list[str]) -> None:
    """Kill the marked processes, and those that they start in the meantime."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    rounds_without_any = 0
    while rounds_without_any < 2 and time.monotonic() < deadline:
        process_ids = list(find_marked_processes(mark, folders))
        for process_id in process_ids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        rounds_without_any = 0 if process_ids else rounds_without_any + 1
        time.sleep(KILL_INTERVAL_S)


def wait_for_start(timeout_s: float) -> bool:
    """Wait until the driver reports that Ray has started, or ends. Return False if neither happens in time."""
    ready, _, _ = select.select([sys.stdin.buffer], [], [], timeout_s)
    return bool(ready)


def main() -> None:
    """Run the reaper.

    Command-line arguments: the mark; then, for a local Ray, its folder and the seconds within which it must start.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    mark, *folder_and_timeout = sys.argv[1:]
    folders = [f"{folder}/" for folder in folder_and_timeout[:1]]
    if len(folder_and_timeout) > 1 and not wait_for_start(float(folder_and_timeout[1])):
        kill_processes(mark, folders)
    sys.stdin.buffer.read()  # until the driver has ended
    kill_processes(mark, folders)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
