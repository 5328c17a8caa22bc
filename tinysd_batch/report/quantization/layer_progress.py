"""A bar over a UNet's layers while it is quantized, with the time left; plain lines where there is no terminal."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tinysd_batch.quantize.layer_progress import LayersDone
from tinysd_batch.report.console import BAR_FROM_COLUMNS, has_live_display
from tinysd_batch.report.formatting import clock, count, say

PLAIN_LINE_EVERY_S = 10.0
TIME_LEFT_AFTER_S, TIME_LEFT_AFTER_SHARE = 2.0, 0.02  # of this work, before its speed says anything


class LayerProgress:
    """Shows `LayersDone` on a console; `say` prints lines above the bar."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.task = ""
        self.began = self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), *([BarColumn()] if console.width >= BAR_FROM_COLUMNS else []),
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

    def say(self, line: str) -> None:
        say(self.bar.console, line)

    def show(self, done: LayersDone) -> None:
        now = time.monotonic()
        if done.task != self.task:
            self.task, self.began, self.last_line = done.task, now, now
            for each in self.bar.task_ids:
                self.bar.remove_task(each)
            self.bar.add_task(done.task, total=1.0, words="")
        words = self.words(done, now)
        if done.layers == done.of_layers:
            self.bar.remove_task(self.bar.task_ids[-1])
            self.say(f"{done.task}: {count(done.layers, 'layer')} in {clock(now - self.began)}")
            self.task = ""
            return
        self.bar.update(self.bar.task_ids[-1], completed=done.share, words=words)
        if not has_live_display(self.console) and now - self.last_line >= PLAIN_LINE_EVERY_S:
            self.last_line = now
            self.say(f"{done.task}: {words}")

    def words(self, done: LayersDone, now: float) -> str:
        """`41 of 255 layers, elapsed 0:12, about 0:34 left`"""
        seconds = now - self.began
        told = f"{done.layers:,} of {count(done.of_layers, 'layer')}, elapsed {clock(seconds)}"
        if seconds < TIME_LEFT_AFTER_S or done.share < TIME_LEFT_AFTER_SHARE:
            return told
        return f"{told}, about {clock(seconds * (1 - done.share) / done.share)} left"
