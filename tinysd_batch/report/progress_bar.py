"""Show the progress of a run: a live bar on a terminal, plain lines elsewhere."""

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
from tinysd_batch.report.console import MIN_COLUMNS_FOR_BAR, PLAIN_LINE_INTERVAL_S, has_live_display
from tinysd_batch.report.formatting import format_clock, format_count, format_row_label, print_line, to_one_line
from tinysd_batch.report.reading_progress import ReadingProgress

MIN_MEASURED_S = 3.0  # between the first and the last image; a shorter time gives no reliable speed
FIRST_BATCH_S = 0.5  # images within this time belong to the first batch and are not timed
MAX_SHOWN_INVALID_ROWS = 10


class RunProgressBar:
    """Shows a run on the console. With `verbose`, prints a line for each image with its seed and path."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self.console = console
        self.verbose = verbose
        self.done = self.total = self.failed_images = 0
        self.last_line_at = self.started_at = time.monotonic()
        self.is_live = has_live_display(console)
        self.is_wide = console.width >= MIN_COLUMNS_FOR_BAR
        bar: list[ProgressColumn] = [BarColumn()] if self.is_wide else []
        self.bar = Progress(
            TextColumn("{task.description}"),
            *bar,
            MofNCompleteColumn(),
            TimesColumn(self),
            console=console,
            transient=True,
            disable=not self.is_live,
        )
        self.task = self.bar.add_task("reading the manifest", total=None)
        self.reading = ReadingProgress(console, "Reading the manifest")  # plain lines until the job starts
        self.on_start: Callable[[int], None] | None = None
        self.first_image_at: float | None = None
        self.last_image_at = 0.0
        self.timed_images = 0  # images after the first batch

    def __enter__(self) -> Self:
        self.bar.start()
        if not self.is_live:
            self.reading.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reading.stop()
        self.bar.stop()

    def print_line(self, line: str) -> None:
        """Print a line above the bar."""
        print_line(self.bar.console, line)

    def report_start(self, total: int, finished: int, invalid: InvalidRows) -> None:
        self.reading.stop()
        self.total, self.done = total, finished
        if self.on_start is not None:
            self.on_start(total - finished)
        if finished:
            self.print_line(f"Resuming: {finished:,} of {format_count(total, 'image')} are already generated")
        if invalid.count:
            self.print_line(f"{format_count(invalid.count, 'manifest row')} cannot be generated:")
            for row in invalid.first[:MAX_SHOWN_INVALID_ROWS]:
                self.print_line(f"  {format_row_label(row.number, row.line)}: {to_one_line(row.reason, 400)}")
            if invalid.count > MAX_SHOWN_INVALID_ROWS:
                self.print_line(
                    f"  and {invalid.count - MAX_SHOWN_INVALID_ROWS:,} more; the results table lists all of them"
                )
        if finished < total:
            self.bar.update(self.task, description="loading the model", total=total, completed=finished)

    def report_worker(self, event: WorkerReady | WorkerLost) -> None:
        if isinstance(event, WorkerReady):
            self.print_line(f"Worker {event.worker}: ready on {event.description['device_name']}")
            self.bar.update(self.task, description="generating" if self.is_wide else "")
        elif event.shared_cause is None:  # workers lost together are reported in one note
            restart = "; it is not restarted" if event.is_permanent else ""
            reason = to_one_line(event.reason, 250)
            self.print_line(f"Worker {event.worker}: lost ({reason}){restart}; its images go to another worker")

    def report_image(self, request: ImageRequest, result: ImageResult) -> None:
        self.done += 1
        now = self.last_image_at = time.monotonic()
        self.first_image_at = self.first_image_at or now
        self.timed_images += now - self.first_image_at > FIRST_BATCH_S
        if result.status is not Status.OK:
            self.failed_images += 1
            reason = to_one_line(result.error_message or "", 120)
            self.print_line(f"Image {request.index} (row {request.row}): {result.status}: {reason}")
        elif self.verbose:
            self.print_line(f"{result.file_name}  seed {request.seed}  {to_one_line(request.prompt)}")
        self.bar.update(self.task, completed=self.done)
        if not self.is_live and now - self.last_line_at >= PLAIN_LINE_INTERVAL_S:
            self.last_line_at = now
            done = f"{self.done:,} of {format_count(self.total, 'image')}"
            self.print_line(f"{done}, {self.format_times(now)}, {self.failed_images:,} failed")

    def images_per_s(self) -> float | None:
        """Measure the speed between images, without loading the model; None until enough was measured."""
        seconds = self.last_image_at - (self.first_image_at or self.last_image_at)
        return self.timed_images / seconds if seconds >= MIN_MEASURED_S else None

    def format_times(self, now: float) -> str:
        """Return `2.10 images/s, elapsed 0:12, about 0:34 left`."""
        elapsed, speed = f"elapsed {format_clock(now - self.started_at)}", self.images_per_s()
        if speed is None:
            return elapsed
        left = (self.total - self.done) / speed - (now - self.last_image_at)
        return f"{format_speed(speed)}, {elapsed}, about {format_clock(left)} left"

    def note(self, line: str) -> None:
        self.print_line(line)

    def report_flush(self) -> None:
        """Do nothing: the bar counts images that are on disk."""


class TimesColumn(ProgressColumn):
    """Speed, elapsed and remaining time, each with its label."""

    def __init__(self, progress: RunProgressBar) -> None:
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:  # noqa: ARG002 - rich's signature
        return Text(self.progress.format_times(time.monotonic()), no_wrap=True, overflow="ellipsis")


def format_speed(images_per_s: float) -> str:
    """Return `2.10 images/s`, or `43 s an image`."""
    if images_per_s < 0.1:
        return f"{1 / images_per_s:,.0f} s an image"
    return f"{images_per_s:.2f} images/s"
