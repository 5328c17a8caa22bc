"""The Ray actor that runs one worker."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tinysd_batch.errors import BrokenWorkerError
from tinysd_batch.job.job_log import write_job_log
from tinysd_batch.job.ray_workers import handshake
from tinysd_batch.job.ray_workers.result_batches import MAX_DELAY_S, ResultBatch, group_results
from tinysd_batch.job.workers.oom_fallback import ImageShape, MemoryLimits
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.records import MicroBatch

if TYPE_CHECKING:
    from tinysd_batch.model.tiny_sd import TinySD

BROKEN_EXIT_CODE = 70
BROKEN_EXIT_DELAY_S = 2.0


class WorkerProcess(Worker):
    """A worker in a process of its own."""

    def __init__(self, setup: WorkerSetup, name: str, model: "TinySD | None" = None) -> None:
        if setup.settings.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: a CPU worker must not use any GPU
        logging.captureWarnings(True)
        self.log = contextlib.ExitStack()
        self.log.enter_context(write_job_log(setup.scratch.parent, name))  # until the process ends
        super().__init__(setup, name, model)

    def answer_handshake(self, token: str, memory_limits: dict[ImageShape, MemoryLimits]) -> dict[str, Any]:
        """Answer the driver's handshake, and return the worker's description.

        Args:
            token: names the driver's file.
            memory_limits: what earlier actors of this slot have learnt.
        """
        import ray

        self.memory_limits.update(memory_limits)
        shares_storage = handshake.answer_driver_file(self.setup.scratch, token, self.name)
        node_id = ray.get_runtime_context().get_node_id()
        return {**self.describe(), "shares_storage": shares_storage, "node_id": node_id}

    def run_chunk(self, batches: Sequence[MicroBatch]) -> Iterator[ResultBatch]:
        """Generate the micro-batches. Results are sent together, unless a lost worker's files could not be adopted."""
        max_delay_s = 0.0 if self.setup.settings.no_metadata else MAX_DELAY_S
        try:
            for group in group_results(batches, self.generate(batches), max_delay_s):
                yield ResultBatch(group, dict(self.memory_limits))
        except BrokenWorkerError:
            # A broken CUDA context stays broken until the process ends, and the driver's kill may never arrive.
            exit_timer = threading.Timer(BROKEN_EXIT_DELAY_S, os._exit, [BROKEN_EXIT_CODE])
            exit_timer.daemon = True
            exit_timer.start()
            raise
