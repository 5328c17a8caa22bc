"""Standard output and error whose failures say which of them failed: a log file on a full disk, say."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

from tinysd_batch.cli.terminal.signals import redirect_to_devnull


class NamedStream:
    """A text stream; an OSError of it carries `name` as its file name, but for closed pipes."""

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
        """Let what Python itself writes at its end vanish, if it could not be written before."""
        if self.is_broken:
            with contextlib.suppress(OSError, ValueError):
                redirect_to_devnull([self.stream.fileno()])


@contextlib.contextmanager
def name_standard_streams() -> Iterator[None]:
    """Name standard output and error in their errors; characters that they cannot show are written as escapes."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a prompt that the terminal cannot show ends no job
    out, err = NamedStream(before[0], "standard output"), NamedStream(before[1], "standard error")
    sys.stdout, sys.stderr = (out if before[0] else None), (err if before[1] else None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        out.redirect_if_broken()
        err.redirect_if_broken()
