"""What is still to be handed out, and in which order. Pure."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from tinysd_batch.records import MicroBatch

MAX_LOOK_AHEAD = 256  # micro-batches looked at to find one that a worker can hold


class BatchQueue:
    """The plan's micro-batches in their order, what came back before them, suspects after them."""

    def __init__(self, planned: Iterator[MicroBatch]) -> None:
        self.planned = planned
        self.waiting: deque[MicroBatch] = deque()  # came back, or passed over by a worker that cannot hold it
        self.suspects: deque[MicroBatch] = deque()  # one image each; last, so that good work shows who is to blame

    def put_back(self, batches: Iterable[MicroBatch]) -> None:
        """Batches that were handed out and not begun, or whose loss is nobody's fault: the next to go."""
        self.waiting.extendleft(reversed(list(batches)))

    def pop_fitting(self, fits: Callable[[MicroBatch], bool]) -> MicroBatch | None:
        """The next micro-batch that fits, suspects apart."""
        for position in range(MAX_LOOK_AHEAD):
            if position == len(self.waiting) and not self.fetch_next():
                return None
            if fits(self.waiting[position]):
                found = self.waiting[position]
                del self.waiting[position]
                return found
        return None

    def fetch_next(self) -> bool:
        """Have one more planned batch wait; False when there is none."""
        batch = next(self.planned, None)
        if batch is not None:
            self.waiting.append(batch)
        return batch is not None
