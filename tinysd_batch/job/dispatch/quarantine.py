"""Who is to blame when workers are lost: the image they were at, or the worker. Pure.

An image that killed three workers is guilty, if one of them has proved itself. A worker proves itself by drawing
anything. One that was lost twice with nothing drawn between, or is about to get a suspect after a loss, first draws on
trial an image that is known to be good; lost twice on that, it is the worker that is broken.
"""

from collections import Counter
from collections.abc import Iterable

MAX_LOSSES = 3  # of workers, with the same image
MAX_LOSSES_IN_A_ROW = 2  # of a worker, before it is tried on a good image
MAX_LOST_TRIALS = 2
MAX_REQUEUED = 5  # lost nodes with the same image at hand; then the image is suspected after all


class Blame:
    """What is held against images and workers in one run."""

    def __init__(self) -> None:
        self.accusers: dict[int, list[str]] = {}  # by image index
        self.losses: Counter[str] = Counter()  # of workers, in a row
        self.lost_trials: Counter[str] = Counter()  # in a row
        self.proved: set[str] = set()
        self.requeued: Counter[int] = Counter()  # of images
        self.tries: Counter[int] = Counter()  # of images, that ended in a loss

    def worker_drew(self, worker: str) -> None:
        self.proved.add(worker)
        self.losses[worker] = self.lost_trials[worker] = 0

    def worker_lost(self, worker: str, indexes: Iterable[int]) -> None:
        """A worker was lost at these images, one of which may have done it."""
        self.losses[worker] += 1
        for index in indexes:
            self.tries[index] += 1
            self.accusers.setdefault(index, []).append(worker)

    def nobody_is_charged(self, indexes: Iterable[int]) -> bool:
        """Note a loss that is nobody's fault; False when these images have seen too many of them."""
        for index in indexes:
            self.tries[index] += 1
            self.requeued[index] += 1
        return all(self.requeued[index] < MAX_REQUEUED for index in indexes)

    def is_guilty(self, index: int) -> bool:
        accusers = self.accusers.get(index, [])
        return len(accusers) >= MAX_LOSSES and not self.proved.isdisjoint(accusers)

    def needs_trial(self, worker: str, next_is_suspect: bool) -> bool:
        return self.losses[worker] >= (1 if next_is_suspect else MAX_LOSSES_IN_A_ROW)

    def trial_lost(self, worker: str) -> bool:
        """Whether the worker is to be given up, in which case its accusations count no more."""
        self.lost_trials[worker] += 1
        if self.lost_trials[worker] < MAX_LOST_TRIALS:
            return False
        self.proved.discard(worker)
        for index, accusers in self.accusers.items():
            self.accusers[index] = [accuser for accuser in accusers if accuser != worker]
        return True
