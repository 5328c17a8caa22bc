"""Simulate a job whose disk is a dictionary, for ten times as many schedules.

Planner, driver, dispatcher and results writer are the real ones. Reading the manifest and `job.json`, the lock, and
links between real files are not: `Simulation` tests those.
"""

import functools
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from tests.chaos.simulator import DriverKilledError, FaultPlan, SimPool, Simulation, make_result
from tests.support.models.stub_model import SilentProgress
from tinysd_batch.job import driver
from tinysd_batch.job.dispatch.job_progress import InvalidRows, RunSummary
from tinysd_batch.job.plan.batches import RowImages, cut_batches, plan_images
from tinysd_batch.job.results import table as tables
from tinysd_batch.job.results import writer
from tinysd_batch.job.results.columns import COLUMN_FIELDS
from tinysd_batch.job.state.job import Job
from tinysd_batch.records import ImageRequest, ImageResult, Row, Status
from tinysd_batch.storage.filesystem import storage_errors

# Enough columns to check the table. A row with all columns takes half a millisecond.
COLUMNS = ("index", "row", "status", "file_name", "sha256", "error_class")
SCHEMA = pa.schema([field for field in COLUMN_FIELDS if field.name in COLUMNS])


class InMemorySimulation(Simulation):
    """A job with nothing on disk except its manifest, which is read once for all simulations."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.image_files: dict[str, bytes] = {}
        self.tables: dict[Path, pa.Table] = {}
        self.temporaries: set[Path] = set()
        self.planned_job, self.planned = read_job(self.manifest, self.folder)

    def guard(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self) -> RunSummary:
        scan = driver.ManifestScan(sum(len(images) for _, images in self.planned), InvalidRows(), [], None)
        run = driver.JobRun(self.planned_job, scan, self, SilentProgress(), lambda: False)  # type: ignore[arg-type]
        return run.execute(lambda _: SimPool(self), None, retry_failed=False, redo_missing=False)

    def leftovers(self) -> list[Path]:
        return list(self.temporaries)

    def write_temporary(self, temporary: Path, data: Any) -> None:
        self.temporaries.add(temporary)

    def remove_temporary(self, temporary: Path) -> None:
        self.temporaries.discard(temporary)

    def write_table(self, data: Any, path: Path) -> None:
        """Replace `atomic.write_atomically`."""
        with storage_errors(path), self.write(data, path.parent):
            self.tables[path] = data

    def save_job(self, job: Job, *_: Any) -> Job:
        with storage_errors(job.folder), self.write(b"", job.folder):
            return job

    def publish(self, image: ImageRequest) -> ImageResult:
        is_new = image.file_name not in self.image_files
        self.generations += is_new
        self.wasted += is_new and self.fault_of_run is not None and self.writes + 1 == self.fault_of_run[1]
        data = b"%s generated as number %d" % (image.image_id.encode(), self.generations)
        with storage_errors(self.folder), self.write(data, self.folder):
            return make_result(image, self.image_files.setdefault(image.file_name, data))

    def adopt(self, job_folder: Path, image: ImageRequest) -> ImageResult | None:
        data = self.image_files.get(image.file_name, b"")
        return make_result(image, data) if data.startswith(image.image_id.encode()) else None

    def clean_up(self, _: Job) -> None:
        if self.is_killed:
            raise DriverKilledError
        self.temporaries.clear()

    def rows(self, images: int) -> list[dict[str, Any]]:
        ((path, table),) = self.tables.items()  # the journal is empty
        rows: list[dict[str, Any]] = table.to_pylist()
        assert path.name == "results.parquet"
        assert [row["index"] for row in rows] == list(range(1, images + 1))
        hashes = {row["file_name"]: row["sha256"] for row in rows if row["status"] == Status.OK}
        assert {name: hashlib.sha256(data).hexdigest() for name, data in self.image_files.items()} == hashes
        assert not self.temporaries
        return rows

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().patch(monkeypatch)
        make_results = functools.partial(InMemoryResults, simulation=self)
        replacements: list[tuple[Any, str, Callable[..., Any]]] = [
            (driver, "ResultsTable", make_results),
            (driver, "build_results_schema", lambda _: SCHEMA),
            (driver, "save_job", self.save_job),
            (driver, "record_precision_from_results", lambda *_: None),
            (driver, "clean_up_job_folder", self.clean_up),
            (driver, "plan_remaining_batches", lambda _, finished: cut_batches(self.planned, finished)),
            (writer, "ResultsTable", make_results),
            (writer, "to_parquet", lambda table, compression="": table),
            (writer, "write_atomically", self.write_table),
            (writer, "read_footer", self.read_footer),
            (writer, "read_table", self.read_table),
            (tables, "read_footer", self.read_footer),
            (tables, "read_table", self.read_table),
        ]
        for module, name, replacement in replacements:
            monkeypatch.setattr(module, name, replacement)

    def read_footer(self, file: Path) -> SimpleNamespace:
        table = self.tables[file]
        schema = SimpleNamespace(to_arrow_schema=lambda: table.schema)
        return SimpleNamespace(num_rows=table.num_rows, metadata=table.schema.metadata, schema=schema)

    def read_table(self, file: Path, columns: list[str] | None = None) -> pa.Table:
        return self.tables[file].select(columns) if columns else self.tables[file]


class InMemoryResults(tables.ResultsTable):
    """Lists files in memory. All else is the real class."""

    def __init__(self, job_folder: Path, simulation: InMemorySimulation) -> None:
        super().__init__(job_folder)
        self.simulation = simulation

    def sealed_files(self) -> list[Path]:
        return [path for path in (self.single_file,) if path in self.simulation.tables]

    def journal_parts(self) -> list[Path]:
        return sorted(path for path in self.simulation.tables if path.parent == self.journal)

    def delete_covered_parts(self) -> None:
        for part in set(self.journal_parts()):
            if part.stem in self.read_covered_parts():
                del self.simulation.tables[part]


@functools.lru_cache
def read_job(manifest: Path, folder: Path) -> tuple[Job, list[tuple[Row, RowImages]]]:
    job = Simulation(folder, manifest, 1, [], FaultPlan()).job()
    return job, list(plan_images(job.read_rows(), job.shared_settings()))
