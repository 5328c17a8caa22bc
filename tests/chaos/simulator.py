"""Simulate a job without processes: real planner, dispatcher, storage and results; simulated workers, clock and faults.

`Simulation.run` does what a user does: submit, and submit again until the job is finished, whatever happens in between.
The seed determines everything.
"""

import contextlib
import errno
import functools
import hashlib
import os
import random
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.models.stub_model import SilentProgress
from tinysd_batch.errors import NoWorkerError, StorageError
from tinysd_batch.job import driver
from tinysd_batch.job.dispatch import dispatcher
from tinysd_batch.job.dispatch.chunk_size import HangTimeout
from tinysd_batch.job.dispatch.job_progress import RunSummary
from tinysd_batch.job.manifest.files import compute_fingerprint, read_manifest_stamp
from tinysd_batch.job.plan.cost import estimate_batch_cost
from tinysd_batch.job.results import table, writer
from tinysd_batch.job.state.job import Job
from tinysd_batch.job.workers.faults import FAULT_POLICIES, FaultAction, FaultType
from tinysd_batch.job.workers.pool import BatchDone, ChunkDone, WorkerEvent, WorkerLost, WorkerReady
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Status
from tinysd_batch.settings.schema import Settings
from tinysd_batch.storage import atomic

MODEL = ModelInfo(Path("none"), "none", "00" * 16, 64, 4, 8, 8, 2, 2.0, 75, 12, 1)
START_S, BACKOFF_S = 5.0, 2.0
STEP_S = 20.0  # by which the clock advances when no worker has an event before
MAX_RUNS = 40
WORKER_FAULTS = (
    "die_before", "die_within", "die_after", "die_unreported", "hang", "twice", "host_out_of_memory", "node_lost",
    "device_broken",
)  # fmt: skip
DRIVER_FAULTS = ("kill_before", "kill_torn", "kill_after", "full")
LARGE_PX = 128


class DriverKilledError(BaseException):
    """The driver was killed. From here on it does nothing at all."""


@dataclass(slots=True)
class SimWorker:
    """One worker, and the state of its process."""

    name: str
    speed: float  # cost per second
    is_small: bool = False  # large images do not fit its memory
    is_broken: bool = False  # dies on every image
    queue: deque[MicroBatch] | None = None
    due: float = 0.0  # when the process is ready, or done with its current batch
    is_ready: bool = False
    hangs: bool = False


@dataclass(slots=True)
class FaultPlan:
    """What is still to go wrong."""

    worker: int = 0  # number of worker faults, at random batches
    driver: list[tuple[str, int]] = field(default_factory=list)  # per run: the fault, and at which write
    poison: set[int] = field(default_factory=set)  # indexes of images that kill every worker
    raising: set[int] = field(default_factory=set)  # indexes of images that raise


