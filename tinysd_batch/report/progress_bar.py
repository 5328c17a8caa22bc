"""A run as it happens: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from tinysd_batch.job.dispatch.job_progress import InvalidRows
from tinysd_batch.job.workers.pool import WorkerLost, WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, Status
from tinysd_batch.report.console import BAR_FROM_COLUMNS, has_live_display
from tinysd_batch.report.formatting import clock, count, one_line, row_label, say
from tinysd_batch.report.reading_progress import ReadingProgress

PLAIN_LINE_EVERY_S = 10.0
SPEED_AFTER_S = 3.0  # between the first image and the last
BURST_S = 0.5  # the first images come together, as a batch: they say nothing of speed
FAULTS_SHOWN = 10


class RunProgress:
    """Shows a run on the console. `verbose` adds a line for each image, with seed and path."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self.console = console
        self.verbose = verbose
        self.done = self.total = self.problems = 0
        self.last_line = self.began = time.monotonic()
        self.is_live = has_live_display(console)
        self.is_wide = console.width >= BAR_FROM_COLUMNS
        bar: list[ProgressColumn] = [BarColumn()] if self.is_wide else []
        self.bar = Progress(
            TextColumn("{task.description}"), *bar, MofNCompleteColumn(), TimesColumn(self), console=console,
            transient=True, disable=not self.is_live,
        )  # fmt: skip
        self.task = self.bar.add_task("reading the manifest", total=None)
        self.reading = ReadingProgress(console, "Reading the manifest")  # for plain lines, until the job starts
        self.on_start: Callable[[int], None] | None = None
        self.first_image_at: float | None = None
        self.last_image_at = 0.0
        self.timed = 0  # images that came after the first batch

    def __enter__(self) -> Self:
        self.bar.start()
        if not self.is_live:
            self.reading.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reading.stop()
        self.bar.stop()

    def say(self, line: str) -> None:
        """A line above the bar."""
        say(self.bar.console, line)

    def started(self, total: int, finished: int, invalid: InvalidRows) -> None:
        self.reading.stop()
        self.total, self.done = total, finished
        if self.on_start is not None:
            self.on_start(total - finished)
        if finished:
            self.say(f"Resuming: {finished:,} of {count(total, 'image')} are there already")
        if invalid.count:
            self.say(f"{count(invalid.count, 'manifest row')} cannot be made:")
            for row in invalid.first[:FAULTS_SHOWN]:
                self.say(f"  {row_label(row.number, row.line)}: {one_line(row.reason, 400)}")
            if invalid.count > FAULTS_SHOWN:
                self.say(f"  and {invalid.count - FAULTS_SHOWN:,} more; the results table names them all")
        if finished < total:
            self.bar.update(self.task, description="loading the model", total=total, completed=finished)

    def worker(self, event: WorkerReady | WorkerLost) -> None:
        if isinstance(event, WorkerReady):
            self.say(f"Worker {event.worker}: ready on {event.description['device_name']}")
            self.bar.update(self.task, description="generating" if self.is_wide else "")
        elif event.cause is None:  # else a note has told of all that were lost together
            then = "; it is given up" if event.for_good else ""
            self.say(f"Worker {event.worker}: lost ({one_line(event.reason, 250)}){then}; its images go to another")

    def image(self, request: ImageRequest, result: ImageResult) -> None:
        self.done += 1
        now = self.last_image_at = time.monotonic()
        self.first_image_at = self.first_image_at or now
        self.timed += now - self.first_image_at > BURST_S
        if result.status is not Status.OK:
            self.problems += 1
            reason = one_line(result.error_message or "", 120)
            self.say(f"Image {request.index} (row {request.row}): {result.status}: {reason}")
        elif self.verbose:
            self.say(f"{result.file_name}  seed {request.seed}  {one_line(request.prompt)}")
        self.bar.update(self.task, completed=self.done)
        if not self.is_live and now - self.last_line >= PLAIN_LINE_EVERY_S:
            self.last_line = now
            self.say(f"{self.done:,} of {count(self.total, 'image')}, {self.times(now)}, {self.problems:,} failed")

    def images_per_s(self) -> float | None:
        """Measured between images, so that loading the model does not count; None until enough was seen."""
        seconds = self.last_image_at - (self.first_image_at or self.last_image_at)
        return self.timed / seconds if seconds >= SPEED_AFTER_S else None

    def times(self, now: float) -> str:
        """`2.10 images/s, elapsed 0:12, about 0:34 left`"""
        elapsed, speed = f"elapsed {clock(now - self.began)}", self.images_per_s()
        if speed is None:
            return elapsed
        left = (self.total - self.done) / speed - (now - self.last_image_at)
        return f"{speed_words(speed)}, {elapsed}, about {clock(left)} left"

    def note(self, line: str) -> None:
        self.say(line)

    def durable(self) -> None:
        """Nothing to show: the bar counts images that are on disk."""


class TimesColumn(ProgressColumn):
    """Speed, elapsed and remaining time, each with its label."""

    def __init__(self, progress: RunProgress) -> None:
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:  # noqa: ARG002 - what rich passes
        return Text(self.progress.times(time.monotonic()), no_wrap=True, overflow="ellipsis")


def speed_words(images_per_s: float) -> str:
    """`2.10 images/s`, or `43 s an image`."""
    if images_per_s < 0.1:
        return f"{1 / images_per_s:,.0f} s an image"
    return f"{images_per_s:.2f} images/s"
