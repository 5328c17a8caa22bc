"""Workers as Ray actors: one per GPU, or some on the CPU. What each is on and how it fares is in `slots`."""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, TypeVar

from tinysd_batch.errors import BrokenWorkerError, NoWorkerError, TinySDError, UsageError
from tinysd_batch.job.job_log import LOG_FILE_NAME
from tinysd_batch.job.ray_workers import handshake
from tinysd_batch.job.ray_workers.bounded_calls import CALL_TIMEOUT_S, RayLostError
from tinysd_batch.job.ray_workers.cluster import RaySession, summarize_ray_error
from tinysd_batch.job.ray_workers.local_ray import INLINE_HINT
from tinysd_batch.job.ray_workers.result_batches import ResultBatch
from tinysd_batch.job.ray_workers.slots import (
    Placement,
    WorkerSlot,
    choose_worker_name,
    diff_placements,
    host_names_by_node,
    list_cpu_placements,
    list_gpu_placements,
)
from tinysd_batch.job.ray_workers.worker_process import WorkerProcess
from tinysd_batch.job.workers.faults import FaultType, classify_worker_loss
from tinysd_batch.job.workers.pool import BatchDone, Chunk, ChunkDone, WorkerEvent, WorkerLost, WorkerReady
from tinysd_batch.job.workers.worker import WorkerSetup

WORKER_START_TIMEOUT_S = 1800.0  # for which a model may load
NODE_REFRESH_S = 5.0  # for cards that came and went
NODE_REFRESH_WHEN_UNREACHABLE_S = 1.0  # when a machine may be lost
UNREACHABLE_TIMEOUT_S = 60.0  # for which a worker waits to hear that; Ray takes some 20
MAX_RAY_RESTARTS = 2  # of a Ray of our own that stopped in the middle of a run
RESUME_HINT = "the same command goes on where it stopped"
ReturnValue = TypeVar("ReturnValue")
USER_ERROR_PATTERN = re.compile(r"tinysd_batch\.errors\.(?:ModelError|UsageError): (.*)")