class Simulation:
    """One job in one folder, and everything that happens to it."""

    def __init__(self, folder: Path, manifest: Path, seed: int, workers: list[SimWorker], faults: FaultPlan) -> None:
        self.folder = folder
        self.manifest = manifest
        self.rng = random.Random(seed)
        self.workers = workers
        self.faults = faults
        self.now = 0.0
        self.writes = 0
        self.fault_of_run: tuple[str, int] | None = None
        self.is_killed = False
        self.orphaned_batches: list[tuple[SimWorker, MicroBatch]] = []  # of workers without a driver
        self.generations = 0
        self.trials = 0
        self.wasted = 0  # images that a loss may have caused to be generated again
        self.losses: Counter[int] = Counter()  # by image: worker losses that count against it
        self.outcomes: Counter[str] = Counter()  # how runs ended, and which faults were injected

    def clock(self) -> float:
        return self.now

    def job(self) -> Job:
        settings = Settings(model="none", height=64, width=64, steps=2, scale=2.0)
        run_id = uuid.UUID(int=self.rng.getrandbits(128)).hex[:12]
        manifest_state = compute_fingerprint(self.manifest), read_manifest_stamp(self.manifest)
        return Job(self.folder, self.manifest, settings, MODEL, 1, run_id, *manifest_state)

    def run(self) -> None:
        """Submit until the job is finished."""
        for _ in range(MAX_RUNS):
            self.fault_of_run = self.faults.driver.pop() if self.faults.driver else None
            self.writes, self.is_killed = 0, False
            try:
                summary = self.submit()
            except DriverKilledError:
                self.outcomes["driver killed"] += 1
                self.orphan_workers()
            except StorageError:
                self.outcomes["disk full"] += 1
                assert not self.leftovers()
            except NoWorkerError:
                self.outcomes["no worker"] += 1
            else:
                assert not summary.left
                return
            for worker in self.workers:
                worker.queue, worker.is_ready, worker.hangs = None, False, False
        pytest.fail("the job does not finish")

    def submit(self) -> RunSummary:
        return driver.run_job(self.job(), lambda _: SimPool(self), SilentProgress(), lambda: False)

    def leftovers(self) -> list[Path]:
        return list(self.folder.rglob(f"{atomic.TEMPORARY_PREFIX}*"))

    def rows(self, images: int) -> list[dict[str, Any]]:
        """Return the results, after checking all that a finished job guarantees."""
        return check_whole(self.folder, images, lambda job: table.read_table(job / "results.parquet").to_pylist())

    def orphan_workers(self) -> None:
        """Let some workers continue with their current batch after their driver died."""
        for worker in self.workers:
            if worker.queue and not worker.hangs:
                self.wasted += len(worker.queue[0].images)
                if self.rng.random() < 0.5:
                    self.orphaned_batches.append((worker, worker.queue[0]))

    def publish_orphaned_batches(self) -> None:
        while self.orphaned_batches and self.rng.random() < 0.5:
            worker, batch = self.orphaned_batches.pop()
            for image in batch.images:
                if image.index in batch.wanted and not self.get_failure(worker, image) and not worker.is_broken:
                    self.publish(image)

    def get_failure(self, worker: SimWorker, image: ImageRequest) -> str:
        """Return the error class with which the image get_failure on this worker, or an empty string."""
        if image.index in self.faults.raising | self.faults.poison:
            return "ValueError"
        return str(FaultType.OUT_OF_MEMORY) if worker.is_small and image.settings.width >= LARGE_PX else ""

    def publish(self, image: ImageRequest) -> ImageResult:
        """Do what a worker does with one image: adopt an existing file, or generate and publish one."""
        path = self.folder / image.file_name
        marker = image.image_id.encode()
        if not self.adopt(self.folder, image):
            self.generations += 1
            self.wasted += self.fault_of_run is not None and self.writes + 1 == self.fault_of_run[1]
        data = b"%s generated as number %d" % (marker, self.generations)
        scratch = self.folder / "_tinysd" / "tmp"
        published = atomic.publish(data, path, scratch, lambda existing: existing.startswith(marker))
        return make_result(image, published)

    def adopt(self, job_folder: Path, image: ImageRequest) -> ImageResult | None:
        path = job_folder / image.file_name
        data = path.read_bytes() if path.exists() else b""
        return make_result(image, data) if data.startswith(image.image_id.encode()) else None

    @contextlib.contextmanager
    def write(self, data: bytes, folder: Path) -> Iterator[Path]:
        """Replace `atomic.synced_temporary`: at a given write the disk is full or the driver is killed."""
        if self.is_killed:
            raise DriverKilledError
        self.writes += 1
        fault, at = self.fault_of_run or ("", 0)
        is_due = self.writes == at or (fault == "full" and self.writes > at)
        temporary = folder / f"{atomic.TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        if is_due and fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if is_due and fault == "kill_torn":
            self.write_temporary(temporary, data[: len(data) // 2])
        if is_due and fault in ("kill_before", "kill_torn"):
            self.is_killed = True
            raise DriverKilledError
        self.write_temporary(temporary, data)
        try:
            yield temporary
        finally:
            self.remove_temporary(temporary)
        if is_due:
            self.is_killed = True
            raise DriverKilledError

    def write_temporary(self, temporary: Path, data: Any) -> None:
        temporary.write_bytes(data)

    def remove_temporary(self, temporary: Path) -> None:
        temporary.unlink(missing_ok=True)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the real clock and disk by simulated ones. All else is the real code."""
        clean_up = driver.clean_up_job_folder

        def clean_up_unless_killed(job: Job) -> None:
            if self.is_killed:
                raise DriverKilledError
            clean_up(job)

        simulated_dispatcher = functools.partial(
            dispatcher.Dispatcher, clock=self.clock, hang_timeout=HangTimeout(60.0, 10.0, 300.0)
        )
        monkeypatch.setattr(driver, "Dispatcher", simulated_dispatcher)
        monkeypatch.setattr(dispatcher, "adopt_image", self.adopt)
        monkeypatch.setattr(driver, "clean_up_job_folder", clean_up_unless_killed)
        monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=self.clock))
        monkeypatch.setattr(atomic, "synced_temporary", self.write)
        monkeypatch.setattr(atomic, "sync_path", lambda _: None)


class SimPool:
    """The workers of a simulation, as one driver sees them."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.workers_by_name = {worker.name: worker for worker in simulation.workers}
        for worker in simulation.workers:
            worker.due = simulation.now + START_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def workers(self) -> list[str]:
        return list(self.workers_by_name)

    def idle_workers(self) -> list[str]:
        return [worker.name for worker in self.workers_by_name.values() if worker.is_ready and worker.queue is None]

    def submit(self, worker: str, chunk: list[MicroBatch]) -> None:
        process = self.workers_by_name[worker]
        assert process.is_ready
        assert process.queue is None, "a worker gets one call at a time"
        process.queue = deque(chunk)
        process.due = self.simulation.now + estimate_batch_cost(chunk[0]) / process.speed

    def retire(self, worker: str, reason: str) -> None:
        del self.workers_by_name[worker]

    def kill(self, worker: str, reason: str, fault: FaultType) -> WorkerLost:
        process = self.workers_by_name[worker]
        assert process.hangs, "a worker that did not hang was killed"
        return self.lose(process, fault, "hung")

    def lose(self, process: SimWorker, fault: FaultType, reason: str = "") -> WorkerLost:
        batch = process.queue[0] if process.queue else None
        if batch is not None:
            self.simulation.wasted += len(batch.images)
            if FAULT_POLICIES[fault].action is FaultAction.SUSPECT:
                self.simulation.losses.update(batch.wanted)
            if fault is FaultType.NODE_LOST:
                self.simulation.orphaned_batches.append(
                    (process, batch)
                )  # not reachable for the driver, but still writing
        self.simulation.outcomes[reason or str(fault)] += 1
        process.queue, process.is_ready, process.hangs = None, False, False
        process.due = self.simulation.now + BACKOFF_S + START_S
        return WorkerLost(process.name, reason or str(fault), fault)

    def wait_for_events(self, timeout_s: float) -> list[WorkerEvent]:
        simulation = self.simulation
        if not self.workers_by_name:
            raise NoWorkerError("no worker is left")
        simulation.publish_orphaned_batches()
        alive = [
            worker
            for worker in self.workers_by_name.values()
            if not worker.hangs and (worker.queue or not worker.is_ready)
        ]
        soonest = min(alive, key=lambda worker: worker.due, default=None)
        if soonest is None or soonest.due > simulation.now + STEP_S:
            simulation.now += STEP_S
            return []
        simulation.now = max(simulation.now, soonest.due)
        if not soonest.is_ready:
            soonest.is_ready = True
            return [WorkerReady(soonest.name, {})]
        assert soonest.queue
        return self.finish(soonest, soonest.queue[0])

    def finish(self, process: SimWorker, batch: MicroBatch) -> list[WorkerEvent]:
        """End the current batch with results or with a fault."""
        simulation, faults = self.simulation, self.simulation.faults
        simulation.trials += not batch.wanted
        if process.is_broken or not faults.poison.isdisjoint(batch.wanted):
            return [self.lose(process, FaultType.WORKER_DIED)]
        fault_name = ""
        if faults.worker and batch.wanted and simulation.rng.random() < 0.3:
            faults.worker -= 1
            fault_name = simulation.rng.choice(WORKER_FAULTS)
        if fault_name in ("host_out_of_memory", "node_lost", "device_broken"):
            return [self.lose(process, FaultType(fault_name))]
        if fault_name == "die_before":
            return [self.lose(process, FaultType.WORKER_DIED, fault_name)]
        if fault_name == "hang":
            process.hangs = True
            return []
        if fault_name in ("die_within", "die_unreported"):
            return [self.die_with_images(process, batch, fault_name)]
        return self.deliver(process, batch, fault_name)

    def die_with_images(self, process: SimWorker, batch: MicroBatch, fault_name: str) -> WorkerLost:
        """Die after the first image, or after all of them and before any was reported."""
        wanted = frozenset([min(batch.wanted)]) if fault_name == "die_within" else batch.wanted
        self.generate(process, replace(batch, wanted=wanted))
        is_whole = wanted == batch.wanted and not any(
            self.simulation.get_failure(process, image) for image in batch.images
        )
        if process.queue and is_whole:
            process.queue.popleft()  # the driver adopts the files
        return self.lose(process, FaultType.WORKER_DIED, fault_name)

    def deliver(self, process: SimWorker, batch: MicroBatch, fault_name: str) -> list[WorkerEvent]:
        done = BatchDone(process.name, self.generate(process, batch))
        assert process.queue
        process.queue.popleft()
        if fault_name == "die_after":
            return [done, self.lose(process, FaultType.WORKER_DIED, fault_name)]
        events: list[WorkerEvent] = [done, done] if fault_name == "twice" else [done]
        self.simulation.outcomes["twice"] += fault_name == "twice"
        if not process.queue:
            process.queue = None
            return [*events, ChunkDone(process.name)]
        process.due = self.simulation.now + estimate_batch_cost(process.queue[0]) / process.speed
        return events

    def generate(self, process: SimWorker, batch: MicroBatch) -> list[ImageResult]:
        if not batch.wanted:
            return [ImageResult(batch.images[0].index, Status.OK)]
        return [self.generate_one(process, image) for image in batch.images if image.index in batch.wanted]

    def generate_one(self, process: SimWorker, image: ImageRequest) -> ImageResult:
        if fault := self.simulation.get_failure(process, image):
            return ImageResult(image.index, Status.FAILED, error_class=fault, error_message="failed")
        return self.simulation.publish(image)


def make_result(image: ImageRequest, data: bytes) -> ImageResult:
    digest = hashlib.sha256(data).hexdigest()
    return ImageResult(image.index, Status.OK, file_name=image.file_name, sha256=digest, bytes=len(data))


def write_manifest(path: Path, rows: int, rng: random.Random) -> Path:
    """Write rows of 1 to 3 images, one in eight of them large."""
    contents = [
        {"prompt": f"p{row}", "n_samples": rng.choice([1, 1, 2, 3]), "width": rng.choice([64] * 7 + [LARGE_PX])}
        for row in range(rows)
    ]
    return write_csv(path, contents)


def make_random_simulation(
    simulation_type: type[Simulation], folder: Path, manifest: Path, images: int, seed: int
) -> Simulation:
    """Return one to four workers of unequal speed, with a few faults."""
    rng = random.Random(seed)
    workers = [
        SimWorker(f"w{number}", rng.choice([1.0, 0.5, 0.25, 0.1]), is_small=rng.random() < 0.2)
        for number in range(rng.randint(1, 4))
    ]
    if len(workers) > 1:
        workers[-1].is_broken = rng.random() < 0.1
    indexes = range(1, images + 1)
    faults = FaultPlan(
        worker=rng.choice([0, 1, 2, 4]),
        driver=[(rng.choice(DRIVER_FAULTS), rng.randint(1, 2 * images)) for _ in range(rng.choice([0, 1, 2]))],
        poison={rng.choice(indexes)} if rng.random() < 0.2 else set(),
        raising={rng.choice(indexes)} if rng.random() < 0.2 else set(),
    )
    return simulation_type(folder, manifest, seed, workers, faults)


def group_indexes_by_status(rows: list[dict[str, Any]]) -> dict[str, set[int]]:
    return {str(status): {row["index"] for row in rows if row["status"] == status} for status in Status}
