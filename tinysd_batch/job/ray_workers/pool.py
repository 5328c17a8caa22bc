"""Workers as Ray actors: one per GPU, or some on the CPU. What each is on and how it fares is in `slots`."""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, TypeVar

from tinysd_batch.errors import BrokenWorkerError, NoWorkerError, TinySDError, UsageError
from tinysd_batch.job.ray_workers import handshake
from tinysd_batch.job.ray_workers.bounded_calls import LIMIT_S, RayLostError
from tinysd_batch.job.ray_workers.cluster import RaySession, fault_line
from tinysd_batch.job.ray_workers.local_ray import INLINE
from tinysd_batch.job.ray_workers.ray_log import LOG_NAME
from tinysd_batch.job.ray_workers.result_batches import Parcel
from tinysd_batch.job.ray_workers.slots import Card, Slot, changes, cpus_of, free_name, gpus_of, machine_names
from tinysd_batch.job.ray_workers.worker_process import WorkerProcess
from tinysd_batch.job.workers.faults import Fault, loss_of
from tinysd_batch.job.workers.pool import BatchDone, Chunk, ChunkDone, Event, WorkerLost, WorkerReady
from tinysd_batch.job.workers.worker import WorkerSetup

BOOT_S = 1800.0  # for which a model may load
LOOK_EVERY_S = 5.0  # for cards that came and went
LOOK_SOON_S = 1.0  # when a machine may be lost
UNREACHABLE_S = 60.0  # for which a worker waits to hear that; Ray takes some 20
MAX_RESTARTS = 2  # of a Ray of our own that stopped in the middle of a run
GO_ON = "the same command goes on where it stopped"
Answer = TypeVar("Answer")
OUR_ERROR = re.compile(r"tinysd_batch\.errors\.(?:ModelError|UsageError): (.*)")


