"""A progress bar over the denoising steps of a batch."""

import contextlib
from collections.abc import Iterator

from torch import Tensor

from tinysd_batch.model.sampling.schedule import StepCallback


@contextlib.contextmanager
def step_bar(steps: int, callback: StepCallback | None, *, shown: bool) -> Iterator[StepCallback | None]:
    """Return a callback that advances a bar on stderr and calls `callback`; `callback` itself if no bar is shown."""
    if not shown:
        yield callback
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, elapsed"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("generating", total=steps)

        def on_step(step: int, timestep: Tensor, latents: Tensor) -> None:
            bar.update(task, completed=step + 1)
            if callback is not None:
                callback(step, timestep, latents)

        yield on_step
