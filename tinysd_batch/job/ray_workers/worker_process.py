"""The Ray actor that runs one worker."""

import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tinysd_batch.errors import BrokenWorkerError
from tinysd_batch.job.ray_workers import handshake
from tinysd_batch.job.ray_workers.result_batches import MAX_DELAY_S, ResultBatch, group_results
from tinysd_batch.job.workers.oom_fallback import ImageShape, MemoryLimits
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.records import MicroBatch

if TYPE_CHECKING:
    from tinysd_batch.model.pipeline import TinySD

BROKEN_EXIT_CODE = 70


class WorkerProcess(Worker):
    """A worker that has a process of its own."""

    def __init__(self, setup: WorkerSetup, name: str, model: "TinySD | None" = None) -> None:
        if setup.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: a CPU worker must not touch any card
        super().__init__(setup, name, model)

    def answer_handshake(self, word: str, limits: dict[ImageShape, MemoryLimits]) -> dict[str, Any]:
        """`describe`, and the worker's part of the handshake. `limits` were learnt on this card before."""
        import ray

        self.memory_limits.update(limits)
        shares = handshake.answer_driver_file(self.setup.scratch, word, self.name)
        return {**self.describe(), "shares_storage": shares, "node_id": ray.get_runtime_context().get_node_id()}

    def run_chunk(self, batches: Sequence[MicroBatch]) -> Iterator[ResultBatch]:
        """`generate`, with results that travel together where nothing is lost by it."""
        late_s = 0.0 if self.setup.no_metadata else MAX_DELAY_S
        try:
            for made in group_results(batches, self.generate(batches), late_s):
                yield ResultBatch(made, dict(self.memory_limits))
        except BrokenWorkerError:
            # What is broken in a CUDA context is so until the process ends; the driver's kill may never come.
            end = threading.Timer(2.0, os._exit, [BROKEN_EXIT_CODE])
            end.daemon = True
            end.start()
            raise
