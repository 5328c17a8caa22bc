"""Where workers run, and the state of each: pure logic, no I/O.

This module does not use Ray. An actor and the references to its results are opaque here; only `ray_workers.pool` uses
them.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinysd_batch.job.workers.faults import FaultType
from tinysd_batch.job.workers.oom_fallback import ImageShape, MemoryLimits
from tinysd_batch.text import make_text_storable

MAX_START_ATTEMPTS = 2  # of a model that does not load, before the slot is retired
MAX_BACKOFF_S = 30.0
MAX_HOST_OOM_LOSSES = 3  # consecutive, of a machine's last worker, before that is retired, too


@dataclass(frozen=True, slots=True)
class Placement:
    """A GPU or a CPU worker's position on a node of the cluster."""

    node_id: str  # Ray's
    index: int  # of the GPU or CPU worker on its node, from 0


def list_gpu_placements(nodes: Iterable[Mapping[str, Any]]) -> list[Placement]:
    """Return the GPUs of all nodes in `ray.nodes()` that are alive: first one of each node, then the second ones."""
    return interleave_nodes({node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]})


def list_cpu_placements(
    nodes: Iterable[Mapping[str, Any]], max_per_node: int, requested: int | None
) -> list[Placement]:
    """Return the positions of CPU workers on all nodes that are alive, interleaved as GPUs are.

    Args:
        nodes: as `ray.nodes()` lists them.
        max_per_node: the most workers on a node, which gets one per core.
        requested: the number of workers on each node instead, if the user asks for one.
    """
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]}
    return interleave_nodes({node: requested or min(max_per_node, count) for node, count in cores.items() if count})


def host_names_by_node(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the host names of all nodes that are alive, by Ray's node ID."""
    return {node["NodeID"]: make_text_storable(node["NodeManagerHostname"]) for node in nodes if node["Alive"]}


def is_node_dead(node_id: str, nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether `ray.nodes()` no longer lists the node as alive."""
    return not any(node["Alive"] for node in nodes if node["NodeID"] == node_id)


def interleave_nodes(counts: Mapping[str, int]) -> list[Placement]:
    """Return placements by index and then by node, so that a few workers are spread over all nodes."""
    indexes = range(max(counts.values(), default=0))
    return [Placement(node, index) for index in indexes for node, count in counts.items() if index < count]


def diff_placements(
    current: Collection[Placement],
    retired: Collection[Placement],
    available: Sequence[Placement],
    max_workers: int | None,
) -> tuple[list[Placement], list[Placement]]:
    """Compare the current placements with those available in the cluster.

    Returns:
        New placements, without retired ones and no more than `max_workers` in all; and those that are gone.
    """
    gone = [placement for placement in current if placement not in available]
    new = [placement for placement in available if placement not in current and placement not in retired]
    max_new = len(new) if max_workers is None else max(0, max_workers - (len(current) - len(gone)))
    return new[:max_new], gone


def choose_worker_name(machine: str, device: str, number: int, existing: Collection[str]) -> str:
    """Return a name such as `miner2/cuda-0`. The number rises where several nodes of a cluster share a machine."""
    while (name := f"{make_text_storable(machine)}/{device}-{number}") in existing:
        number += 1
    return name


@dataclass(slots=True)
class WorkerSlot:
    """One GPU, or one CPU worker: its current actor, and the history that outlives an actor."""

    name: str
    placement: Placement | None = None  # None: anywhere, on a single machine
    node_id: str | None = None  # where the actor runs
    actor: Any = None
    pending_description: Any = None  # reference to the actor's description
    pending_results: Any = None  # generator of references to results
    is_ready: bool = False
    start_deadline: float = 0.0
    unreachable_reason: str | None = None  # set while it is open whether the worker's machine is lost
    unreachable_until: float = 0.0
    start_failures: int = 0
    consecutive_losses: int = 0
    next_start_at: float = field(default_factory=time.monotonic)
    memory_limits: dict[ImageShape, MemoryLimits] = field(default_factory=dict)  # learnt by any actor of this slot

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.pending_results is None

    def record_started(self, node_id: str) -> None:
        self.node_id, self.pending_description = node_id, None

    def mark_ready(self) -> None:
        self.is_ready, self.start_failures = True, 0

    def record_results(self, memory_limits: dict[ImageShape, MemoryLimits]) -> None:
        self.consecutive_losses, self.memory_limits = 0, memory_limits

    def mark_unreachable(self, reason: str, until: float) -> None:
        """Wait until it is known whether the machine is lost, because that affects all its workers."""
        self.pending_description = self.pending_results = None
        self.is_ready = False
        self.unreachable_reason, self.unreachable_until = reason, until

    def record_loss(self, fault: FaultType, now: float) -> None:
        """Drop the actor. The next one starts after a delay that grows with each consecutive loss."""
        self.start_failures += not self.is_ready and fault is not FaultType.NODE_LOST
        self.actor = self.pending_description = self.pending_results = self.unreachable_reason = None
        self.is_ready = False
        self.consecutive_losses += 1
        self.next_start_at = now + min(MAX_BACKOFF_S, 0.5 * 2 ** (self.consecutive_losses - 1))

    def should_retire(self, fault: FaultType, others: Iterable["WorkerSlot"], is_machine_gone: bool) -> bool:
        """Whether no new actor should replace the one that was lost with this fault."""
        if fault is FaultType.HOST_OUT_OF_MEMORY:
            has_neighbours = any(other.node_id == self.node_id for other in others if other is not self)
            return has_neighbours or self.consecutive_losses >= MAX_HOST_OOM_LOSSES
        if fault is FaultType.NODE_LOST:
            return self.placement is not None and is_machine_gone
        return fault is FaultType.REFUSED or self.start_failures >= MAX_START_ATTEMPTS
