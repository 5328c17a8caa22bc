"""The simulated farm on a disk that is a dictionary, for ten times as many schedules.

Planner, driver, dispatcher and committer are the real ones. What is not: reading the manifest and `job.json`, the lock,
and links between real files, for which `World` is there.
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

from tests.chaos.simulator import Faults, KilledError, SimPool, World, told
from tests.support.stub_model import SilentProgress
from tinysd_batch.job import driver
from tinysd_batch.job.dispatch.job_progress import InvalidRows, RunSummary
from tinysd_batch.job.plan.batches import RowImages, cut_batches, plan_images
from tinysd_batch.job.results import table as tables
from tinysd_batch.job.results import writer
from tinysd_batch.job.results.schema import RESULT_FIELDS
from tinysd_batch.job.state.job import Job
from tinysd_batch.records import ImageRequest, ImageResult, Row, Status
from tinysd_batch.storage import atomic

# Enough of the table to check it by: a row of all columns takes half a millisecond.
COLUMNS = ("index", "row", "status", "file_name", "sha256", "error_class")
SCHEMA = pa.schema([field for field in RESULT_FIELDS if field.name in COLUMNS])


class MemoryWorld(World):
    """A job of which nothing is on disk but its manifest, which is read once for all worlds."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pictures: dict[str, bytes] = {}
        self.tables: dict[Path, pa.Table] = {}
        self.temporaries: set[Path] = set()
        self.the_job, self.planned = read_job(self.manifest, self.folder)

    def guard(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self) -> RunSummary:
        surveyed = driver.ManifestScan(sum(len(images) for _, images in self.planned), InvalidRows(), [], None)
        run = driver.JobRun(self.the_job, surveyed, self, SilentProgress(), lambda: False)  # type: ignore[arg-type]
        return run.execute(lambda _: SimPool(self), None, retry_failed=False, redo_missing=False)

    def leftovers(self) -> list[Path]:
        return list(self.temporaries)

    def leave(self, temporary: Path, data: Any) -> None:
        self.temporaries.add(temporary)

    def remove(self, temporary: Path) -> None:
        self.temporaries.discard(temporary)

    def put(self, data: Any, path: Path) -> None:
        """In place of `storage.write_atomically`."""
        with atomic.storage_errors(path), self.write(data, path.parent):
            self.tables[path] = data

    def save_job(self, job: Job, *_: Any) -> Job:
        with atomic.storage_errors(job.folder), self.write(b"", job.folder):
            return job

    def publish(self, image: ImageRequest) -> ImageResult:
        drawn = image.file_name not in self.pictures
        self.generations += drawn
        self.wasted += drawn and self.fault_of_run is not None and self.writes + 1 == self.fault_of_run[1]
        data = b"%s drawn as number %d" % (image.image_id.encode(), self.generations)
        with atomic.storage_errors(self.folder), self.write(data, self.folder):
            return told(image, self.pictures.setdefault(image.file_name, data))

    def adopt(self, job_folder: Path, image: ImageRequest) -> ImageResult | None:
        data = self.pictures.get(image.file_name, b"")
        return told(image, data) if data.startswith(image.image_id.encode()) else None

    def sweep(self, _: Job) -> None:
        if self.is_killed:
            raise KilledError
        self.temporaries.clear()

    def rows(self, images: int) -> list[dict[str, Any]]:
        ((path, table),) = self.tables.items()  # and no part of the journal
        rows: list[dict[str, Any]] = table.to_pylist()
        assert path.name == "results.parquet"
        assert [row["index"] for row in rows] == list(range(1, images + 1))
        hashes = {row["file_name"]: row["sha256"] for row in rows if row["status"] == Status.OK}
        assert {name: hashlib.sha256(data).hexdigest() for name, data in self.pictures.items()} == hashes
        assert not self.temporaries
        return rows

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().patch(monkeypatch)
        paths = functools.partial(MemoryPaths, world=self)
        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (driver, "ResultsTable", paths),
            (driver, "results_schema", lambda _: SCHEMA),
            (driver, "save_job", self.save_job),
            (driver, "record_earlier", lambda *_: None),
            (driver, "sweep", self.sweep),
            (driver, "todo", lambda _, finished: cut_batches(self.planned, finished)),
            (writer, "ResultsPaths", paths),
            (writer, "to_parquet", lambda table, compression="": table),
            (writer, "write_atomically", self.put),
            (writer, "read_footer", self.read_footer),
            (writer, "read_table", self.read_table),
            (tables, "read_footer", self.read_footer),
            (tables, "read_table", self.read_table),
        ]
        for module, name, ours in replaced:
            monkeypatch.setattr(module, name, ours)

    def read_footer(self, file: Path) -> SimpleNamespace:
        table = self.tables[file]
        schema = SimpleNamespace(to_arrow_schema=lambda: table.schema)
        return SimpleNamespace(num_rows=table.num_rows, metadata=table.schema.metadata, schema=schema)

    def read_table(self, file: Path, columns: list[str] | None = None) -> pa.Table:
        return self.tables[file].select(columns) if columns else self.tables[file]


class MemoryPaths(tables.ResultsTable):
    """Which files there are; what follows from that is the real class's."""

    def __init__(self, job_folder: Path, world: MemoryWorld) -> None:
        super().__init__(job_folder)
        self.world = world

    def sealed_files(self) -> list[Path]:
        return [path for path in (self.single_file,) if path in self.world.tables]

    def journal_parts(self) -> list[Path]:
        return sorted(path for path in self.world.tables if path.parent == self.journal)

    def delete_covered_parts(self) -> None:
        for part in set(self.journal_parts()):
            if part.stem in self.read_covered_parts():
                del self.world.tables[part]


@functools.lru_cache
def read_job(manifest: Path, folder: Path) -> tuple[Job, list[tuple[Row, RowImages]]]:
    job = World(folder, manifest, 1, [], Faults()).job()
    return job, list(plan_images(job.read_rows(), job.shared_settings()))
