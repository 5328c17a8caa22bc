"""Redirect Ray's output to the job's log. Its native code writes to descriptor 2, its Python code to standard streams.

While descriptor 2 is the log, `sys.stderr` writes to the original one, so that users still see our own lines.
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
# Options of `ray.init`. With `configure_logging=False`, it would remove our handler and print warnings.
LOGGING_OPTIONS = {"log_to_driver": False, "logging_level": logging.WARNING, "logging_format": LOG_FORMAT}


class RayLog:
    """Sends Ray's output to the log at `path` while it is open. Without a path, the output is discarded."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.original_stderr_fd = -1  # a duplicate of the original descriptor 2; -1 while not open
        self.original_stderr = sys.stderr
        self.handler: logging.Handler | None = None
        self.ray_handlers: list[logging.Handler] = []  # the original ones, which write to the terminal
        self.original_print: Any = None  # Ray's `print_to_stdstream`

    def open(self) -> None:
        self.original_stderr = sys.stderr
        if self.original_stderr is not None:
            self.original_stderr.flush()
        self.original_stderr_fd = os.dup(STDERR_FD)
        self.redirect_stderr_fd()
        if get_file_descriptor(self.original_stderr) == STDERR_FD:
            unbuffered = os.fdopen(self.original_stderr_fd, "wb", buffering=0, closefd=False)
            sys.stderr = io.TextIOWrapper(
                unbuffered, encoding=self.original_stderr.encoding, errors="backslashreplace", write_through=True
            )
        self.redirect_python_output()

    def redirect_stderr_fd(self) -> None:
        log = open_log(self.path)
        os.dup2(log, STDERR_FD)
        os.close(log)

    def redirect_python_output(self) -> None:
        """Redirect loggers, and the errors of a cluster, which Ray prints regardless of its options."""
        import ray._private.worker as worker

        self.handler = logging.StreamHandler(
            io.TextIOWrapper(io.FileIO(STDERR_FD, "w", closefd=False), errors="replace")
        )
        self.handler.setFormatter(logging.Formatter(LOG_FORMAT))
        ray_logger = logging.getLogger(RAY_LOGGER)
        self.ray_handlers, ray_logger.handlers = ray_logger.handlers, []
        ray_logger.addHandler(self.handler)
        self.original_print = getattr(worker, "print_to_stdstream", None)
        if self.original_print is not None:
            worker.print_to_stdstream = self.write_cluster_lines

    def rotate_if_large(self) -> None:
        """Start a new log if the current one is large. One older log is kept."""
        if self.original_stderr_fd >= 0 and self.path is not None and os.fstat(STDERR_FD).st_size > MAX_LOG_BYTES:
            self.redirect_stderr_fd()

    def close(self) -> None:
        if self.original_stderr_fd < 0:
            return
        self.restore_python_output()
        sys.stderr = self.original_stderr
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
            ray_logger = logging.getLogger(RAY_LOGGER)
            ray_logger.removeHandler(self.handler)
            ray_logger.handlers += self.ray_handlers
            self.handler.close()

    def write_cluster_lines(self, data: dict[str, Any], **_: object) -> None:
        """Replace Ray's `print_to_stdstream`, which prints errors of the cluster on our standard output."""
        for line in data["lines"]:
            os.write(STDERR_FD, f"{line}\n".encode(errors="backslashreplace"))


def remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


def get_file_descriptor(stream: Any) -> int | None:
    """Return None for a stream without a file, as in tests and notebooks."""
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
