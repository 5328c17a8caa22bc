"""Show how many rows of a long manifest have been read."""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tinysd_batch.report.console import PLAIN_LINE_INTERVAL_S, has_live_display
from tinysd_batch.report.formatting import format_clock, format_count, print_line

SHOW_AFTER_S = 2.0
REDRAW_INTERVAL_S = 0.25


class ReadingProgress:
    """A line that appears after two seconds, redrawn on a terminal and repeated every ten seconds elsewhere.

    A separate thread prints it, so that it is updated while a library reads. The reader sets `rows`.
    """

    def __init__(self, console: Console, label: str) -> None:
        self.label = label
        self.rows = 0
        self.console = console
        self.started = time.monotonic()
        self.live = Live(
            console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.redraw_until_stopped, daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        if not self.console.quiet:
            self.thread.start()

    def stop(self) -> None:
        """Remove the line and stop updating it."""
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()
        self.live.stop()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the line while something else is printed, perhaps to the same terminal through stdout."""
        with self.lock:
            self.live.stop()
            yield

    def redraw_until_stopped(self) -> None:
        wait = SHOW_AFTER_S
        while not self.done.wait(wait):
            with self.lock, contextlib.suppress(OSError):  # a closed terminal must not end the job
                if has_live_display(self.console):
                    wait = REDRAW_INTERVAL_S
                    self.live.start()
                    self.live.update(Text(self.format_line(), no_wrap=True, overflow="ellipsis"), refresh=True)
                elif self.rows or time.monotonic() - self.started >= PLAIN_LINE_INTERVAL_S:
                    wait = PLAIN_LINE_INTERVAL_S
                    print_line(self.console, self.format_line())

    def format_line(self) -> str:
        """Return `Reading m.csv: 340,000 rows, elapsed 0:12`."""
        rows = f" {format_count(self.rows, 'row')}," if self.rows else ""
        return f"{self.label}:{rows} elapsed {format_clock(time.monotonic() - self.started)}"
