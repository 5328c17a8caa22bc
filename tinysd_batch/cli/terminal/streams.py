"""Name the standard streams in their errors, for example when stdout is a log file on a full disk."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

from tinysd_batch.cli.terminal.signals import redirect_to_devnull


class NamedStream:
    """A text stream whose OSErrors carry `name` as their file name, except for closed pipes."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream = stream
        self.name = name
        self.is_broken = False

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.stream, attribute)

    def write(self, text: str) -> int:
        with self.naming_errors():
            return int(self.stream.write(text))

    def flush(self) -> None:
        with self.naming_errors():
            self.stream.flush()

    @contextlib.contextmanager
    def naming_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.is_broken = True
            raise OSError(error.errno, error.strerror, self.name) from None

    def redirect_if_broken(self) -> None:
        """Discard what Python flushes at exit, if an earlier write failed."""
        if self.is_broken:
            with contextlib.suppress(OSError, ValueError):
                redirect_to_devnull([self.stream.fileno()])


@contextlib.contextmanager
def name_standard_streams() -> Iterator[None]:
    """Name stdout and stderr in their errors, and write characters that they cannot encode as escapes."""
    stdout, stderr = sys.stdout, sys.stderr
    for stream in (stdout, stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an unusual prompt must not end the job
    out, err = NamedStream(stdout, "standard output"), NamedStream(stderr, "standard error")
    sys.stdout, sys.stderr = (out if stdout else None), (err if stderr else None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        out.redirect_if_broken()
        err.redirect_if_broken()