class RayPool:
    """One Ray actor per GPU, or CPU workers where there is none. Dead actors are replaced, with growing delays.

    On a cluster (`ray_init` has an address) machines may join and leave at any time, and for some time there may be
    none; without GPUs each gets CPU workers by its cores.
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
        self.session = RaySession(self.ray_init, setup.scratch.parent / LOG_NAME)
        self.on_cluster = not self.session.is_own
        self.slots: list[Slot] = []
        self.given_up: set[Card] = set()
        self.machines: dict[str, str] = {}  # names by Ray's id of the node
        self.on_gpu = False
        self.restarts = 0
        self.lost_ray: RayLostError | None = None  # outside of `events`, which is to answer it
        self.last_fault = ""
        self.word = ""
        self.looked_at = self.had_workers_at = 0.0

    def __enter__(self) -> Self:
        self.session.start()
        try:
            self.find_places()
        except BaseException:
            self.session.stop()
            raise
        return self

    def find_places(self) -> None:
        import ray

        gpus = int(self.call(ray.cluster_resources).get("GPU", 0)) if self.setup.device != "cpu" else 0
        if self.setup.device == "cuda" and gpus == 0 and not self.on_cluster:
            raise NoWorkerError("--device cuda, but Ray sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
        self.on_gpu = gpus > 0 or self.setup.device == "cuda"
        self.word = handshake.offer(self.setup.scratch)
        if self.on_gpu or self.on_cluster:
            self.look_for_cards()
        else:
            for _ in range(self.wanted or self.cpu_workers):
                self.add_slot(None)
        self.had_workers_at = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        for slot in self.slots:
            self.end_actor(slot)
        self.session.stop(is_lost=self.lost_ray is not None)

    def call(self, function: Callable[[], Answer], limit_s: float = LIMIT_S) -> Answer:
        return self.session.call(function, limit_s)

    def workers(self) -> list[str]:
        return [slot.name for slot in self.slots]

    def idle(self) -> list[str]:
        return [slot.name for slot in self.slots if slot.is_idle]

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)

    def add_slot(self, card: Card | None) -> None:
        machine = platform.node() if card is None else self.machines.get(card.node, card.node)
        device = "cuda" if self.on_gpu else "cpu"
        name = free_name(machine, device, 0 if card is None else card.number, self.workers())
        self.slots.append(Slot(name, card))

    def submit(self, worker: str, chunk: Chunk) -> None:
        slot = self.slot(worker)
        try:
            slot.working = self.call(lambda: slot.actor.work.options(num_returns="streaming").remote(chunk))
        except RayLostError as error:
            self.lost_ray = error

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

        def start() -> tuple[Any, Any]:
            actor = actor_class.remote(self.setup, slot.name)
            return actor, actor.describe_to.remote(self.word, slot.limits)

        slot.actor, slot.booting = self.call(start)
        slot.boot_by = time.monotonic() + BOOT_S

    def events(self, timeout_s: float) -> list[Event]:
        try:
            if self.lost_ray is not None:
                raise self.lost_ray
            self.session.check_alive()
            return self.listen(timeout_s)
        except RayLostError as error:
            return self.start_again(error)

    def listen(self, timeout_s: float) -> list[Event]:
        """Raises RayLostError."""
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
        left += [
            self.lose(slot, Fault.NODE_LOST, slot.unreachable)
            for slot in self.slots
            if slot.unreachable is not None and slot.unreachable_until <= now
        ]
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
        done, _ = self.call(lambda: ray.wait(list(waiting), num_returns=1, timeout=timeout_s), timeout_s + LIMIT_S)
        if done:  # and what else there is by now
            done, _ = self.call(lambda: ray.wait(list(waiting), num_returns=len(waiting), timeout=0))
        self.session.check_alive()  # else each worker's end would be taken for its own fault
        return [event for reference in done for event in self.receive_or_note(waiting[reference])]

    def start_again(self, error: RayLostError) -> list[Event]:
        """Start a Ray of our own anew; all workers are lost with the old one. Raises NoWorkerError."""
        self.lost_ray = error
        if self.on_cluster:
            raise NoWorkerError(f"--address {self.session.address}: {error}; {GO_ON}") from error
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise NoWorkerError(f"{error}, for the {ordinal(self.restarts)} time; {GO_ON}; {INLINE}") from error
        cause = f"{error}; it was started again"
        lost: list[Event] = [replace(self.lose(slot, Fault.NODE_LOST, str(error)), cause=cause) for slot in self.slots]
        self.session.stop(is_lost=True)
        self.session.start()
        self.lost_ray = None
        self.move_cards()
        return lost

    def move_cards(self) -> None:
        """The machine is the same, but Ray has given it another id."""
        nodes = self.session.nodes()
        self.machines = machine_names(nodes)
        node = next(iter(self.machines))
        for slot in self.slots:
            slot.card = None if slot.card is None else replace(slot.card, node=node)
        self.given_up = {replace(card, node=node) for card in self.given_up}

    def look_for_cards(self) -> list[Event]:
        """Begin with cards that joined, and lose those whose node left; every few seconds."""
        now = time.monotonic()
        pause_s = LOOK_SOON_S if any(slot.unreachable for slot in self.slots) else LOOK_EVERY_S
        if self.looked_at and now - self.looked_at < pause_s:
            return []
        nodes = self.session.nodes()
        self.looked_at = now
        if not (self.on_gpu or self.on_cluster):
            return []
        self.machines |= machine_names(nodes)
        present = gpus_of(nodes) if self.on_gpu else cpus_of(nodes, self.cpu_workers, self.wanted)
        known = [slot.card for slot in self.slots if slot.card is not None]
        new, gone = changes(known, self.given_up, present, self.wanted)
        events = [event for node in dict.fromkeys(card.node for card in gone) for event in self.lose_machine(node)]
        for card in new:
            self.add_slot(card)
        return events

    def lose_machine(self, node: str) -> list[Event]:
        """Take all workers of a machine that left the cluster as lost."""
        cause = f"machine {self.machines.get(node, node)} is lost"
        slots = [slot for slot in self.slots if slot.card is not None and slot.card.node == node]
        return [
            replace(self.lose(slot, Fault.NODE_LOST, "its machine left the cluster"), cause=cause) for slot in slots
        ]

    def wait_for_workers(self, timeout_s: float, now: float) -> None:
        """Raises NoWorkerError where none can come, or none came in time."""
        if not self.on_cluster or now - self.had_workers_at > self.worker_wait_s:
            waited = f" for {self.worker_wait_s:,.0f} s" if self.on_cluster else ""
            cause = self.last_fault or f"the cluster has no {'GPU' if self.on_gpu else 'processor to give'}"
            raise NoWorkerError(f"no worker is left{waited}: {cause}; `--inline` shows errors in this process")
        time.sleep(timeout_s)

    def receive_or_note(self, slot: Slot) -> list[Event]:
        """`receive`; what other workers sent is not lost where Ray stops answering meanwhile."""
        try:
            return self.receive(slot)
        except RayLostError as error:
            self.lost_ray = error
            return []

    def receive(self, slot: Slot) -> list[Event]:
        import ray

        try:
            if slot.booting is not None:
                return [self.welcome(slot, self.call(lambda: ray.get(slot.booting)))]
            parcel: Parcel = ray.get(next(slot.working))
            slot.worked(parcel.limits)
            return [BatchDone(slot.name, made.results, made.seconds) for made in parcel.made]
        except StopIteration:
            slot.working = None
            return [ChunkDone(slot.name)]
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BrokenWorkerError):
                return [self.lose(slot, Fault.DEVICE_BROKEN, str(error.cause))]
            if isinstance(error.cause, TinySDError):
                raise error.cause from None  # storage is full, say: the same on every worker
            return [self.lose(slot, Fault.WORKER_DIED, fault_line(error))]
        except ray.exceptions.RayError as error:
            self.stop_where_all_would_fail(slot, error)
            return self.lose_worker_or_machine(slot, loss_of(error), fault_line(error))

    def lose_worker_or_machine(self, slot: Slot, fault: Fault, reason: str) -> list[Event]:
        if self.on_cluster and slot.card is not None:
            if self.is_dead(slot.card.node):
                return self.lose_machine(slot.card.node)
            if fault is Fault.NODE_LOST:
                slot.lost_touch(reason, time.monotonic() + UNREACHABLE_S)
                return []
        return [self.lose(slot, fault, reason)]

    def welcome(self, slot: Slot, description: dict[str, Any]) -> Event:
        slot.booted(description["node_id"])
        try:
            handshake.check(description, self.setup.scratch, self.word, slot.name, self.setup.model_digest)
        except NoWorkerError as error:
            return self.lose(slot, Fault.REFUSED, str(error))
        slot.welcomed()
        return WorkerReady(slot.name, description)

    def stop_where_all_would_fail(self, slot: Slot, error: Exception) -> None:
        """Raises UsageError where the model or a setting is wrong, on every worker alike: on a single machine."""
        ours = OUR_ERROR.search(str(error)) if slot.booting is not None and not self.on_cluster else None
        if ours:
            raise UsageError(ours[1].strip())

    def is_dead(self, node_id: str) -> bool:
        """Whether a node has left the cluster. A Ray of our own is not asked: one that is ending does not answer."""
        if not self.on_cluster or self.lost_ray is not None:
            return False
        try:
            nodes = self.session.nodes()
        except RayLostError as error:
            self.lost_ray = error
            return False
        return not any(node["Alive"] for node in nodes if node["NodeID"] == node_id)

    def kill(self, worker: str, reason: str, fault: Fault) -> WorkerLost:
        return self.lose(self.slot(worker), fault, reason)

    def retire(self, worker: str, reason: str) -> None:
        slot = self.slot(worker)
        self.end_actor(slot)
        if slot.card is not None:
            self.given_up.add(slot.card)
        self.slots.remove(slot)
        self.last_fault = f"{worker}: {reason}"

    def end_actor(self, slot: Slot) -> None:
        import ray

        actor, slot.actor = slot.actor, None
        if actor is not None and self.lost_ray is None:
            try:
                self.call(lambda: ray.kill(actor))
            except RayLostError as error:
                self.lost_ray = error

    def lose(self, slot: Slot, fault: Fault, reason: str) -> WorkerLost:
        """Take the slot's actor as dead, and plan its replacement or give the slot up."""
        self.end_actor(slot)
        slot.died(fault, time.monotonic())
        self.last_fault = f"{slot.name}: {reason}"
        machine_is_gone = fault is Fault.NODE_LOST and slot.card is not None and self.is_dead(slot.card.node)
        for_good = slot.is_given_up(fault, self.slots, machine_is_gone)
        if for_good:
            self.retire(slot.name, reason)
        return WorkerLost(slot.name, reason, fault, for_good)


def ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
