"""Send Ray's own text to the job's log: its native half writes to descriptor 2, its Python half to standard streams.

While that descriptor is the log, `sys.stderr` writes to what it was before, so that our own lines still reach people.
"""

import contextlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tinysd_batch.job.job_log import LOG_FORMAT, MAX_LOG_BYTES, open_log

STDERR_FD = 2
RAY_LOGGER = "ray"
# For `ray.init`. With `configure_logging=False` it would remove our handler, and warnings would reach the terminal.
LOGGING_OPTIONS = {"log_to_driver": False, "logging_level": logging.WARNING, "logging_format": LOG_FORMAT}


class RayLog:
    """Sends what Ray says to the log at `path` while it is open, or to nowhere."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.original_stderr_fd = -1  # what descriptor 2 was
        self.stderr = sys.stderr
        self.handler: logging.Handler | None = None
        self.ray_handlers: list[logging.Handler] = []  # which write to the terminal
        self.original_print: Any = None  # Ray's own function

    def open(self) -> None:
        self.stderr = sys.stderr
        if self.stderr is not None:
            self.stderr.flush()
        self.original_stderr_fd = os.dup(STDERR_FD)
        self.redirect_stderr_fd()
        if get_file_descriptor(self.stderr) == STDERR_FD:
            plain = os.fdopen(self.original_stderr_fd, "wb", buffering=0, closefd=False)
            sys.stderr = io.TextIOWrapper(
                plain, encoding=self.stderr.encoding, errors="backslashreplace", write_through=True
            )
        self.redirect_python_output()

    def redirect_stderr_fd(self) -> None:
        log = open_log(self.path)
        os.dup2(log, STDERR_FD)
        os.close(log)

    def redirect_python_output(self) -> None:
        """Loggers, and the errors of a cluster, which Ray prints whatever its options."""
        import ray._private.worker as worker

        self.handler = logging.StreamHandler(
            io.TextIOWrapper(io.FileIO(STDERR_FD, "w", closefd=False), errors="replace")
        )
        self.handler.setFormatter(logging.Formatter(LOG_FORMAT))
        rays = logging.getLogger(RAY_LOGGER)
        self.ray_handlers, rays.handlers = rays.handlers, []
        rays.addHandler(self.handler)
        self.original_print = getattr(worker, "print_to_stdstream", None)
        if self.original_print is not None:
            worker.print_to_stdstream = self.write_cluster_lines

    def rotate_if_large(self) -> None:
        """Keep the log and one older part of it."""
        if self.original_stderr_fd >= 0 and self.path is not None and os.fstat(STDERR_FD).st_size > MAX_LOG_BYTES:
            self.redirect_stderr_fd()

    def close(self) -> None:
        if self.original_stderr_fd < 0:
            return
        self.restore_python_output()
        sys.stderr = self.stderr
        os.dup2(self.original_stderr_fd, STDERR_FD)
        os.close(self.original_stderr_fd)
        self.original_stderr_fd = -1
        if self.path is not None:
            remove_if_empty(self.path)

    def restore_python_output(self) -> None:
        import ray._private.worker as worker

        if self.original_print is not None:
            worker.print_to_stdstream = self.original_print
        if self.handler is not None:
            rays = logging.getLogger(RAY_LOGGER)
            rays.removeHandler(self.handler)
            rays.handlers += self.ray_handlers
            self.handler.close()

    def write_cluster_lines(self, data: dict[str, Any], **_: object) -> None:
        """In the place of Ray's own function, which prints errors of the cluster on our standard output."""
        for line in data["lines"]:
            os.write(STDERR_FD, f"{line}\n".encode(errors="backslashreplace"))


def remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


def get_file_descriptor(stream: Any) -> int | None:
    """None for a stream that is no file, as in tests and notebooks."""
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
