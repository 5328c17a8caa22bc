"""The interface between the dispatcher and workers.

A pool has no queue. The dispatcher submits a chunk to an idle worker and reads events. Each worker has one call at a
time, so that it is certain which images a lost worker was generating.
"""

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
    """The images of a micro-batch are on disk, or their failure is final."""

    worker: str
    results: list[ImageResult]
    seconds: float | None = None  # its duration by the worker's clock; None: since the worker started or finished one


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A worker has finished its chunk, or stopped before its end."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process died or broke. Another worker must generate what it had not reported."""

    worker: str
    reason: str
    fault: FaultType = FaultType.WORKER_DIED
    is_permanent: bool = False  # no other process replaces it
    shared_cause: str | None = None  # what ended several workers together, to be shown once


WorkerEvent = WorkerReady | BatchDone | ChunkDone | WorkerLost


class WorkerPool(Protocol):
    """What the dispatcher needs of its workers."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def workers(self) -> list[str]:
        """Return the names of all workers, including those that are starting."""
        ...

    def idle_workers(self) -> list[str]:
        """Return the names of the workers that are ready and have no chunk."""
        ...

    def submit(self, worker: str, chunk: Chunk) -> None: ...

    def kill(self, worker: str, reason: str, fault: FaultType) -> WorkerLost:
        """End a worker's process. Another process replaces it."""
        ...

    def retire(self, worker: str, reason: str) -> None:
        """End a worker's process without a replacement."""
        ...

    def wait_for_events(self, timeout_s: float) -> list[WorkerEvent]:
        """Return what has happened, after waiting at most `timeout_s`. Raises NoWorkerError if no worker is left."""
        ...


PoolFactory = Callable[[int], AbstractContextManager[WorkerPool]]  # takes the number of images to generate


def choose_cpu_workers(images: int, requested: int | None, is_small_model: bool) -> tuple[int, int]:
    """Return the number of workers on a machine without GPUs, and the number of torch threads for each.

    A small model's tensors are too small for several threads: it gets a single-threaded worker per core, up to four. A
    large model gets all cores in one worker, because each worker holds a copy of torch and the model.
    """
    cores = count_usable_cores()
    count = requested or max(1, min(cores, images, 4 if is_small_model else 1))
    return count, 1 if is_small_model else max(1, cores // count)
