"""The interface between the dispatcher and workers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from tinysd_batch.job.workers.faults import FaultType
from tinysd_batch.records import ImageResult, MicroBatch
from tinysd_batch.threads import count_usable_cores

Chunk = list[MicroBatch]


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded its model."""

    worker: str
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A micro-batch's images are durable, or have failed for good."""

    worker: str
    results: list[ImageResult]
    seconds: float | None = None  # it took, by the worker's clock; None: since it was handed out, or the one before it


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A worker has nothing left to do."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process died or broke; what it had not reported must be made by another."""

    worker: str
    reason: str
    fault: FaultType = FaultType.WORKER_DIED
    is_permanent: bool = False  # no other process takes its place
    shared_cause: str | None = None  # what ended several workers together, as a clause for people


WorkerEvent = WorkerReady | BatchDone | ChunkDone | WorkerLost


class WorkerPool(Protocol):
    """What the driver needs of its workers."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def workers(self) -> list[str]:
        """Workers that are there or will be."""
        ...

    def idle_workers(self) -> list[str]:
        """Workers that are ready and have nothing to do."""
        ...

    def submit(self, worker: str, chunk: Chunk) -> None: ...

    def kill(self, worker: str, reason: str, fault: FaultType) -> WorkerLost:
        """End a worker's process; another will take its place."""
        ...

    def retire(self, worker: str, reason: str) -> None:
        """Give up a worker for good."""
        ...

    def wait_for_events(self, timeout_s: float) -> list[WorkerEvent]:
        """What has happened, after waiting at most so long. Raises NoWorkerError when no worker is left."""
        ...


def choose_cpu_workers(images: int, wanted: int | None, small_model: bool) -> tuple[int, int]:
    """How many workers where there is no GPU, and torch threads for each.

    A small model's tensors are too small to share: it gets a single-threaded worker per core, up to four. A big one
    gets all cores in one worker, since each holds a copy of torch and the model.
    """
    cores = count_usable_cores()
    count = wanted or max(1, min(cores, images, 4 if small_model else 1))
    return count, 1 if small_model else max(1, cores // count)


PoolFactory = Callable[[int], AbstractContextManager[WorkerPool]]
