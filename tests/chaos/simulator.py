"""A farm without processes: the real planner, dispatcher, storage and results; simulated workers, clock and faults.

`World.run` is what a user does: submit, and again until the job is finished, whatever happens in between. Everything
follows from the seed.
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
from tests.support.stub_model import SilentProgress
from tinysd_batch.config import Settings
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
from tinysd_batch.storage import atomic

MODEL = ModelInfo(Path("none"), "none", "00" * 16, 64, 4, 8, 8, 2, 2.0, 75, 1)
BOOT_S, BACKOFF_S = 5.0, 2.0
STEP_S = 20.0  # nothing happens in between
MAX_RUNS = 40
WORKER_FAULTS = (
    "die_before", "die_within", "die_after", "die_untold", "hang", "twice", "host_out_of_memory", "node_lost",
    "device_broken",
)  # fmt: skip
DRIVER_FAULTS = ("kill_before", "kill_torn", "kill_after", "full")
LARGE_PX = 128


class KilledError(BaseException):
    """The driver was killed: from here on it does nothing at all."""


@dataclass(slots=True)
class SimWorker:
    """One worker: images per second at 64x64, and what its process is at."""

    name: str
    speed: float
    is_small: bool = False  # cannot hold large pictures
    is_broken: bool = False  # dies whatever it draws
    queue: deque[MicroBatch] | None = None
    due: float = 0.0  # when the process is ready, or done with the batch at hand
    is_ready: bool = False
    hangs: bool = False


@dataclass(slots=True)
class Faults:
    """What goes wrong, and how often yet."""

    worker: int = 0  # faults of workers, at random batches
    driver: list[tuple[str, int]] = field(default_factory=list)  # per run: what happens at which write
    poison: set[int] = field(default_factory=set)  # indexes at which every worker dies
    raising: set[int] = field(default_factory=set)  # indexes that raise


class World:
    """One job in one folder, and all that happens to it."""

    def __init__(self, folder: Path, manifest: Path, seed: int, workers: list[SimWorker], faults: Faults) -> None:
        self.folder = folder
        self.manifest = manifest
        self.chance = random.Random(seed)
        self.workers = workers
        self.faults = faults
        self.now = 0.0
        self.writes = 0
        self.fault_of_run: tuple[str, int] | None = None
        self.is_killed = False
        self.zombies: list[tuple[SimWorker, MicroBatch]] = []  # workers without a driver, and what they are still at
        self.generations = 0
        self.trials = 0
        self.wasted = 0  # images whose generation a loss may have cost
        self.losses: Counter[int] = Counter()  # by image: charged ones
        self.ends: Counter[str] = Counter()  # how runs ended, and which faults were delivered

    def clock(self) -> float:
        return self.now

    def job(self) -> Job:
        settings = Settings(model="none", height=64, width=64, steps=2, scale=2.0)
        return Job(
            self.folder, self.manifest, settings, MODEL, 1, uuid.UUID(int=self.chance.getrandbits(128)).hex[:12],
            compute_fingerprint(self.manifest), read_manifest_stamp(self.manifest),
        )  # fmt: skip

    def run(self) -> None:
        """Submit until the job is finished."""
        for _ in range(MAX_RUNS):
            self.fault_of_run = self.faults.driver.pop() if self.faults.driver else None
            self.writes, self.is_killed = 0, False
            try:
                summary = self.submit()
            except KilledError:
                self.ends["driver killed"] += 1
                self.orphan_workers()
            except StorageError:
                self.ends["disk full"] += 1
                assert not self.leftovers()
            except NoWorkerError:
                self.ends["no worker"] += 1
            else:
                assert not summary.left
                return
            for worker in self.workers:
                worker.queue, worker.is_ready, worker.hangs = None, False, False
        pytest.fail("the job does not come to an end")

    def submit(self) -> RunSummary:
        return driver.run_job(self.job(), lambda _: SimPool(self), SilentProgress(), lambda: False)

    def leftovers(self) -> list[Path]:
        return list(self.folder.rglob(f"{atomic.TEMPORARY_PREFIX}*"))

    def rows(self, images: int) -> list[dict[str, Any]]:
        """The table, after all has been looked at that a finished job promises."""
        return check_whole(
            self.folder, images, lambda job: table.read_table(job / "results.parquet").to_pylist()
        )  # fmt: skip

    def orphan_workers(self) -> None:
        """Workers go on for a while after their driver died, and power may have failed while a file was written."""
        for worker in self.workers:
            if worker.queue and not worker.hangs:
                self.wasted += len(worker.queue[0].images)
                if self.chance.random() < 0.5:
                    self.zombies.append((worker, worker.queue[0]))

    def publish_zombies(self) -> None:
        while self.zombies and self.chance.random() < 0.5:
            worker, batch = self.zombies.pop()
            for image in batch.images:
                if image.index in batch.wanted and not self.fails(worker, image) and not worker.is_broken:
                    self.publish(image)

    def fails(self, worker: SimWorker, image: ImageRequest) -> str:
        """The class of failure that the image is for this worker, if it is one."""
        if image.index in self.faults.raising | self.faults.poison:
            return "ValueError"
        return str(FaultType.OUT_OF_MEMORY) if worker.is_small and image.params.width >= LARGE_PX else ""

    def publish(self, image: ImageRequest) -> ImageResult:
        """What a worker does with one image: adopt what is there, or draw it and publish it, never replacing."""
        path = self.folder / image.file_name
        mark = image.image_id.encode()
        if not self.adopt(self.folder, image):
            self.generations += 1
            self.wasted += self.fault_of_run is not None and self.writes + 1 == self.fault_of_run[1]
        data = atomic.publish(
            b"%s drawn as number %d" % (mark, self.generations), path, self.folder / "_tinysd" / "tmp",
            lambda found: found.startswith(mark),
        )  # fmt: skip
        return told(image, data)

    def adopt(self, job_folder: Path, image: ImageRequest) -> ImageResult | None:
        path = job_folder / image.file_name
        data = path.read_bytes() if path.exists() else b""
        return told(image, data) if data.startswith(image.image_id.encode()) else None

    @contextlib.contextmanager
    def write(self, data: bytes, folder: Path) -> Iterator[Path]:
        """In place of `storage.synced_temporary`: the disk that fills, and the driver that dies, at a given write."""
        if self.is_killed:
            raise KilledError
        self.writes += 1
        what, at = self.fault_of_run or ("", 0)
        strikes = self.writes == at or (what == "full" and self.writes > at)
        temporary = folder / f"{atomic.TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        if strikes and what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if strikes and what == "kill_torn":
            self.leave(temporary, data[: len(data) // 2])
        if strikes and what in ("kill_before", "kill_torn"):
            self.is_killed = True
            raise KilledError
        self.leave(temporary, data)
        try:
            yield temporary
        finally:
            self.remove(temporary)
        if strikes:
            self.is_killed = True
            raise KilledError

    def leave(self, temporary: Path, data: Any) -> None:
        temporary.write_bytes(data)

    def remove(self, temporary: Path) -> None:
        temporary.unlink(missing_ok=True)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the simulated clock and disk in the place of real ones; all else is the real code."""
        sweep = driver.clean_up_job_folder

        def sweep_unless_killed(job: Job) -> None:
            if self.is_killed:
                raise KilledError
            sweep(job)

        timed = functools.partial(dispatcher.Dispatcher, clock=self.clock, patience=HangTimeout(60.0, 10.0, 300.0))
        monkeypatch.setattr(driver, "Dispatcher", timed)
        monkeypatch.setattr(dispatcher, "adopt_image", self.adopt)
        monkeypatch.setattr(driver, "clean_up_job_folder", sweep_unless_killed)
        monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=self.clock))
        monkeypatch.setattr(atomic, "synced_temporary", self.write)
        monkeypatch.setattr(atomic, "sync_path", lambda _: None)


