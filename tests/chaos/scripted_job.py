"""A real job on real workers that draw nothing but obey: `python -m tests.chaos.scripted_job MANIFEST JOB [OPTIONS]`.

Driver, Ray, worker processes, files and tables are the program's own; only the model is a stand-in, which reads in the
prompt what is to befall its process.
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

from tests.support.stub_model import StubModel, StubRayPool, StubWorkerProcess
from tinysd_batch.cli.terminal.signals import stop_on_signals
from tinysd_batch.config import Settings
from tinysd_batch.errors import TinySDError
from tinysd_batch.job.dispatch import dispatcher
from tinysd_batch.job.dispatch.chunk_size import HangTimeout
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.worker import WorkerSetup
from tinysd_batch.report.progress_bar import RunProgressBar


class DeviceError(RuntimeError):
    """As torch tells of a broken context, without torch."""


def once(prompt: str) -> bool:
    """Whether this is the first time; the prompt ends in the path of a file that remembers."""
    mark = Path(prompt.rsplit(" ", 1)[1])
    if mark.exists():
        return False
    mark.touch()
    return True


class CursedModel(StubModel):
    """Does what the prompt says."""

    def generate(self, prompt: Sequence[str], seed: Sequence[int], **more: Any) -> Any:
        if count := os.environ.get("FARM_COUNT"):  # a byte for each image begun
            with Path(count).open("ab", buffering=0) as file:
                file.write(b"." * len(prompt))
        for text in prompt:
            self.suffer(text)
        return super().generate(prompt, seed, **more)

    def suffer(self, text: str) -> None:
        if text.startswith("poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        if text.startswith("raise"):
            raise ValueError(text)
        if text.startswith("assert once") and once(text):
            raise DeviceError("CUDA error: device-side assert triggered")
        if text.startswith("hang once") and once(text):
            os.kill(os.getpid(), signal.SIGSTOP)
        if text.startswith("eat once") and once(text):
            self.eaten = [bytearray(os.urandom(1) * 50_000_000) for _ in range(1000)]


class CursedProcess(StubWorkerProcess):
    """With `FARM_APART` in the environment it has the storage of another machine."""

    model_class = CursedModel

    def __init__(self, setup: WorkerSetup, name: str) -> None:
        super().__init__(replace(setup, scratch=Path(os.environ.get("FARM_APART", setup.scratch))), name)


class CursedPool(StubRayPool):
    worker_class = CursedProcess


def main() -> int:
    from rich.console import Console

    parser = argparse.ArgumentParser()
    parser.add_argument("manifest", type=Path)
    parser.add_argument("job", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--patience", type=float, default=120.0)
    parser.add_argument("--take-over", action="store_true")
    given = parser.parse_args()
    setattr(dispatcher, "HangTimeout", functools.partial(HangTimeout, given.patience, 10.0, given.patience))  # noqa: B010
    job = open_job(given.manifest, given.job, Settings(height=64, width=64, seed=1))
    setup = WorkerSetup.from_settings(
        job.settings, job.model, job_folder=job.folder.resolve(), scratch=job.scratch.resolve(),
        stop_file=job.stop_file.resolve(),
    )  # fmt: skip
    with stop_on_signals() as stop, RunProgressBar(Console(highlight=False), verbose=False) as progress:
        try:
            summary = run_job(
                job, lambda _: CursedPool(setup, given.workers, given.seconds), progress, lambda: bool(stop),
                take_over=given.take_over,
            )  # fmt: skip
        except TinySDError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    print(f"{summary.counts}", flush=True)
    return stop.exit_code if summary.stopped else 3 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
