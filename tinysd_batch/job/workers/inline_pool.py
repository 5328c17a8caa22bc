"""How workers are talked to, and `InlinePool`, which runs one in this process. `ray_pool` has one actor per card.

A pool holds no work. The driver submits a chunk to an idle worker and reads events; one call is in flight per worker,
so that it is certain which images a dead worker was making.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job.workers.faults import Fault
from tinysd_batch.job.workers.worker import Worker, WorkerSetup, usable_cores
from tinysd_batch.records import ImageResult, MicroBatch

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
    fault: Fault = Fault.WORKER_DIED
    for_good: bool = False  # no other process takes its place
    cause: str | None = None  # what ended several workers together, as a clause for people


Event = WorkerReady | BatchDone | ChunkDone | WorkerLost


class Pool(Protocol):
    """What the driver needs of its workers."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def workers(self) -> list[str]:
        """Workers that are there or will be."""
        ...

    def idle(self) -> list[str]:
        """Workers that are ready and have nothing to do."""
        ...

    def submit(self, worker: str, chunk: Chunk) -> None: ...

    def kill(self, worker: str, reason: str, fault: Fault) -> WorkerLost:
        """End a worker's process; another will take its place."""
        ...

    def retire(self, worker: str, reason: str) -> None:
        """Give up a worker for good."""
        ...

    def events(self, timeout_s: float) -> list[Event]:
        """What has happened, after waiting at most so long. Raises NoWorkerError when no worker is left."""
        ...


class InlinePool:
    """One worker in this process: no start-up cost, but a native crash takes the driver with it."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self.worker: Worker | None = None
        self.work: Iterator[list[ImageResult]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.worker = self.work = None

    def workers(self) -> list[str]:
        return ["inline"]

    def idle(self) -> list[str]:
        return ["inline"] if self.worker is not None and self.work is None else []

    def submit(self, worker: str, chunk: Chunk) -> None:  # noqa: ARG002 - there is only one
        assert self.worker is not None
        self.work = self.worker.generate(chunk)

    def kill(self, worker: str, reason: str, fault: Fault) -> WorkerLost:  # noqa: ARG002 - there is only one
        raise NoWorkerError(f"the worker in this process failed: {reason}")

    def retire(self, worker: str, reason: str) -> None:
        raise NoWorkerError(f"the worker {worker} failed for good: {reason}")

    def events(self, timeout_s: float) -> list[Event]:  # noqa: ARG002 - work here is done by waiting for it
        if self.worker is None:
            self.worker = Worker(self.setup, "inline")
            return [WorkerReady("inline", self.worker.describe())]
        if self.work is None:
            return []
        results = next(self.work, None)
        if results is None:
            self.work = None
            return [ChunkDone("inline")]
        return [BatchDone("inline", results)]


def cpu_workers(images: int, wanted: int | None, small_model: bool) -> tuple[int, int]:
    """How many workers where there is no GPU, and torch threads for each.

    A small model's tensors are too small to share: it gets a single-threaded worker per core, up to four. A big one
    gets all cores in one worker, since each holds a copy of torch and the model.
    """
    cores = usable_cores()
    count = wanted or max(1, min(cores, images, 4 if small_model else 1))
    return count, 1 if small_model else max(1, cores // count)
