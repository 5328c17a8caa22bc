"""Workers and how they are talked to: `InlinePool` runs one in this process, `RayPool` one actor per card.

A pool holds no work. The driver submits a chunk to an idle worker and reads events; one call is in flight per worker,
so that it is certain which images a dead worker was making.
"""

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from tinysd_batch.errors import BrokenWorkerError, NoWorkerError, TinySDError, UsageError
from tinysd_batch.job import handshake
from tinysd_batch.job.cluster import LOCAL, fault_line, start_ray, stop_ray
from tinysd_batch.job.failures import Fault, loss_of
from tinysd_batch.job.fleet import Card, cards_of, changes
from tinysd_batch.job.worker import Worker, WorkerSetup, usable_cores
from tinysd_batch.records import ImageResult, MicroBatch

Chunk = list[MicroBatch]

BOOT_ATTEMPTS = 2  # a card on which the model does not load is tried once more, then left out
BOOT_S = 1800.0  # for which a model may load
MAX_BACKOFF_S = 30.0
MAX_HOST_LOSSES = 3  # of a machine's last worker, for want of the machine's memory, in a row
LOOK_EVERY_S = 5.0  # for cards that came and went
BROKEN_EXIT_CODE = 70
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
    fault: Fault = Fault.WORKER_DIED
    for_good: bool = False  # no other process takes its place


Event = WorkerReady | BatchDone | ChunkDone | WorkerLost


class Pool(Protocol):
    """What the driver needs of its workers."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def workers(self) -> list[str]:
        """Workers that are there or will be."""
        ...

    def idle(self) -> list[str]:
        """Workers that are ready and have nothing to do."""
        ...

    def submit(self, worker: str, chunk: Chunk) -> None: ...

    def kill(self, worker: str, reason: str, fault: Fault) -> WorkerLost:
        """End a worker's process; another will take its place."""
        ...

    def retire(self, worker: str, reason: str) -> None:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.worker = self.work = None

    def workers(self) -> list[str]:
        return ["inline"]

    def idle(self) -> list[str]:
        return ["inline"] if self.worker is not None and self.work is None else []

    def submit(self, worker: str, chunk: Chunk) -> None:  # noqa: ARG002 - there is only one
        assert self.worker is not None
        self.work = self.worker.generate(chunk)

    def kill(self, worker: str, reason: str, fault: Fault) -> WorkerLost:  # noqa: ARG002 - there is only one
        raise NoWorkerError(f"the worker in this process failed: {reason}")

    def retire(self, worker: str, reason: str) -> None:
        raise NoWorkerError(f"the worker {worker} failed for good: {reason}")

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


class WorkerProcess(Worker):
    """A worker that has a process of its own."""

    def describe_to(self, word: str) -> dict[str, Any]:
        """`describe`, and the worker's part of the handshake."""
        import ray

        shares = handshake.answer(self.setup.scratch, word, self.name)
        return {**self.describe(), "shares_storage": shares, "node_id": ray.get_runtime_context().get_node_id()}

    def generate(self, batches: Sequence[MicroBatch]) -> Iterator[list[ImageResult]]:
        try:
            yield from super().generate(batches)
        except BrokenWorkerError:
            # What is broken in a CUDA context is so until the process ends; the driver's kill may never come.
            end = threading.Timer(2.0, os._exit, [BROKEN_EXIT_CODE])
            end.daemon = True
            end.start()
            raise


@dataclass(slots=True)
class Slot:
    """One card, or one CPU worker: the actor on it now, and how it has fared."""

    name: str
    card: Card | None = None
    node_id: str | None = None
    actor: Any = None
    booting: Any = None  # reference to the actor's description
    working: Any = None  # generator of references to results
    ready: bool = False
    boot_by: float = 0.0
    boot_failures: int = 0
    deaths: int = 0  # in a row
    start_at: float = field(default_factory=time.monotonic)

    def clear(self) -> None:
        self.actor = self.booting = self.working = None
        self.ready = False


