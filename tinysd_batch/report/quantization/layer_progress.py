"""Show the progress of quantization over the UNet's layers: a bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tinysd_batch.quantize.layer_progress import LayerProgressUpdate
from tinysd_batch.report.console import MIN_COLUMNS_FOR_BAR, PLAIN_LINE_INTERVAL_S, has_live_display
from tinysd_batch.report.formatting import format_clock, format_count, print_line

MIN_ELAPSED_S, MIN_DONE_FRACTION = 2.0, 0.02  # before the time left is shown


class LayerProgressBar:
    """Shows each `LayerProgressUpdate` on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.task = ""
        self.started_at = self.last_line_at = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            *([BarColumn()] if console.width >= MIN_COLUMNS_FOR_BAR else []),
            TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
            disable=not has_live_display(console),
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def print_line(self, line: str) -> None:
        """Print a line above the bar."""
        print_line(self.bar.console, line)

    def show(self, update: LayerProgressUpdate) -> None:
        now = time.monotonic()
        if update.task != self.task:
            self.task, self.started_at, self.last_line_at = update.task, now, now
            for task_id in self.bar.task_ids:
                self.bar.remove_task(task_id)
            self.bar.add_task(update.task, total=1.0, state="")
        state = self.format_state(update, now)
        if update.done_layers == update.total_layers:
            self.bar.remove_task(self.bar.task_ids[-1])
            layers = format_count(update.done_layers, "layer")
            self.print_line(f"{update.task}: {layers} in {format_clock(now - self.started_at)}")
            self.task = ""
            return
        self.bar.update(self.bar.task_ids[-1], completed=update.weights_fraction, state=state)
        if not has_live_display(self.console) and now - self.last_line_at >= PLAIN_LINE_INTERVAL_S:
            self.last_line_at = now
            self.print_line(f"{update.task}: {state}")

    def format_state(self, update: LayerProgressUpdate, now: float) -> str:
        """Return `41 of 255 layers, elapsed 0:12, about 0:34 left`."""
        elapsed_s, fraction = now - self.started_at, update.weights_fraction
        layers = f"{update.done_layers:,} of {format_count(update.total_layers, 'layer')}"
        state = f"{layers}, elapsed {format_clock(elapsed_s)}"
        if elapsed_s < MIN_ELAPSED_S or fraction < MIN_DONE_FRACTION:
            return state
        return f"{state}, about {format_clock(elapsed_s * (1 - fraction) / fraction)} left"
