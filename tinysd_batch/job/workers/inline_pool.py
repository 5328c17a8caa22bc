"""A pool of one worker in this process (`--inline`)."""

from collections.abc import Iterator
from typing import Self

from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job.workers.faults import FaultType
from tinysd_batch.job.workers.pool import BatchDone, Chunk, ChunkDone, WorkerEvent, WorkerLost, WorkerReady
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.records import ImageResult


class InlinePool:
    """One worker in this process: no start-up cost, but a crash of native code ends the driver, too."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self.worker: Worker | None = None
        self.results: Iterator[list[ImageResult]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.worker = self.results = None

    def workers(self) -> list[str]:
        return ["inline"]

    def idle_workers(self) -> list[str]:
        return ["inline"] if self.worker is not None and self.results is None else []

    def submit(self, worker: str, chunk: Chunk) -> None:  # noqa: ARG002 - there is only one
        assert self.worker is not None
        self.results = self.worker.generate(chunk)

    def kill(self, worker: str, reason: str, fault: FaultType) -> WorkerLost:  # noqa: ARG002 - there is only one
        raise NoWorkerError(f"the worker in this process failed: {reason}")

    def retire(self, worker: str, reason: str) -> None:
        raise NoWorkerError(f"the worker {worker} failed and is not replaced: {reason}")

    def wait_for_events(self, timeout_s: float) -> list[WorkerEvent]:  # noqa: ARG002 - waiting is generating here
        if self.worker is None:
            self.worker = Worker(self.setup, "inline")
            return [WorkerReady("inline", self.worker.describe())]
        if self.results is None:
            return []
        results = next(self.results, None)
        if results is None:
            self.results = None
            return [ChunkDone("inline")]
        return [BatchDone("inline", results)]
