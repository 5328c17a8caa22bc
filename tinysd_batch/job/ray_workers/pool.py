"""Run workers as Ray actors: one per GPU, or some on CPUs. `slots` holds where each runs and its state."""

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, TypeVar

from tinysd_batch.errors import BrokenWorkerError, NoWorkerError, TinySDError, UsageError
from tinysd_batch.job.job_log import LOG_FILE_NAME
from tinysd_batch.job.ray_workers import handshake
from tinysd_batch.job.ray_workers.bounded_calls import CALL_TIMEOUT_S, RayLostError
from tinysd_batch.job.ray_workers.cluster import RaySession, find_user_error, summarize_ray_error
from tinysd_batch.job.ray_workers.local_ray import INLINE_HINT
from tinysd_batch.job.ray_workers.result_batches import ResultBatch
from tinysd_batch.job.ray_workers.worker_process import WorkerProcess
from tinysd_batch.job.ray_workers.worker_slots import (
    Placement,
    WorkerSlot,
    choose_worker_name,
    diff_placements,
    host_names_by_node,
    is_node_dead,
    list_cpu_placements,
    list_gpu_placements,
)
from tinysd_batch.job.workers.faults import FaultType, classify_worker_loss
from tinysd_batch.job.workers.pool import BatchDone, Chunk, ChunkDone, WorkerEvent, WorkerLost, WorkerReady
from tinysd_batch.job.workers.worker import WorkerSetup

WORKER_START_TIMEOUT_S = 1800.0  # includes loading the model
NODE_REFRESH_S = 5.0  # how often to look for nodes that joined or left
NODE_REFRESH_WHEN_UNREACHABLE_S = 1.0  # the same, while a node may be lost
UNREACHABLE_TIMEOUT_S = 60.0  # after which an unreachable worker counts as lost; Ray declares a node dead after 20 s
MAX_RAY_RESTARTS = 2  # of a local Ray that stopped during a run
RESUME_HINT = "run the same command again to resume"
ReturnValue = TypeVar("ReturnValue")


