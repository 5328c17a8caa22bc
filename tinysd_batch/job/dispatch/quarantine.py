"""Who is to blame when workers are lost: the image they were at, or the worker. Pure.

An image that killed three workers is guilty, if one of them has proved itself. A worker proves itself by drawing
anything. One that was lost twice with nothing drawn between, or is about to get a suspect after a loss, first draws on
trial an image that is known to be good; lost twice on that, it is the worker that is broken.
"""

from collections import Counter
from collections.abc import Iterable

MAX_WORKERS_LOST_PER_IMAGE = 3  # of workers, with the same image
LOSSES_BEFORE_TRIAL = 2  # of a worker, before it is tried on a good image
MAX_LOST_TRIALS = 2
MAX_NODE_LOSSES_PER_IMAGE = 5  # lost nodes with the same image at hand; then the image is suspected after all


class LossTracker:
    """What is held against images and workers in one run."""

    def __init__(self) -> None:
        self.lost_workers: dict[int, list[str]] = {}  # by image index
        self.consecutive_losses: Counter[str] = Counter()  # of workers, in a row
        self.consecutive_lost_trials: Counter[str] = Counter()  # in a row
        self.proven_workers: set[str] = set()
        self.node_losses: Counter[int] = Counter()  # of images
        self.lost_attempts: Counter[int] = Counter()  # of images, that ended in a loss

    def record_batch_done(self, worker: str) -> None:
        self.proven_workers.add(worker)
        self.consecutive_losses[worker] = self.consecutive_lost_trials[worker] = 0

    def record_worker_loss(self, worker: str, indexes: Iterable[int]) -> None:
        """A worker was lost at these images, one of which may have done it."""
        self.consecutive_losses[worker] += 1
        for index in indexes:
            self.lost_attempts[index] += 1
            self.lost_workers.setdefault(index, []).append(worker)

    def nobody_is_charged(self, indexes: Iterable[int]) -> bool:
        """Note a loss that is nobody's fault; False when these images have seen too many of them."""
        for index in indexes:
            self.lost_attempts[index] += 1
            self.node_losses[index] += 1
        return all(self.node_losses[index] < MAX_NODE_LOSSES_PER_IMAGE for index in indexes)

    def should_quarantine(self, index: int) -> bool:
        accusers = self.lost_workers.get(index, [])
        return len(accusers) >= MAX_WORKERS_LOST_PER_IMAGE and not self.proven_workers.isdisjoint(accusers)

    def needs_trial(self, worker: str, next_is_suspect: bool) -> bool:
        return self.consecutive_losses[worker] >= (1 if next_is_suspect else LOSSES_BEFORE_TRIAL)

    def trial_lost(self, worker: str) -> bool:
        """Whether the worker is to be given up, in which case its accusations count no more."""
        self.consecutive_lost_trials[worker] += 1
        if self.consecutive_lost_trials[worker] < MAX_LOST_TRIALS:
            return False
        self.proven_workers.discard(worker)
        for index, accusers in self.lost_workers.items():
            self.lost_workers[index] = [accuser for accuser in accusers if accuser != worker]
        return True
