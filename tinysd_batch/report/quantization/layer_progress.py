"""A bar over a UNet's layers while it is quantized, with the time left; plain lines where there is no terminal."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tinysd_batch.quantize.layer_progress import LayerProgressUpdate
from tinysd_batch.report.console import MIN_COLUMNS_FOR_BAR, has_live_display
from tinysd_batch.report.formatting import count, format_clock, print_line

PLAIN_LINE_EVERY_S = 10.0
MIN_ELAPSED_S, MIN_DONE_FRACTION = 2.0, 0.02  # of this work, before its speed says anything


class LayerProgressBar:
    """Shows `LayerProgressUpdate` on a console; `say` prints lines above the bar."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.task = ""
        self.started_at = self.last_line_at = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), *([BarColumn()] if console.width >= MIN_COLUMNS_FOR_BAR else []),
            TextColumn("{task.fields[words]}"), console=console,
            transient=True, disable=not has_live_display(console), redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def print_line(self, line: str) -> None:
        print_line(self.bar.console, line)

    def show(self, done: LayerProgressUpdate) -> None:
        now = time.monotonic()
        if done.task != self.task:
            self.task, self.started_at, self.last_line_at = done.task, now, now
            for each in self.bar.task_ids:
                self.bar.remove_task(each)
            self.bar.add_task(done.task, total=1.0, words="")
        words = self.words(done, now)
        if done.done_layers == done.total_layers:
            self.bar.remove_task(self.bar.task_ids[-1])
            self.print_line(f"{done.task}: {count(done.done_layers, 'layer')} in {format_clock(now - self.started_at)}")
            self.task = ""
            return
        self.bar.update(self.bar.task_ids[-1], completed=done.weights_fraction, words=words)
        if not has_live_display(self.console) and now - self.last_line_at >= PLAIN_LINE_EVERY_S:
            self.last_line_at = now
            self.print_line(f"{done.task}: {words}")

    def words(self, done: LayerProgressUpdate, now: float) -> str:
        """`41 of 255 layers, elapsed 0:12, about 0:34 left`"""
        seconds = now - self.started_at
        told = f"{done.done_layers:,} of {count(done.total_layers, 'layer')}, elapsed {format_clock(seconds)}"
        if seconds < MIN_ELAPSED_S or done.weights_fraction < MIN_DONE_FRACTION:
            return told
        return f"{told}, about {format_clock(seconds * (1 - done.weights_fraction) / done.weights_fraction)} left"
