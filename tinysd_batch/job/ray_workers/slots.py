"""What is known of a worker's place, on a card or on the CPU: who works there now, and how it has fared. Pure.

It knows no Ray: an actor and what refers to its answers are handles here, which only `ray_pool` uses.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinysd_batch.job.workers.faults import Fault
from tinysd_batch.job.workers.oom_fallback import Limit, Shape
from tinysd_batch.text import storable_text


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU, or one place on a machine's processor: Ray's id of its node, and which of the node's it is."""

    node: str
    number: int


def gpus_of(nodes: Iterable[Mapping[str, Any]]) -> list[Card]:
    """The GPUs of all living nodes, as `ray.nodes()` lists them; first one of each machine, then the second ones."""
    return in_turn({node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]})


def cpus_of(nodes: Iterable[Mapping[str, Any]], most_each: int, wanted: int | None) -> list[Card]:
    """Places on the processors of living nodes, in turn: so many each as it has cores, or as `wanted` asks for."""
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]}
    return in_turn({node: wanted or min(most_each, count) for node, count in cores.items() if count})


def machine_names(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Host names of living nodes by Ray's ids."""
    return {node["NodeID"]: storable_text(node["NodeManagerHostname"]) for node in nodes if node["Alive"]}


def in_turn(counts: Mapping[str, int]) -> list[Card]:
    """So that a few workers do not all land on one machine."""
    rounds = range(max(counts.values(), default=0))
    return [Card(node, number) for number in rounds for node, count in counts.items() if number < count]


def changes(
    known: Collection[Card], given_up: Collection[Card], present: Sequence[Card], most: int | None
) -> tuple[list[Card], list[Card]]:
    """Cards to begin with, and cards that are gone; never more than `most` at a time, nor one that was given up."""
    gone = [card for card in known if card not in present]
    new = [card for card in present if card not in known and card not in given_up]
    room = len(new) if most is None else max(0, most - (len(known) - len(gone)))
    return new[:room], gone


BOOT_ATTEMPTS = 2  # a card on which the model does not load is tried once more, then left out
MAX_BACKOFF_S = 30.0
MAX_HOST_LOSSES = 3  # of a machine's last worker, for want of the machine's memory, in a row


def free_name(machine: str, device: str, number: int, taken: Collection[str]) -> str:
    """A worker's name, such as `miner2/cuda-0`. Several nodes of a cluster may be on one machine."""
    while (name := f"{storable_text(machine)}/{device}-{number}") in taken:
        number += 1
    return name


@dataclass(slots=True)
class Slot:
    """One card, or one CPU worker."""

    name: str
    card: Card | None = None
    node_id: str | None = None
    actor: Any = None
    booting: Any = None  # reference to the actor's description
    working: Any = None  # generator of references to results
    ready: bool = False
    boot_by: float = 0.0
    unreachable: str | None = None  # why its process is out of reach, while it is open whether its machine is lost
    unreachable_until: float = 0.0
    boot_failures: int = 0
    deaths: int = 0  # in a row
    start_at: float = field(default_factory=time.monotonic)
    limits: dict[Shape, Limit] = field(default_factory=dict)  # what the card cannot hold, whoever learnt it

    @property
    def is_idle(self) -> bool:
        return self.ready and self.working is None

    def booted(self, node_id: str) -> None:
        self.node_id, self.booting = node_id, None

    def welcomed(self) -> None:
        self.ready, self.boot_failures = True, 0

    def worked(self, limits: dict[Shape, Limit]) -> None:
        self.deaths, self.limits = 0, limits

    def lost_touch(self, reason: str, until: float) -> None:
        """Wait for word of its machine: a lost one takes all its workers with it."""
        self.booting = self.working = None
        self.ready = False
        self.unreachable, self.unreachable_until = reason, until

    def died(self, fault: Fault, now: float) -> None:
        """Its actor is no more; the next one starts after a delay that grows."""
        self.boot_failures += not self.ready and fault is not Fault.NODE_LOST
        self.actor = self.booting = self.working = self.unreachable = None
        self.ready = False
        self.deaths += 1
        self.start_at = now + min(MAX_BACKOFF_S, 0.5 * 2 ** (self.deaths - 1))

    def is_given_up(self, fault: Fault, others: Iterable["Slot"], machine_is_gone: bool) -> bool:
        """Whether no other actor takes the place of the one that was lost so."""
        if fault is Fault.HOST_OUT_OF_MEMORY:
            has_neighbours = any(other.node_id == self.node_id for other in others if other is not self)
            return has_neighbours or self.deaths >= MAX_HOST_LOSSES
        if fault is Fault.NODE_LOST:
            return self.card is not None and machine_is_gone
        return fault is Fault.REFUSED or self.boot_failures >= BOOT_ATTEMPTS
