"""Tell on stderr how far the reading of a long manifest is."""

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

from tinysd_batch.report.console import has_live_display
from tinysd_batch.report.formatting import count, format_clock, print_line

SHOW_AFTER_S = 2.0
REDRAW_INTERVAL_S = 0.25
PLAIN_LINE_EVERY_S = 10.0


class ReadingProgress:
    """A line that appears after two seconds: redrawn on a terminal, repeated every ten seconds elsewhere.

    A thread of its own draws it, so that it moves while a library is at work. `rows` is set by who reads.
    """

    def __init__(self, console: Console, what: str) -> None:
        self.label = what
        self.rows = 0
        self.console = console
        self.started = time.monotonic()
        self.live = Live(console=console, transient=True, auto_refresh=False, redirect_stdout=False,
                         redirect_stderr=False)  # fmt: skip
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        if not self.console.quiet:
            self.thread.start()

    def stop(self) -> None:
        """Take the line away; nothing is shown any more."""
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()
        self.live.stop()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """While something else is printed, on stdout perhaps, which may be the same terminal."""
        with self.lock:
            self.live.stop()
            yield

    def run(self) -> None:
        wait = SHOW_AFTER_S
        while not self.done.wait(wait):
            with self.lock, contextlib.suppress(OSError):  # a terminal that is gone ends no job
                if has_live_display(self.console):
                    wait = REDRAW_INTERVAL_S
                    self.live.start()
                    self.live.update(Text(self.format_line(), no_wrap=True, overflow="ellipsis"), refresh=True)
                elif self.rows or time.monotonic() - self.started >= PLAIN_LINE_EVERY_S:
                    wait = PLAIN_LINE_EVERY_S
                    print_line(self.console, self.format_line())

    def format_line(self) -> str:
        """`Reading m.csv: 340,000 rows, elapsed 0:12`"""
        rows = f" {count(self.rows, 'row')}," if self.rows else ""
        return f"{self.label}:{rows} elapsed {format_clock(time.monotonic() - self.started)}"
