"""Workers and how they are talked to: `InlinePool` runs one in this process, `RayPool` one actor per card.

A pool holds no work. The driver submits a chunk to an idle worker and reads events; one call is in flight per worker,
so that it is certain which images a dead worker was making.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from tinysd_batch.errors import NoWorkerError, TinySDError, UsageError
from tinysd_batch.job.cluster import fault_line, start_ray, stop_ray
from tinysd_batch.job.worker import Worker, WorkerSetup, usable_cores
from tinysd_batch.records import ImageResult, MicroBatch

Chunk = list[MicroBatch]

BOOT_ATTEMPTS = 2  # a card on which the model does not load is tried once more, then left out
MAX_BACKOFF_S = 30.0
OUR_ERROR = re.compile(r"tinysd_batch\.errors\.(?:ModelError|UsageError): (.*)")


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded its model."""

    worker: str
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A micro-batch's images are durable, or have failed for good."""

    worker: str
    results: list[ImageResult]


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A worker has nothing left to do."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process died or broke; what it had not reported must be made by another."""

    worker: str
    reason: str


Event = WorkerReady | BatchDone | ChunkDone | WorkerLost


class Pool(Protocol):
    """What the driver needs of its workers."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    @property
    def size(self) -> int:
        """Workers that are there or will be."""
        ...

    def idle(self) -> list[str]:
        """Workers that are ready and have nothing to do."""
        ...

    def submit(self, worker: str, chunk: Chunk) -> None: ...

    def retire(self, worker: str) -> None:
        """Give up a worker for good."""
        ...

    def events(self, timeout_s: float) -> list[Event]:
        """What has happened, after waiting at most so long. Raises NoWorkerError when no worker is left."""
        ...


class InlinePool:
    """One worker in this process: no start-up cost, but a native crash takes the driver with it."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self.worker: Worker | None = None
        self.work: Iterator[list[ImageResult]] | None = None
        self.size = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.worker = self.work = None

    def idle(self) -> list[str]:
        return ["inline"] if self.worker is not None and self.work is None else []

    def submit(self, worker: str, chunk: Chunk) -> None:  # noqa: ARG002 - there is only one
        assert self.worker is not None
        self.work = self.worker.generate(chunk)

    def retire(self, worker: str) -> None:
        raise NoWorkerError(f"the worker {worker} failed for good")

    def events(self, timeout_s: float) -> list[Event]:  # noqa: ARG002 - work here is done by waiting for it
        if self.worker is None:
            self.worker = Worker(self.setup, "inline")
            return [WorkerReady("inline", self.worker.describe())]
        if self.work is None:
            return []
        results = next(self.work, None)
        if results is None:
            self.work = None
            return [ChunkDone("inline")]
        return [BatchDone("inline", results)]


@dataclass(slots=True)
class Slot:
    """One card, or one CPU worker: the actor on it now, and how it has fared."""

    name: str
    actor: Any = None
    booting: Any = None  # reference to the actor's description
    working: Any = None  # generator of references to results
    ready: bool = False
    boot_failures: int = 0
    deaths: int = 0
    start_at: float = field(default_factory=time.monotonic)

    def clear(self) -> None:
        self.actor = self.booting = self.working = None
        self.ready = False


