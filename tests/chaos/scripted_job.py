"""Run a real job with scripted faults: `python -m tests.chaos.scripted_job MANIFEST JOB [OPTIONS]`.

Driver, Ray, worker processes, files and tables are the real ones. Only the model is a stub: each prompt says what
happens to its process.
"""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.models.stub_model import StubModel, StubRayPool, StubWorkerProcess
from tinysd_batch.cli.terminal.signals import stop_on_signals
from tinysd_batch.errors import TinySDError
from tinysd_batch.job.dispatch import dispatcher
from tinysd_batch.job.dispatch.chunk_size import HangTimeout
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.worker import WorkerSetup
from tinysd_batch.records import ImageRequest
from tinysd_batch.report.progress_bar import RunProgressBar


class DeviceError(RuntimeError):
    """Has the message of torch's error for a broken CUDA context, without torch."""


def claim_first_time(prompt: str) -> bool:
    """Create the file whose path ends the prompt. Return False if it exists already."""
    marker = Path(prompt.rsplit(" ", 1)[1])
    if marker.exists():
        return False
    marker.touch()
    return True


class ScriptedModel(StubModel):
    """Does what each prompt says."""

    def generate_images(self, requests: Sequence[ImageRequest]) -> list[Any]:
        if count := os.environ.get("SCRIPTED_JOB_COUNT"):  # gets a byte for each image that is started
            with Path(count).open("ab", buffering=0) as file:
                file.write(b"." * len(requests))
        for request in requests:
            self.follow_script(request.prompt)
        return super().generate_images(requests)

    def follow_script(self, text: str) -> None:
        if text.startswith("poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        if text.startswith("raise"):
            raise ValueError(text)
        if text.startswith("assert once") and claim_first_time(text):
            raise DeviceError("CUDA error: device-side assert triggered")
        if text.startswith("hang once") and claim_first_time(text):
            os.kill(os.getpid(), signal.SIGSTOP)
        if text.startswith("allocate once") and claim_first_time(text):
            self.allocated = [bytearray(os.urandom(1) * 50_000_000) for _ in range(1000)]


class ScriptedProcess(StubWorkerProcess):
    """With `SCRIPTED_JOB_SCRATCH` in the environment, its storage is that of another machine."""

    model_class = ScriptedModel

    def __init__(self, setup: WorkerSetup, name: str) -> None:
        super().__init__(replace(setup, scratch=Path(os.environ.get("SCRIPTED_JOB_SCRATCH", setup.scratch))), name)


class ScriptedPool(StubRayPool):
    worker_class = ScriptedProcess


def main() -> int:
    from rich.console import Console

    parser = argparse.ArgumentParser()
    parser.add_argument("manifest", type=Path)
    parser.add_argument("job", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--hang-timeout", type=float, default=120.0)
    parser.add_argument("--take-over", action="store_true")
    options = parser.parse_args()
    setattr(dispatcher, "HangTimeout", functools.partial(HangTimeout, options.hang_timeout, 10.0, options.hang_timeout))  # noqa: B010
    job = open_job(options.manifest, options.job, {"height": 64, "width": 64, "seed": 1})
    setup = WorkerSetup.from_settings(
        job.settings,
        job.model,
        job_folder=job.folder.resolve(),
        scratch=job.scratch.resolve(),
        stop_file=job.stop_file.resolve(),
    )
    with stop_on_signals() as stop, RunProgressBar(Console(highlight=False), verbose=False) as progress:
        try:
            summary = run_job(
                job,
                lambda _: ScriptedPool(setup, options.workers, options.seconds),
                progress,
                lambda: bool(stop),
                take_over=options.take_over,
            )
        except TinySDError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    print(f"{summary.counts}", flush=True)
    return stop.exit_code if summary.stopped else 3 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
