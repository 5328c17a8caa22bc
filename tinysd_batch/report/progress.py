"""A run as it happens: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tinysd_batch.job.pool import WorkerLost, WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status
from tinysd_batch.report.text import count, one_line, row_label, say

PLAIN_LINE_EVERY_S = 10.0
FAULTS_SHOWN = 10


class RunProgress:
    """Shows a run on the console. `verbose` adds a line for each image, with seed and path."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self.console = console
        self.verbose = verbose
        self.done = self.total = self.problems = 0
        self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("starting", total=None, speed="")
        self.on_start: Callable[[int], None] | None = None
        self.first_image_at: float | None = None
        self.made = 0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """A line above the bar."""
        say(self.bar.console, line)

    def started(self, total: int, finished: int, invalid: list[InvalidRow]) -> None:
        self.total, self.done = total, finished
        if self.on_start is not None:
            self.on_start(total - finished)
        if finished:
            self.say(f"Resuming: {finished:,} of {count(total, 'image')} are there already")
        if invalid:
            self.say(f"{count(len(invalid), 'manifest row')} cannot be made:")
            for row in invalid[:FAULTS_SHOWN]:
                self.say(f"  {row_label(row.number, row.line)}: {one_line(row.reason, 400)}")
            if len(invalid) > FAULTS_SHOWN:
                self.say(f"  and {len(invalid) - FAULTS_SHOWN:,} more; the results table names them all")
        if finished < total:
            self.bar.update(self.task, description="loading the model", total=total, completed=finished)

    def worker(self, event: WorkerReady | WorkerLost) -> None:
        if isinstance(event, WorkerReady):
            self.say(f"Worker {event.worker}: ready on {event.description['device_name']}")
            self.bar.update(self.task, description="drawing")
        else:
            then = "; it is given up" if event.for_good else ""
            self.say(f"Worker {event.worker}: lost ({one_line(event.reason, 250)}){then}; its images go to another")

    def image(self, request: ImageRequest, result: ImageResult) -> None:
        self.done += 1
        self.made += 1
        now = time.monotonic()
        self.first_image_at = self.first_image_at or now
        if result.status is not Status.OK:
            self.problems += 1
            reason = one_line(result.error_message or "", 120)
            self.say(f"Image {request.index} (row {request.row}): {result.status}: {reason}")
        elif self.verbose:
            self.say(f"{result.file_name}  seed {request.seed}  {one_line(request.prompt)}")
        self.bar.update(self.task, completed=self.done, speed=self.speed(now))
        if not self.console.is_terminal and now - self.last_line >= PLAIN_LINE_EVERY_S:
            self.last_line = now
            speed = f", {self.speed(now)}" if self.speed(now) else ""
            self.say(f"{self.done:,} of {count(self.total, 'image')}{speed}, {self.problems:,} failed")

    def speed(self, now: float) -> str:
        """Measured between images, so that loading the model does not count."""
        if self.made < 2 or self.first_image_at is None:
            return ""
        return f"{(self.made - 1) / max(now - self.first_image_at, 1e-3):.2f} images/s"

    def note(self, line: str) -> None:
        self.say(line)

    def durable(self) -> None:
        """Nothing to show: the bar counts images that are on disk."""
