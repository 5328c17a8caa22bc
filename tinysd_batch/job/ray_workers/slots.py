"""What is known of a worker's place, on a card or on the CPU: who works there now, and how it has fared. Pure.

It knows no Ray: an actor and what refers to its answers are handles here, which only `ray_pool` uses.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinysd_batch.job.workers.faults import FaultType
from tinysd_batch.job.workers.oom_fallback import ImageShape, MemoryLimits
from tinysd_batch.text import make_text_storable


@dataclass(frozen=True, slots=True)
class Placement:
    """One GPU, or one place on a machine's processor: Ray's id of its node, and which of the node's it is."""

    node: str
    index: int


def list_gpu_placements(nodes: Iterable[Mapping[str, Any]]) -> list[Placement]:
    """The GPUs of all living nodes, as `ray.nodes()` lists them; first one of each machine, then the second ones."""
    return interleave_nodes({node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]})


def list_cpu_placements(nodes: Iterable[Mapping[str, Any]], most_each: int, wanted: int | None) -> list[Placement]:
    """Places on the processors of living nodes, in turn: so many each as it has cores, or as `wanted` asks for."""
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]}
    return interleave_nodes({node: wanted or min(most_each, count) for node, count in cores.items() if count})


def host_names_by_node(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Host names of living nodes by Ray's ids."""
    return {node["NodeID"]: make_text_storable(node["NodeManagerHostname"]) for node in nodes if node["Alive"]}


def interleave_nodes(counts: Mapping[str, int]) -> list[Placement]:
    """So that a few workers do not all land on one machine."""
    rounds = range(max(counts.values(), default=0))
    return [Placement(node, number) for number in rounds for node, count in counts.items() if number < count]


def diff_placements(
    known: Collection[Placement], given_up: Collection[Placement], present: Sequence[Placement], most: int | None
) -> tuple[list[Placement], list[Placement]]:
    """Cards to begin with, and cards that are gone; never more than `most` at a time, nor one that was given up."""
    gone = [card for card in known if card not in present]
    new = [card for card in present if card not in known and card not in given_up]
    room = len(new) if most is None else max(0, most - (len(known) - len(gone)))
    return new[:room], gone


MAX_START_ATTEMPTS = 2  # a card on which the model does not load is tried once more, then left out
MAX_BACKOFF_S = 30.0
MAX_HOST_OOM_LOSSES = 3  # of a machine's last worker, for want of the machine's memory, in a row


def choose_worker_name(machine: str, device: str, number: int, taken: Collection[str]) -> str:
    """A worker's name, such as `miner2/cuda-0`. Several nodes of a cluster may be on one machine."""
    while (name := f"{make_text_storable(machine)}/{device}-{number}") in taken:
        number += 1
    return name


@dataclass(slots=True)
class WorkerSlot:
    """One card, or one CPU worker."""

    name: str
    placement: Placement | None = None
    node_id: str | None = None
    actor: Any = None
    pending_description: Any = None  # reference to the actor's description
    pending_results: Any = None  # generator of references to results
    is_ready: bool = False
    start_deadline: float = 0.0
    unreachable_reason: str | None = (
        None  # why its process is out of reach, while it is open whether its machine is lost
    )
    unreachable_until: float = 0.0
    start_failures: int = 0
    consecutive_losses: int = 0  # in a row
    next_start_at: float = field(default_factory=time.monotonic)
    memory_limits: dict[ImageShape, MemoryLimits] = field(
        default_factory=dict
    )  # what the card cannot hold, whoever learnt it

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.pending_results is None

    def record_started(self, node_id: str) -> None:
        self.node_id, self.pending_description = node_id, None

    def mark_ready(self) -> None:
        self.is_ready, self.start_failures = True, 0

    def record_results(self, limits: dict[ImageShape, MemoryLimits]) -> None:
        self.consecutive_losses, self.memory_limits = 0, limits

    def mark_unreachable(self, reason: str, until: float) -> None:
        """Wait for word of its machine: a lost one takes all its workers with it."""
        self.pending_description = self.pending_results = None
        self.is_ready = False
        self.unreachable_reason, self.unreachable_until = reason, until

    def record_loss(self, fault: FaultType, now: float) -> None:
        """Its actor is no more; the next one starts after a delay that grows."""
        self.start_failures += not self.is_ready and fault is not FaultType.NODE_LOST
        self.actor = self.pending_description = self.pending_results = self.unreachable_reason = None
        self.is_ready = False
        self.consecutive_losses += 1
        self.next_start_at = now + min(MAX_BACKOFF_S, 0.5 * 2 ** (self.consecutive_losses - 1))

    def should_retire(self, fault: FaultType, others: Iterable["WorkerSlot"], machine_is_gone: bool) -> bool:
        """Whether no other actor takes the place of the one that was lost so."""
        if fault is FaultType.HOST_OUT_OF_MEMORY:
            has_neighbours = any(other.node_id == self.node_id for other in others if other is not self)
            return has_neighbours or self.consecutive_losses >= MAX_HOST_OOM_LOSSES
        if fault is FaultType.NODE_LOST:
            return self.placement is not None and machine_is_gone
        return fault is FaultType.REFUSED or self.start_failures >= MAX_START_ATTEMPTS
