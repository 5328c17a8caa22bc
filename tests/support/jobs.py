"""Run jobs in this process, and check their results."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tinysd_batch.job.dispatch.job_progress import InvalidRows
from tinysd_batch.job.driver import RunSummary, run_job
from tinysd_batch.job.results.table import convert_times_to_text
from tinysd_batch.job.state.job import Job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.pool import WorkerLost, WorkerReady
from tinysd_batch.job.workers.worker import WorkerSetup
from tinysd_batch.records import ImageRequest, ImageResult
from tinysd_batch.storage.atomic import TEMPORARY_PREFIX


def read_results(job: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = convert_times_to_text(pq.read_table(job / "results.parquet")).to_pylist()
    return rows


def check_whole(
    job: Path, images: int, read: Callable[[Path], list[dict[str, Any]]] = read_results
) -> list[dict[str, Any]]:
    """Assert that a finished job is complete: every index once, all hashes correct, no other files. Return its rows."""
    rows = read(job)
    image_rows = [row for row in rows if row["index"] is not None]
    assert sorted(row["index"] for row in image_rows) == list(range(1, images + 1))
    saved = [row for row in image_rows if row["status"] == "ok"]
    for row in saved:
        data = (job / row["file_name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"], row["file_name"]
    files = {path.relative_to(job).as_posix() for path in (job / "images").rglob("*") if path.is_file()}
    assert files == {row["file_name"] for row in saved}
    assert not list(job.rglob(f"{TEMPORARY_PREFIX}*"))
    assert not list((job / "_tinysd" / "journal").iterdir())
    return rows


class Quiet:
    """A run progress that records generated images and notes."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.notes: list[str] = []

    def report_start(self, total: int, finished: int, invalid: InvalidRows) -> None: ...
    def report_worker(self, event: WorkerReady | WorkerLost) -> None: ...
    def report_flush(self) -> None: ...

    def note(self, line: str) -> None:
        self.notes.append(line)

    def report_image(self, request: ImageRequest, result: ImageResult) -> None:
        self.made.append(request.index)


def setup_for(job: Job) -> WorkerSetup:
    settings = replace(job.settings, device="cpu")
    return WorkerSetup.from_settings(
        settings, job.model, job_folder=job.folder, scratch=job.scratch, stop_file=job.stop_file
    )


def draw(
    manifest: Path, folder: Path, model: Path, stop_after: int | None = None, limit: int | None = None, **settings: Any
) -> tuple[RunSummary, Quiet]:
    job = open_job(manifest, folder, {"model": str(model), **settings})
    progress = Quiet()
    stop: Callable[[], bool] = lambda: stop_after is not None and len(progress.made) >= stop_after  # noqa: E731
    return run_job(job, lambda _: InlinePool(setup_for(job)), progress, stop, limit), progress
