"""Micro-batches that are still to be assigned, and their order. Pure logic, no I/O."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from tinysd_batch.records import MicroBatch

MAX_LOOK_AHEAD = 256  # micro-batches to search for one that fits a worker


class BatchQueue:
    """The planned micro-batches in order. Batches that were put back come first, suspects last."""

    def __init__(self, planned: Iterator[MicroBatch]) -> None:
        self.planned = planned
        self.waiting: deque[MicroBatch] = deque()  # put back, or skipped because they did not fit the worker
        # One image each. They come last, so that successful batches show which workers are sound.
        self.suspects: deque[MicroBatch] = deque()

    def put_back(self, batches: Iterable[MicroBatch]) -> None:
        """Put batches at the front that were assigned and not started, or were lost for a reason outside them."""
        self.waiting.extendleft(reversed(list(batches)))

    def pop_fitting(self, fits: Callable[[MicroBatch], bool]) -> MicroBatch | None:
        """Remove and return the next micro-batch for which `fits` is true. Suspects are not considered."""
        for position in range(MAX_LOOK_AHEAD):
            if position == len(self.waiting) and not self.fetch_next():
                return None
            if fits(self.waiting[position]):
                batch = self.waiting[position]
                del self.waiting[position]
                return batch
        return None

    def fetch_next(self) -> bool:
        """Append the next planned batch to the waiting ones. Return False when the plan is exhausted."""
        batch = next(self.planned, None)
        if batch is not None:
            self.waiting.append(batch)
        return batch is not None