class SimPool:
    """The workers of a world, as one driver sees them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.there = {worker.name: worker for worker in world.workers}
        for worker in world.workers:
            worker.due = world.now + BOOT_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def workers(self) -> list[str]:
        return list(self.there)

    def idle_workers(self) -> list[str]:
        return [worker.name for worker in self.there.values() if worker.is_ready and worker.queue is None]

    def submit(self, worker: str, chunk: list[MicroBatch]) -> None:
        process = self.there[worker]
        assert process.is_ready
        assert process.queue is None, "one call in flight"
        process.queue = deque(chunk)
        process.due = self.world.now + estimate_batch_cost(chunk[0]) / process.speed

    def retire(self, worker: str, reason: str) -> None:
        del self.there[worker]

    def kill(self, worker: str, reason: str, fault: FaultType) -> WorkerLost:
        process = self.there[worker]
        assert process.hangs, "a worker that was at work was killed"
        return self.lose(process, fault, "hung")

    def lose(self, process: SimWorker, fault: FaultType, reason: str = "") -> WorkerLost:
        batch = process.queue[0] if process.queue else None
        if batch is not None:
            self.world.wasted += len(batch.images)
            if FAULT_POLICIES[fault].action is FaultAction.SUSPECT:
                self.world.losses.update(batch.wanted)
            if fault is FaultType.NODE_LOST:
                self.world.zombies.append((process, batch))  # cut off from us, but not from the storage
        self.world.ends[reason or str(fault)] += 1
        process.queue, process.is_ready, process.hangs = None, False, False
        process.due = self.world.now + BACKOFF_S + BOOT_S
        return WorkerLost(process.name, reason or str(fault), fault)

    def wait_for_events(self, timeout_s: float) -> list[WorkerEvent]:
        world = self.world
        if not self.there:
            raise NoWorkerError("no worker is left")
        world.publish_zombies()
        alive = [worker for worker in self.there.values() if not worker.hangs and (worker.queue or not worker.is_ready)]
        soonest = min(alive, key=lambda worker: worker.due, default=None)
        if soonest is None or soonest.due > world.now + STEP_S:
            world.now += STEP_S
            return []
        world.now = max(world.now, soonest.due)
        if not soonest.is_ready:
            soonest.is_ready = True
            return [WorkerReady(soonest.name, {})]
        assert soonest.queue
        return self.finish(soonest, soonest.queue[0])

    def finish(self, process: SimWorker, batch: MicroBatch) -> list[WorkerEvent]:
        """What comes of the batch at hand, be it pictures or a fault."""
        world, faults = self.world, self.world.faults
        world.trials += not batch.wanted
        if process.is_broken or not faults.poison.isdisjoint(batch.wanted):
            return [self.lose(process, FaultType.WORKER_DIED)]
        what = ""
        if faults.worker and batch.wanted and world.chance.random() < 0.3:
            faults.worker -= 1
            what = world.chance.choice(WORKER_FAULTS)
        if what in ("host_out_of_memory", "node_lost", "device_broken"):
            return [self.lose(process, FaultType(what))]
        if what == "die_before":
            return [self.lose(process, FaultType.WORKER_DIED, what)]
        if what == "hang":
            process.hangs = True
            return []
        if what in ("die_within", "die_untold"):
            return [self.die_with_pictures(process, batch, what)]
        return self.deliver(process, batch, what)

    def die_with_pictures(self, process: SimWorker, batch: MicroBatch, what: str) -> WorkerLost:
        """After the first picture, or after all of them and before a word of it was told."""
        wanted = frozenset([min(batch.wanted)]) if what == "die_within" else batch.wanted
        self.make(process, replace(batch, wanted=wanted))
        is_whole = wanted == batch.wanted and not any(self.world.fails(process, image) for image in batch.images)
        if process.queue and is_whole:
            process.queue.popleft()  # which the driver can see by the files
        return self.lose(process, FaultType.WORKER_DIED, what)

    def deliver(self, process: SimWorker, batch: MicroBatch, what: str) -> list[WorkerEvent]:
        done = BatchDone(process.name, self.make(process, batch))
        assert process.queue
        process.queue.popleft()
        if what == "die_after":
            return [done, self.lose(process, FaultType.WORKER_DIED, what)]
        events: list[WorkerEvent] = [done, done] if what == "twice" else [done]
        self.world.ends["twice"] += what == "twice"
        if not process.queue:
            process.queue = None
            return [*events, ChunkDone(process.name)]
        process.due = self.world.now + estimate_batch_cost(process.queue[0]) / process.speed
        return events

    def make(self, process: SimWorker, batch: MicroBatch) -> list[ImageResult]:
        if not batch.wanted:
            return [ImageResult(batch.images[0].index, Status.OK)]
        return [self.make_one(process, image) for image in batch.images if image.index in batch.wanted]

    def make_one(self, process: SimWorker, image: ImageRequest) -> ImageResult:
        if fault := self.world.fails(process, image):
            return ImageResult(image.index, Status.FAILED, error_class=fault, error_message="failed")
        return self.world.publish(image)


def told(image: ImageRequest, data: bytes) -> ImageResult:
    digest = hashlib.sha256(data).hexdigest()
    return ImageResult(image.index, Status.OK, file_name=image.file_name, sha256=digest, bytes=len(data))


def write_manifest(path: Path, rows: int, chance: random.Random) -> Path:
    """Rows of 1 to 3 images, one in eight of them large."""
    return write_csv(path, [
        {"prompt": f"p{row}", "n_samples": chance.choice([1, 1, 2, 3]), "width": chance.choice([64] * 7 + [LARGE_PX])}
        for row in range(rows)
    ])  # fmt: skip


def random_world(kind: type[World], folder: Path, manifest: Path, images: int, seed: int) -> World:
    """One to four workers of unequal speed, and up to a handful of faults."""
    chance = random.Random(seed)
    workers = [
        SimWorker(f"w{number}", chance.choice([1.0, 0.5, 0.25, 0.1]), is_small=chance.random() < 0.2)
        for number in range(chance.randint(1, 4))
    ]
    if len(workers) > 1:
        workers[-1].is_broken = chance.random() < 0.1
    indexes = range(1, images + 1)
    faults = Faults(
        worker=chance.choice([0, 1, 2, 4]),
        driver=[(chance.choice(DRIVER_FAULTS), chance.randint(1, 2 * images)) for _ in range(chance.choice([0, 1, 2]))],
        poison={chance.choice(indexes)} if chance.random() < 0.2 else set(),
        raising={chance.choice(indexes)} if chance.random() < 0.2 else set(),
    )
    return kind(folder, manifest, seed, workers, faults)


def rows_by_status(rows: list[dict[str, Any]]) -> dict[str, set[int]]:
    return {str(status): {row["index"] for row in rows if row["status"] == status} for status in Status}