class RayPool:
    """One Ray actor per GPU, or CPU workers where there is none. Dead actors are replaced, with growing delays.

    On a cluster (`ray_init` has an address) machines may join and leave at any time, and for some time there may be
    none; without GPUs each gets CPU workers by its cores.
    """

    worker_class: type[WorkerProcess] = WorkerProcess  # what each actor is

    def __init__(
        self, setup: WorkerSetup, workers: int | None, cpu_workers: int, ray_init: dict[str, Any] | None = None,
        worker_wait_s: float = 600.0,
    ) -> None:  # fmt: skip
        self.setup = setup
        self.max_workers = workers
        self.cpu_workers = cpu_workers
        self.ray_init = ray_init or {}
        self.worker_wait_s = worker_wait_s
        self.session = RaySession(self.ray_init, setup.scratch.parent / LOG_FILE_NAME)
        self.is_cluster = not self.session.is_local
        self.slots: list[WorkerSlot] = []
        self.retired_placements: set[Placement] = set()
        self.host_names: dict[str, str] = {}  # names by Ray's id of the node
        self.uses_gpus = False
        self.ray_restarts = 0
        self.ray_error: RayLostError | None = None  # outside of `events`, which is to answer it
        self.last_loss = ""
        self.handshake_token = ""
        self.nodes_checked_at = self.had_workers_at = 0.0

    def __enter__(self) -> Self:
        self.session.start()
        try:
            self.create_slots()
        except BaseException:
            self.session.stop()
            raise
        return self

    def create_slots(self) -> None:
        import ray

        gpus = int(self.call(ray.cluster_resources).get("GPU", 0)) if self.setup.device != "cpu" else 0
        if self.setup.device == "cuda" and gpus == 0 and not self.is_cluster:
            raise NoWorkerError("--device cuda, but Ray sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
        self.uses_gpus = gpus > 0 or self.setup.device == "cuda"
        self.handshake_token = handshake.write_driver_file(self.setup.scratch)
        if self.uses_gpus or self.is_cluster:
            self.refresh_slots()
        else:
            for _ in range(self.max_workers or self.cpu_workers):
                self.add_slot(None)
        self.had_workers_at = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        for slot in self.slots:
            self.kill_actor(slot)
        self.session.stop(is_lost=self.ray_error is not None)

    def call(self, function: Callable[[], ReturnValue], limit_s: float = CALL_TIMEOUT_S) -> ReturnValue:
        return self.session.call(function, limit_s)

    def workers(self) -> list[str]:
        return [slot.name for slot in self.slots]

    def idle_workers(self) -> list[str]:
        return [slot.name for slot in self.slots if slot.is_idle]

    def get_slot(self, name: str) -> WorkerSlot:
        return next(slot for slot in self.slots if slot.name == name)

    def add_slot(self, card: Placement | None) -> None:
        machine = platform.node() if card is None else self.host_names.get(card.node, card.node)
        device = "cuda" if self.uses_gpus else "cpu"
        name = choose_worker_name(machine, device, 0 if card is None else card.index, self.workers())
        self.slots.append(WorkerSlot(name, card))

    def submit(self, worker: str, chunk: Chunk) -> None:
        slot = self.get_slot(worker)
        try:
            slot.pending_results = self.call(
                lambda: slot.actor.run_chunk.options(num_returns="streaming").remote(chunk)
            )
        except RayLostError as error:
            self.ray_error = error

    def start_actor(self, slot: WorkerSlot) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {}
        if slot.placement is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(slot.placement.node, soft=False)
        # Restarts and retries are ours: Ray's would run a poisonous prompt for ever.
        actor_class = ray.remote(
            num_cpus=0, num_gpus=1 if self.uses_gpus else 0, max_restarts=0, max_task_retries=0, max_concurrency=1,
            **options,
        )(self.worker_class)  # fmt: skip

        def start() -> tuple[Any, Any]:
            actor = actor_class.remote(self.setup, slot.name)
            return actor, actor.answer_handshake.remote(self.handshake_token, slot.memory_limits)

        slot.actor, slot.pending_description = self.call(start)
        slot.start_deadline = time.monotonic() + WORKER_START_TIMEOUT_S

    def wait_for_events(self, timeout_s: float) -> list[WorkerEvent]:
        try:
            if self.ray_error is not None:
                raise self.ray_error
            self.session.check_alive()
            return self.poll_ray(timeout_s)
        except RayLostError as error:
            return self.restart_ray(error)

    def poll_ray(self, timeout_s: float) -> list[WorkerEvent]:
        """Raises RayLostError."""
        import ray

        left = self.refresh_slots()
        now = time.monotonic()
        if not self.slots:
            self.wait_for_workers(timeout_s, now)
            return left
        self.had_workers_at = now
        for slot in self.slots:
            if slot.actor is None and slot.next_start_at <= now:
                self.start_actor(slot)
        overdue = [slot for slot in self.slots if slot.pending_description is not None and slot.start_deadline <= now]
        left += [
            self.handle_worker_loss(slot, FaultType.HUNG, f"not ready after {WORKER_START_TIMEOUT_S:,.0f} s")
            for slot in overdue
        ]
        left += [
            self.handle_worker_loss(slot, FaultType.NODE_LOST, slot.unreachable_reason)
            for slot in self.slots
            if slot.unreachable_reason is not None and slot.unreachable_until <= now
        ]
        waiting: dict[Any, WorkerSlot] = {
            reference: slot
            for slot in self.slots
            for reference in (slot.pending_description, slot.pending_results)
            if reference is not None
        }
        if left or not waiting:
            starts = [slot.next_start_at for slot in self.slots if slot.actor is None]
            time.sleep(0.0 if left else min(timeout_s, max(0.0, min(starts, default=now + timeout_s) - now)))
            return left
        done, _ = self.call(
            lambda: ray.wait(list(waiting), num_returns=1, timeout=timeout_s), timeout_s + CALL_TIMEOUT_S
        )
        if done:  # and what else there is by now
            done, _ = self.call(lambda: ray.wait(list(waiting), num_returns=len(waiting), timeout=0))
        self.session.check_alive()  # else each worker's end would be taken for its own fault
        return [event for reference in done for event in self.receive_or_store_error(waiting[reference])]

    def restart_ray(self, error: RayLostError) -> list[WorkerEvent]:
        """Start a Ray of our own anew; all workers are lost with the old one. Raises NoWorkerError."""
        self.ray_error = error
        if self.is_cluster:
            raise NoWorkerError(f"--address {self.session.address}: {error}; {RESUME_HINT}") from error
        self.ray_restarts += 1
        if self.ray_restarts > MAX_RAY_RESTARTS:
            raise NoWorkerError(
                f"{error}, for the {format_ordinal(self.ray_restarts)} time; {RESUME_HINT}; {INLINE_HINT}"
            ) from error
        cause = f"{error}; it was started again"
        lost: list[WorkerEvent] = [
            replace(self.handle_worker_loss(slot, FaultType.NODE_LOST, str(error)), shared_cause=cause)
            for slot in self.slots
        ]
        self.session.stop(is_lost=True)
        self.session.start()
        self.ray_error = None
        self.update_node_ids()
        return lost

    def update_node_ids(self) -> None:
        """The machine is the same, but Ray has given it another id."""
        nodes = self.session.nodes()
        self.host_names = host_names_by_node(nodes)
        node = next(iter(self.host_names))
        for slot in self.slots:
            slot.placement = None if slot.placement is None else replace(slot.placement, node=node)
        self.retired_placements = {replace(card, node=node) for card in self.retired_placements}

    def refresh_slots(self) -> list[WorkerEvent]:
        """Begin with cards that joined, and lose those whose node left; every few seconds."""
        now = time.monotonic()
        pause_s = (
            NODE_REFRESH_WHEN_UNREACHABLE_S if any(slot.unreachable_reason for slot in self.slots) else NODE_REFRESH_S
        )
        if self.nodes_checked_at and now - self.nodes_checked_at < pause_s:
            return []
        nodes = self.session.nodes()
        self.nodes_checked_at = now
        if not (self.uses_gpus or self.is_cluster):
            return []
        self.host_names |= host_names_by_node(nodes)
        present = (
            list_gpu_placements(nodes)
            if self.uses_gpus
            else list_cpu_placements(nodes, self.cpu_workers, self.max_workers)
        )
        known = [slot.placement for slot in self.slots if slot.placement is not None]
        new, gone = diff_placements(known, self.retired_placements, present, self.max_workers)
        events = [event for node in dict.fromkeys(card.node for card in gone) for event in self.handle_node_loss(node)]
        for card in new:
            self.add_slot(card)
        return events

    def handle_node_loss(self, node: str) -> list[WorkerEvent]:
        """Take all workers of a machine that left the cluster as lost."""
        cause = f"machine {self.host_names.get(node, node)} is lost"
        slots = [slot for slot in self.slots if slot.placement is not None and slot.placement.node == node]
        return [
            replace(
                self.handle_worker_loss(slot, FaultType.NODE_LOST, "its machine left the cluster"), shared_cause=cause
            )
            for slot in slots
        ]

    def wait_for_workers(self, timeout_s: float, now: float) -> None:
        """Raises NoWorkerError where none can come, or none came in time."""
        if not self.is_cluster or now - self.had_workers_at > self.worker_wait_s:
            waited = f" for {self.worker_wait_s:,.0f} s" if self.is_cluster else ""
            cause = self.last_loss or f"the cluster has no {'GPU' if self.uses_gpus else 'processor to give'}"
            raise NoWorkerError(f"no worker is left{waited}: {cause}; `--inline` shows errors in this process")
        time.sleep(timeout_s)

    def receive_or_store_error(self, slot: WorkerSlot) -> list[WorkerEvent]:
        """`receive`; what other workers sent is not lost where Ray stops answering meanwhile."""
        try:
            return self.receive(slot)
        except RayLostError as error:
            self.ray_error = error
            return []

    def receive(self, slot: WorkerSlot) -> list[WorkerEvent]:
        import ray

        try:
            if slot.pending_description is not None:
                return [self.finish_start(slot, self.call(lambda: ray.get(slot.pending_description)))]
            parcel: ResultBatch = ray.get(next(slot.pending_results))
            slot.record_results(parcel.memory_limits)
            return [BatchDone(slot.name, made.results, made.seconds) for made in parcel.micro_batches]
        except StopIteration:
            slot.pending_results = None
            return [ChunkDone(slot.name)]
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BrokenWorkerError):
                return [self.handle_worker_loss(slot, FaultType.DEVICE_BROKEN, str(error.cause))]
            if isinstance(error.cause, TinySDError):
                raise error.cause from None  # storage is full, say: the same on every worker
            return [self.handle_worker_loss(slot, FaultType.WORKER_DIED, summarize_ray_error(error))]
        except ray.exceptions.RayError as error:
            self.raise_user_error(slot, error)
            return self.handle_loss(slot, classify_worker_loss(error), summarize_ray_error(error))

    def handle_loss(self, slot: WorkerSlot, fault: FaultType, reason: str) -> list[WorkerEvent]:
        if self.is_cluster and slot.placement is not None:
            if self.is_dead(slot.placement.node):
                return self.handle_node_loss(slot.placement.node)
            if fault is FaultType.NODE_LOST:
                slot.mark_unreachable(reason, time.monotonic() + UNREACHABLE_TIMEOUT_S)
                return []
        return [self.handle_worker_loss(slot, fault, reason)]

    def finish_start(self, slot: WorkerSlot, description: dict[str, Any]) -> WorkerEvent:
        slot.record_started(description["node_id"])
        try:
            handshake.check_worker(
                description, self.setup.scratch, self.handshake_token, slot.name, self.setup.model_digest
            )
        except NoWorkerError as error:
            return self.handle_worker_loss(slot, FaultType.REFUSED, str(error))
        slot.mark_ready()
        return WorkerReady(slot.name, description)

    def raise_user_error(self, slot: WorkerSlot, error: Exception) -> None:
        """Raises UsageError where the model or a setting is wrong, on every worker alike: on a single machine."""
        ours = (
            USER_ERROR_PATTERN.search(str(error))
            if slot.pending_description is not None and not self.is_cluster
            else None
        )
        if ours:
            raise UsageError(ours[1].strip())

    def is_dead(self, node_id: str) -> bool:
        """Whether a node has left the cluster. A Ray of our own is not asked: one that is ending does not answer."""
        if not self.is_cluster or self.ray_error is not None:
            return False
        try:
            nodes = self.session.nodes()
        except RayLostError as error:
            self.ray_error = error
            return False
        return not any(node["Alive"] for node in nodes if node["NodeID"] == node_id)

    def kill(self, worker: str, reason: str, fault: FaultType) -> WorkerLost:
        return self.handle_worker_loss(self.get_slot(worker), fault, reason)

    def retire(self, worker: str, reason: str) -> None:
        slot = self.get_slot(worker)
        self.kill_actor(slot)
        if slot.placement is not None:
            self.retired_placements.add(slot.placement)
        self.slots.remove(slot)
        self.last_loss = f"{worker}: {reason}"

    def kill_actor(self, slot: WorkerSlot) -> None:
        import ray

        actor, slot.actor = slot.actor, None
        if actor is not None and self.ray_error is None:
            try:
                self.call(lambda: ray.kill(actor))
            except RayLostError as error:
                self.ray_error = error

    def handle_worker_loss(self, slot: WorkerSlot, fault: FaultType, reason: str) -> WorkerLost:
        """Take the slot's actor as dead, and plan its replacement or give the slot up."""
        self.kill_actor(slot)
        slot.record_loss(fault, time.monotonic())
        self.last_loss = f"{slot.name}: {reason}"
        machine_is_gone = (
            fault is FaultType.NODE_LOST and slot.placement is not None and self.is_dead(slot.placement.node)
        )
        for_good = slot.should_retire(fault, self.slots, machine_is_gone)
        if for_good:
            self.retire(slot.name, reason)
        return WorkerLost(slot.name, reason, fault, for_good)


def format_ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