class RayPool:
    """One Ray actor per GPU, or CPU workers where there is none. Dead actors are replaced, with growing delays.

    On a cluster (`ray_init` has an address) cards may join and leave at any time, and for some time there may be none.
    """

    process: type[WorkerProcess] = WorkerProcess  # what each actor is

    def __init__(
        self, setup: WorkerSetup, workers: int | None, cpu_workers: int, ray_init: dict[str, Any] | None = None,
        worker_wait_s: float = 600.0,
    ) -> None:  # fmt: skip
        self.setup = setup
        self.wanted = workers
        self.cpu_workers = cpu_workers
        self.ray_init = ray_init or {}
        self.worker_wait_s = worker_wait_s
        self.on_cluster = self.ray_init.get("address", LOCAL) != LOCAL
        self.slots: list[Slot] = []
        self.given_up: set[Card] = set()
        self.names = 0
        self.on_gpu = False
        self.last_fault = ""
        self.word = ""
        self.looked_at = self.had_workers_at = 0.0

    def __enter__(self) -> Self:
        ray = start_ray(self.ray_init)
        gpus = int(ray.cluster_resources().get("GPU", 0)) if self.setup.device != "cpu" else 0
        if self.setup.device == "cuda" and gpus == 0 and not self.on_cluster:
            stop_ray()
            raise NoWorkerError("--device cuda, but Ray sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
        self.on_gpu = gpus > 0 or self.setup.device == "cuda"
        self.word = handshake.offer(self.setup.scratch)
        if self.on_gpu:
            self.look_for_cards()
        else:
            for _ in range(self.wanted or self.cpu_workers):
                self.add_slot(None)
        self.had_workers_at = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for slot in self.slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
        stop_ray()

    def workers(self) -> list[str]:
        return [slot.name for slot in self.slots]

    def idle(self) -> list[str]:
        return [slot.name for slot in self.slots if slot.ready and slot.working is None]

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)

    def add_slot(self, card: Card | None) -> None:
        self.slots.append(Slot(f"{'gpu' if self.on_gpu else 'cpu'}-{self.names}", card))
        self.names += 1

    def submit(self, worker: str, chunk: Chunk) -> None:
        slot = self.slot(worker)
        slot.working = slot.actor.generate.options(num_returns="streaming").remote(chunk)

    def boot(self, slot: Slot) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {}
        if slot.card is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(slot.card.node, soft=False)
        # Restarts and retries are ours: Ray's would run a poisonous prompt for ever.
        actor_class = ray.remote(
            num_cpus=0, num_gpus=1 if self.on_gpu else 0, max_restarts=0, max_task_retries=0, max_concurrency=1,
            **options,
        )(self.process)  # fmt: skip
        slot.actor = actor_class.remote(self.setup, slot.name)
        slot.booting = slot.actor.describe_to.remote(self.word)
        slot.boot_by = time.monotonic() + BOOT_S

    def events(self, timeout_s: float) -> list[Event]:
        import ray

        left = self.look_for_cards()
        now = time.monotonic()
        if not self.slots:
            self.wait_for_workers(timeout_s, now)
            return left
        self.had_workers_at = now
        for slot in self.slots:
            if slot.actor is None and slot.start_at <= now:
                self.boot(slot)
        overdue = [slot for slot in self.slots if slot.booting is not None and slot.boot_by <= now]
        left += [self.lose(slot, Fault.HUNG, f"not ready after {BOOT_S:,.0f} s") for slot in overdue]
        waiting: dict[Any, Slot] = {
            reference: slot
            for slot in self.slots
            for reference in (slot.booting, slot.working)
            if reference is not None
        }
        if left or not waiting:
            starts = [slot.start_at for slot in self.slots if slot.actor is None]
            time.sleep(0.0 if left else min(timeout_s, max(0.0, min(starts, default=now + timeout_s) - now)))
            return left
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
        return [self.receive(waiting[reference]) for reference in done]

    def look_for_cards(self) -> list[Event]:
        """Begin with cards that joined, and lose those whose node left; every few seconds."""
        import ray

        now = time.monotonic()
        if not self.on_gpu or (self.looked_at and now - self.looked_at < LOOK_EVERY_S):
            return []
        self.looked_at = now
        known = [slot.card for slot in self.slots if slot.card is not None]
        new, gone = changes(known, self.given_up, cards_of(ray.nodes()), self.wanted)
        lost = [slot for slot in self.slots if slot.card in gone]
        events: list[Event] = [self.lose(slot, Fault.NODE_LOST, "its machine left the cluster") for slot in lost]
        for card in new:
            self.add_slot(card)
        return events

    def wait_for_workers(self, timeout_s: float, now: float) -> None:
        """Raises NoWorkerError where none can come, or none came in time."""
        if not self.on_cluster or now - self.had_workers_at > self.worker_wait_s:
            waited = f" for {self.worker_wait_s:,.0f} s" if self.on_cluster else ""
            cause = self.last_fault or "the cluster has no GPU"
            raise NoWorkerError(f"no worker is left{waited}: {cause}; `--inline` shows errors in this process")
        time.sleep(timeout_s)

    def receive(self, slot: Slot) -> Event:
        import ray

        try:
            if slot.booting is not None:
                return self.welcome(slot, ray.get(slot.booting))
            results = ray.get(next(slot.working))
            slot.deaths = 0
            return BatchDone(slot.name, results)
        except StopIteration:
            slot.working = None
            return ChunkDone(slot.name)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BrokenWorkerError):
                return self.lose(slot, Fault.DEVICE_BROKEN, str(error.cause))
            if isinstance(error.cause, TinySDError):
                raise error.cause from None  # storage is full, say: the same on every worker
            return self.lose(slot, Fault.WORKER_DIED, fault_line(error))
        except ray.exceptions.RayError as error:
            self.stop_where_all_would_fail(slot, error)
            return self.lose(slot, loss_of(error, self.is_dead(slot.node_id)), fault_line(error))

    def welcome(self, slot: Slot, description: dict[str, Any]) -> Event:
        slot.booting, slot.node_id = None, description["node_id"]
        try:
            handshake.check(description, self.setup.scratch, self.word, slot.name, self.setup.model_digest)
        except NoWorkerError as error:
            return self.lose(slot, Fault.REFUSED, str(error))
        slot.ready, slot.boot_failures = True, 0
        return WorkerReady(slot.name, description)

    def stop_where_all_would_fail(self, slot: Slot, error: Exception) -> None:
        """Raises UsageError where the model or a setting is wrong, on every worker alike: on a single machine."""
        ours = OUR_ERROR.search(str(error)) if slot.booting is not None and not self.on_cluster else None
        if ours:
            raise UsageError(ours[1].strip())

    def is_dead(self, node_id: str | None) -> bool:
        """Whether a node has left the cluster. A Ray of our own is not asked: one that is ending does not answer."""
        import ray

        return (
            self.on_cluster
            and node_id is not None
            and not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)
        )

    def kill(self, worker: str, reason: str, fault: Fault) -> WorkerLost:
        return self.lose(self.slot(worker), fault, reason)

    def retire(self, worker: str, reason: str) -> None:
        import ray

        slot = self.slot(worker)
        if slot.actor is not None:
            ray.kill(slot.actor)
        if slot.card is not None:
            self.given_up.add(slot.card)
        self.slots.remove(slot)
        self.last_fault = f"{worker}: {reason}"

    def lose(self, slot: Slot, fault: Fault, reason: str) -> WorkerLost:
        """Take the slot's actor as dead, and plan its replacement or give the slot up."""
        import ray

        was_ready = slot.ready
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.clear()
        slot.deaths += 1
        slot.boot_failures += not was_ready and fault is not Fault.NODE_LOST
        slot.start_at = time.monotonic() + min(MAX_BACKOFF_S, 0.5 * 2 ** (slot.deaths - 1))
        self.last_fault = f"{slot.name}: {reason}"
        for_good = self.is_given_up(slot, fault)
        if for_good:
            self.retire(slot.name, reason)
        return WorkerLost(slot.name, reason, fault, for_good)

    def is_given_up(self, slot: Slot, fault: Fault) -> bool:
        if fault is Fault.HOST_OUT_OF_MEMORY:
            neighbours = sum(other.node_id == slot.node_id for other in self.slots)
            return neighbours > 1 or slot.deaths >= MAX_HOST_LOSSES
        if fault is Fault.NODE_LOST:
            return slot.card is not None and self.is_dead(slot.card.node)
        return fault is Fault.REFUSED or slot.boot_failures >= BOOT_ATTEMPTS


def cpu_workers(images: int, wanted: int | None, small_model: bool) -> tuple[int, int]:
    """How many workers where there is no GPU, and torch threads for each.

    A small model's tensors are too small to share: it gets a single-threaded worker per core, up to four. A big one
    gets all cores in one worker, since each holds a copy of torch and the model.
    """
    cores = usable_cores()
    count = wanted or max(1, min(cores, images, 4 if small_model else 1))
    return count, 1 if small_model else max(1, cores // count)