class RayPool:
    """One Ray actor per GPU, or CPU workers where there is none. Dead actors are replaced, with growing delays."""

    def __init__(
        self, setup: WorkerSetup, workers: int | None, cpu_workers: int, ray_init: dict[str, Any] | None = None
    ) -> None:
        self.setup = setup
        self.wanted = workers
        self.cpu_workers = cpu_workers
        self.ray_init = ray_init or {}
        self.slots: list[Slot] = []
        self.on_gpu = False
        self.last_fault = ""

    def __enter__(self) -> Self:
        ray = start_ray(self.ray_init)
        gpus = int(ray.cluster_resources().get("GPU", 0)) if self.setup.device != "cpu" else 0
        if self.setup.device == "cuda" and gpus == 0:
            stop_ray()
            raise NoWorkerError("--device cuda, but Ray sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
        self.on_gpu = gpus > 0
        count = min(self.wanted or gpus, gpus) if self.on_gpu else self.wanted or self.cpu_workers
        self.slots = [Slot(f"{'gpu' if self.on_gpu else 'cpu'}-{number}") for number in range(count)]
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for slot in self.slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
        stop_ray()

    @property
    def size(self) -> int:
        return len(self.slots)

    def idle(self) -> list[str]:
        return [slot.name for slot in self.slots if slot.ready and slot.working is None]

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)

    def submit(self, worker: str, chunk: Chunk) -> None:
        slot = self.slot(worker)
        slot.working = slot.actor.generate.options(num_returns="streaming").remote(chunk)

    def boot(self, slot: Slot) -> None:
        import ray

        # Restarts and retries are ours: Ray's would run a poisonous prompt for ever.
        actor_class = ray.remote(
            num_cpus=0, num_gpus=1 if self.on_gpu else 0, max_restarts=0, max_task_retries=0, max_concurrency=1
        )(Worker)
        slot.actor = actor_class.remote(self.setup, slot.name)
        slot.booting = slot.actor.describe.remote()

    def events(self, timeout_s: float) -> list[Event]:
        import ray

        if not self.slots:
            raise NoWorkerError(f"no worker is left: {self.last_fault}; `--inline` shows the error in this process")
        now = time.monotonic()
        for slot in self.slots:
            if slot.actor is None and slot.start_at <= now:
                self.boot(slot)
        waiting: dict[Any, Slot] = {
            reference: slot
            for slot in self.slots
            for reference in (slot.booting, slot.working)
            if reference is not None
        }
        if not waiting:
            time.sleep(min(timeout_s, max(0.0, min(slot.start_at for slot in self.slots) - now)))
            return []
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
        if not done:
            return []
        return [self.receive(waiting[reference]) for reference in done]

    def receive(self, slot: Slot) -> Event:
        import ray

        try:
            if slot.booting is not None:
                description = ray.get(slot.booting)
                slot.booting, slot.ready, slot.boot_failures = None, True, 0
                return WorkerReady(slot.name, description)
            return BatchDone(slot.name, ray.get(next(slot.working)))
        except StopIteration:
            slot.working = None
            slot.deaths = 0
            return ChunkDone(slot.name)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TinySDError):
                raise error.cause from None  # storage is full, say: the same on every worker
            return self.lose(slot, error)
        except ray.exceptions.RayError as error:
            return self.lose(slot, error)

    def retire(self, worker: str) -> None:
        self.slots = [slot for slot in self.slots if slot.name != worker]

    def lose(self, slot: Slot, error: Exception) -> WorkerLost:
        """Take the slot's actor as dead, and plan its replacement or give the slot up."""
        import ray

        booting = slot.booting is not None
        if booting and (ours := OUR_ERROR.search(str(error))):
            raise UsageError(ours[1].strip())  # the model or a setting is wrong, on every worker alike
        ray.kill(slot.actor)
        slot.clear()
        slot.deaths += 1
        self.last_fault = fault_line(error)
        slot.start_at = time.monotonic() + min(MAX_BACKOFF_S, 0.5 * 2 ** (slot.deaths - 1))
        if booting:
            slot.boot_failures += 1
            if slot.boot_failures >= BOOT_ATTEMPTS:
                self.retire(slot.name)
        return WorkerLost(slot.name, self.last_fault)


def cpu_workers(images: int, wanted: int | None, small_model: bool) -> tuple[int, int]:
    """How many workers where there is no GPU, and torch threads for each.

    A small model's tensors are too small to share: it gets a single-threaded worker per core, up to four. A big one
    gets all cores in one worker, since each holds a copy of torch and the model.
    """
    cores = usable_cores()
    count = wanted or max(1, min(cores, images, 4 if small_model else 1))
    return count, 1 if small_model else max(1, cores // count)