class RayPool:
    """One Ray actor per GPU, or CPU workers if there is no GPU. Lost actors are replaced, with growing delays.

    On a cluster (`ray_init` has an address) machines may join and leave at any time, and for a while there may be none.
    Without GPUs, each machine gets CPU workers by its number of cores.
    """

    worker_class: type[WorkerProcess] = WorkerProcess  # of the actors

    def __init__(
        self,
        setup: WorkerSetup,
        workers: int | None,
        cpu_workers: int,
        ray_init: dict[str, Any] | None = None,
        worker_wait_s: float = 600.0,
    ) -> None:
        """Create the pool. It starts when it is entered.

        Args:
            setup: of each worker.
            workers: the number that the user asks for: the most in all, and the number of CPU workers on each machine.
            cpu_workers: CPU workers on a machine, unless the user asks for a number.
            ray_init: options of `ray.init`.
            worker_wait_s: how long to wait for a worker on a cluster that has none.
        """
        self.setup = setup
        self.max_workers = workers
        self.cpu_workers = cpu_workers
        self.ray_init = ray_init or {}
        self.worker_wait_s = worker_wait_s
        self.session = RaySession(self.ray_init, setup.scratch.parent / LOG_FILE_NAME)
        self.is_cluster = not self.session.is_local
        self.slots: list[WorkerSlot] = []
        self.retired_placements: set[Placement] = set()
        self.host_names: dict[str, str] = {}  # by Ray's node ID
        self.uses_gpus = False
        self.ray_restarts = 0
        self.ray_error: RayLostError | None = None  # raised elsewhere, to be handled by the next `wait_for_events`
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

        gpus = int(self.call_ray(ray.cluster_resources).get("GPU", 0)) if self.setup.settings.device != "cpu" else 0
        if self.setup.settings.device == "cuda" and gpus == 0 and not self.is_cluster:
            raise NoWorkerError("--device cuda, but Ray sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
        self.uses_gpus = gpus > 0 or self.setup.settings.device == "cuda"
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

    def call_ray(self, function: Callable[[], ReturnValue], timeout_s: float = CALL_TIMEOUT_S) -> ReturnValue:
        return self.session.call(function, timeout_s)

    def workers(self) -> list[str]:
        return [slot.name for slot in self.slots]

    def idle_workers(self) -> list[str]:
        return [slot.name for slot in self.slots if slot.is_idle]

    def get_slot(self, name: str) -> WorkerSlot:
        return next(slot for slot in self.slots if slot.name == name)

    def add_slot(self, placement: Placement | None) -> None:
        device = "cuda" if self.uses_gpus else "cpu"
        if placement is None:
            machine, number = platform.node(), 0
        else:
            machine, number = self.host_names.get(placement.node_id, placement.node_id), placement.index
        self.slots.append(WorkerSlot(choose_worker_name(machine, device, number, self.workers()), placement))

    def submit(self, worker: str, chunk: Chunk) -> None:
        slot = self.get_slot(worker)
        try:
            slot.pending_results = self.call_ray(
                lambda: slot.actor.run_chunk.options(num_returns="streaming").remote(chunk)
            )
        except RayLostError as error:
            self.ray_error = error

    def start_actor(self, slot: WorkerSlot) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {}
        if slot.placement is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(slot.placement.node_id, soft=False)
        # The dispatcher decides about restarts and retries: Ray would retry an image that kills its worker forever.
        actor_class = ray.remote(
            num_cpus=0, num_gpus=int(self.uses_gpus), max_restarts=0, max_task_retries=0, max_concurrency=1, **options
        )(self.worker_class)

        def start() -> tuple[Any, Any]:
            actor = actor_class.remote(self.setup, slot.name)
            return actor, actor.answer_handshake.remote(self.handshake_token, slot.memory_limits)

        slot.actor, slot.pending_description = self.call_ray(start)
        slot.start_deadline = time.monotonic() + WORKER_START_TIMEOUT_S

    def wait_for_events(self, timeout_s: float) -> list[WorkerEvent]:
        try:
            if self.ray_error is not None:
                raise self.ray_error
            self.session.check_alive()
            self.session.rotate_log_if_large()
            return self.poll_ray(timeout_s)
        except RayLostError as error:
            return self.restart_ray(error)

    def poll_ray(self, timeout_s: float) -> list[WorkerEvent]:
        """Update the slots, and wait for results. Raises RayLostError."""
        import ray

        losses = self.refresh_slots()
        now = time.monotonic()
        if not self.slots:
            self.wait_for_workers(timeout_s, now)
            return losses
        self.had_workers_at = now
        for slot in self.slots:
            if slot.actor is None and slot.next_start_at <= now:
                self.start_actor(slot)
        losses += self.handle_expired_slots(now)
        pending: dict[Any, WorkerSlot] = {
            reference: slot
            for slot in self.slots
            for reference in (slot.pending_description, slot.pending_results)
            if reference is not None
        }
        if losses or not pending:
            starts = [slot.next_start_at for slot in self.slots if slot.actor is None]
            time.sleep(0.0 if losses else min(timeout_s, max(0.0, min(starts, default=now + timeout_s) - now)))
            return losses
        ready, _ = self.call_ray(
            lambda: ray.wait(list(pending), num_returns=1, timeout=timeout_s), timeout_s + CALL_TIMEOUT_S
        )
        if ready:  # get all that is ready by now
            ready, _ = self.call_ray(lambda: ray.wait(list(pending), num_returns=len(pending), timeout=0))
        self.session.check_alive()  # otherwise the loss of each worker would be counted against the worker
        return [event for reference in ready for event in self.receive_or_store_error(pending[reference])]

    def handle_expired_slots(self, now: float) -> list[WorkerEvent]:
        """Handle the loss of workers that did not start in time, or have been unreachable for too long."""
        overdue = [slot for slot in self.slots if slot.pending_description is not None and slot.start_deadline <= now]
        losses: list[WorkerEvent] = [
            self.handle_worker_loss(slot, FaultType.HUNG, f"not ready after {WORKER_START_TIMEOUT_S:,.0f} s")
            for slot in overdue
        ]
        losses += [
            self.handle_worker_loss(slot, FaultType.NODE_LOST, slot.unreachable_reason)
            for slot in self.slots
            if slot.unreachable_reason is not None and slot.unreachable_until <= now
        ]
        return losses

    def restart_ray(self, error: RayLostError) -> list[WorkerEvent]:
        """Restart a local Ray. All workers are lost with the old one.

        Raises:
            NoWorkerError: it is a cluster's Ray, or it was restarted too often.
        """
        self.ray_error = error
        if self.is_cluster:
            raise NoWorkerError(f"--address {self.session.address}: {error}; {RESUME_HINT}") from error
        self.ray_restarts += 1
        if self.ray_restarts > MAX_RAY_RESTARTS:
            raise NoWorkerError(
                f"{error}, for the {format_ordinal(self.ray_restarts)} time; {RESUME_HINT}; {INLINE_HINT}"
            ) from error
        cause = f"{error}; it was started again"
        losses: list[WorkerEvent] = [
            replace(self.handle_worker_loss(slot, FaultType.NODE_LOST, str(error)), shared_cause=cause)
            for slot in self.slots
        ]
        self.session.stop(is_lost=True)
        self.session.start()
        self.ray_error = None
        self.update_node_ids()
        return losses

    def update_node_ids(self) -> None:
        """Replace node IDs after a restart of a local Ray: the machine is the same, but its ID is another."""
        nodes = self.session.list_nodes()
        self.host_names = host_names_by_node(nodes)
        node_id = next(iter(self.host_names))
        for slot in self.slots:
            slot.placement = None if slot.placement is None else replace(slot.placement, node_id=node_id)
        self.retired_placements = {replace(placement, node_id=node_id) for placement in self.retired_placements}

    def refresh_slots(self) -> list[WorkerEvent]:
        """Every few seconds, add slots for GPUs and nodes that joined, and handle the loss of nodes that left."""
        now = time.monotonic()
        is_any_unreachable = any(slot.unreachable_reason for slot in self.slots)
        interval_s = NODE_REFRESH_WHEN_UNREACHABLE_S if is_any_unreachable else NODE_REFRESH_S
        if self.nodes_checked_at and now - self.nodes_checked_at < interval_s:
            return []
        nodes = self.session.list_nodes()
        self.nodes_checked_at = now
        if not (self.uses_gpus or self.is_cluster):
            return []
        self.host_names |= host_names_by_node(nodes)
        if self.uses_gpus:
            available = list_gpu_placements(nodes)
        else:
            available = list_cpu_placements(nodes, self.cpu_workers, self.max_workers)
        current = [slot.placement for slot in self.slots if slot.placement is not None]
        new, gone = diff_placements(current, self.retired_placements, available, self.max_workers)
        lost_nodes = dict.fromkeys(placement.node_id for placement in gone)
        events = [event for node_id in lost_nodes for event in self.handle_node_loss(node_id)]
        for placement in new:
            self.add_slot(placement)
        return events

    def handle_node_loss(self, node_id: str) -> list[WorkerEvent]:
        """Handle the loss of all workers of a machine that left the cluster."""
        cause = f"machine {self.host_names.get(node_id, node_id)} is lost"
        reason = "its machine left the cluster"
        slots = [slot for slot in self.slots if slot.placement is not None and slot.placement.node_id == node_id]
        return [
            replace(self.handle_worker_loss(slot, FaultType.NODE_LOST, reason), shared_cause=cause) for slot in slots
        ]

    def wait_for_workers(self, timeout_s: float, now: float) -> None:
        """Sleep while the cluster has no worker. Raises NoWorkerError if none can come, or none came in time."""
        if not self.is_cluster or now - self.had_workers_at > self.worker_wait_s:
            waited = f" for {self.worker_wait_s:,.0f} s" if self.is_cluster else ""
            cause = self.last_loss or f"the cluster has no {'GPU' if self.uses_gpus else 'CPU resources'}"
            raise NoWorkerError(f"no worker is left{waited}: {cause}; `--inline` shows errors in this process")
        time.sleep(timeout_s)

    def receive_or_store_error(self, slot: WorkerSlot) -> list[WorkerEvent]:
        """Receive events. If Ray no longer answers, keep that for later, so that other workers' events are not lost."""
        try:
            return self.receive(slot)
        except RayLostError as error:
            self.ray_error = error
            return []

    def receive(self, slot: WorkerSlot) -> list[WorkerEvent]:
        """Return the events of a worker whose description or next result is ready. Raises RayLostError."""
        import ray

        try:
            if slot.pending_description is not None:
                return [self.finish_start(slot, self.call_ray(lambda: ray.get(slot.pending_description)))]
            result_batch: ResultBatch = ray.get(next(slot.pending_results))
            slot.record_results(result_batch.memory_limits)
            return [BatchDone(slot.name, batch.results, batch.seconds) for batch in result_batch.micro_batches]
        except StopIteration:
            slot.pending_results = None
            return [ChunkDone(slot.name)]
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BrokenWorkerError):
                return [self.handle_worker_loss(slot, FaultType.DEVICE_BROKEN, str(error.cause))]
            if isinstance(error.cause, TinySDError):
                raise error.cause from None  # such as full storage, which concerns all workers
            return [self.handle_worker_loss(slot, FaultType.WORKER_DIED, summarize_ray_error(error))]
        except ray.exceptions.RayError as error:
            self.raise_user_error(slot, error)
            return self.handle_loss(slot, classify_worker_loss(error), summarize_ray_error(error))

    def handle_loss(self, slot: WorkerSlot, fault: FaultType, reason: str) -> list[WorkerEvent]:
        """Handle the loss of a worker, or of its machine. Wait if Ray does not know yet which of the two it is."""
        if self.is_cluster and slot.placement is not None:
            nodes = self.list_nodes_or_store_error()
            if nodes is not None and is_node_dead(slot.placement.node_id, nodes):
                return self.handle_node_loss(slot.placement.node_id)
            if fault is FaultType.NODE_LOST:
                slot.mark_unreachable(reason, time.monotonic() + UNREACHABLE_TIMEOUT_S)
                return []
        return [self.handle_worker_loss(slot, fault, reason)]

    def finish_start(self, slot: WorkerSlot, description: dict[str, Any]) -> WorkerEvent:
        """Check the worker's handshake, and take it into service or refuse it."""
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
        """Raise UsageError if a wrong model or setting kept a worker from starting: on one machine it affects all."""
        message = find_user_error(error)
        if message is not None and slot.pending_description is not None and not self.is_cluster:
            raise UsageError(message)

    def list_nodes_or_store_error(self) -> list[dict[str, Any]] | None:
        """Return the cluster's nodes. None for a local Ray, which may be stopping, or if Ray does not answer."""
        if not self.is_cluster or self.ray_error is not None:
            return None
        try:
            return self.session.list_nodes()
        except RayLostError as error:
            self.ray_error = error
            return None

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
                self.call_ray(lambda: ray.kill(actor))
            except RayLostError as error:
                self.ray_error = error

    def handle_worker_loss(self, slot: WorkerSlot, fault: FaultType, reason: str) -> WorkerLost:
        """End the slot's actor, and schedule its replacement or retire the slot."""
        self.kill_actor(slot)
        slot.record_loss(fault, time.monotonic())
        self.last_loss = f"{slot.name}: {reason}"
        is_machine_gone = False
        if fault is FaultType.NODE_LOST and slot.placement is not None:
            nodes = self.list_nodes_or_store_error()
            is_machine_gone = nodes is not None and is_node_dead(slot.placement.node_id, nodes)
        is_permanent = slot.should_retire(fault, self.slots, is_machine_gone)
        if is_permanent:
            self.retire(slot.name, reason)
        return WorkerLost(slot.name, reason, fault, is_permanent)


def format_ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
