"""Decide whether a lost worker was the image's fault or the worker's. Pure logic, no I/O.

An image is quarantined once three workers were lost while generating it and at least one of them had completed another
batch. A worker that was lost twice without completing a batch in between, or that would get a suspect image after a
loss, first gets a trial: an image that is known to be good. A worker that is lost in two consecutive trials is broken.
"""

from collections import Counter
from collections.abc import Iterable

MAX_WORKERS_LOST_PER_IMAGE = 3
LOSSES_BEFORE_TRIAL = 2  # consecutive losses of a worker
MAX_LOST_TRIALS = 2  # consecutive trials of a worker
MAX_NODE_LOSSES_PER_IMAGE = 5  # after which the image itself is suspected


class LossTracker:
    """Losses in one run, by worker and by image."""

    def __init__(self) -> None:
        self.lost_workers: dict[int, list[str]] = {}  # by image index: workers lost while they generated it
        self.consecutive_losses: Counter[str] = Counter()  # by worker
        self.consecutive_lost_trials: Counter[str] = Counter()  # by worker
        self.proven_workers: set[str] = set()  # those that have completed a batch
        self.node_losses: Counter[int] = Counter()  # by image index
        self.lost_attempts: Counter[int] = Counter()  # by image index: attempts that ended in any loss

    def record_batch_done(self, worker: str) -> None:
        self.proven_workers.add(worker)
        self.consecutive_losses[worker] = self.consecutive_lost_trials[worker] = 0

    def record_worker_loss(self, worker: str, indexes: Iterable[int]) -> None:
        """Count a loss against the worker and against the images of its batch: any of them may be the cause."""
        self.consecutive_losses[worker] += 1
        for index in indexes:
            self.lost_attempts[index] += 1
            self.lost_workers.setdefault(index, []).append(worker)

    def record_node_loss(self, indexes: Iterable[int]) -> None:
        """Count a loss that neither the worker nor its images caused."""
        for index in indexes:
            self.lost_attempts[index] += 1
            self.node_losses[index] += 1

    def record_lost_trial(self, worker: str) -> None:
        """Count a lost trial. The losses of a worker that is broken no longer count against images."""
        self.consecutive_lost_trials[worker] += 1
        if self.is_broken(worker):
            self.proven_workers.discard(worker)
            for index, workers in self.lost_workers.items():
                self.lost_workers[index] = [name for name in workers if name != worker]

    def has_too_many_node_losses(self, indexes: Iterable[int]) -> bool:
        """Whether node losses coincide with one of these images so often that the image is suspected."""
        return any(self.node_losses[index] >= MAX_NODE_LOSSES_PER_IMAGE for index in indexes)

    def should_quarantine(self, index: int) -> bool:
        workers = self.lost_workers.get(index, [])
        return len(workers) >= MAX_WORKERS_LOST_PER_IMAGE and not self.proven_workers.isdisjoint(workers)

    def needs_trial(self, worker: str, next_is_suspect: bool) -> bool:
        return self.consecutive_losses[worker] >= (1 if next_is_suspect else LOSSES_BEFORE_TRIAL)

    def is_broken(self, worker: str) -> bool:
        return self.consecutive_lost_trials[worker] >= MAX_LOST_TRIALS
