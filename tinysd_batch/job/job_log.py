"""Write what happens in a job's runs to `_tinysd/job.log`: one older part is kept, as `job.log.1`.

Driver and workers append to the same file, a line at a time. Ray's own text goes there, too (`ray_workers/ray_log.py`).
"""

import contextlib
import io
import logging
import logging.handlers
import os
from collections.abc import Iterator
from pathlib import Path

LOG_FILE_NAME = "job.log"
MAX_LOG_BYTES = 2**20
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PACKAGE_LOGGER = "tinysd_batch"
WARNINGS_LOGGER = "py.warnings"  # where `logging.captureWarnings` sends Python's warnings


def open_log(path: Path | None) -> int:
    """Open the log to append to it and return its descriptor; that of /dev/null where it cannot be written.

    A log of more than MAX_LOG_BYTES is set aside first. Links are not followed.
    """
    if path is not None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with contextlib.suppress(OSError):
            if path.exists() and path.stat().st_size > MAX_LOG_BYTES:  # a link is not followed below
                path.replace(path.with_suffix(".log.1"))
            return os.open(path, flags, 0o644)
    return os.open(os.devnull, os.O_WRONLY)


class JobLogHandler(logging.handlers.WatchedFileHandler):
    """Append records to the log. Reopen it when another process has set it aside; never fail for its sake."""

    def _open(self) -> io.TextIOWrapper:
        return os.fdopen(open_log(Path(self.baseFilename)), "a", encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take is lost
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Ignore a full disk: the results say what became of the images."""


@contextlib.contextmanager
def write_job_log(state_folder: Path, name: str = "") -> Iterator[None]:
    """Write this process's records to the job's log, with the worker's `name` if there is one."""
    handler = JobLogHandler(state_folder / LOG_FILE_NAME, encoding="utf-8", delay=True)
    worker = f"{name} ".replace("%", "%%") if name else ""
    handler.setFormatter(logging.Formatter(LOG_FORMAT.replace("%(name)s", f"{worker}%(name)s")))
    package, warnings = logging.getLogger(PACKAGE_LOGGER), logging.getLogger(WARNINGS_LOGGER)
    level, on_terminal = package.level, None if package.hasHandlers() else logging.lastResort
    package.setLevel(logging.DEBUG)
    package.addHandler(handler)
    warnings.addHandler(handler)
    if on_terminal is not None:  # a logger without any handler would use it; ours has one now
        package.addHandler(on_terminal)
    try:
        yield
    finally:
        if on_terminal is not None:
            package.removeHandler(on_terminal)
        warnings.removeHandler(handler)
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()
