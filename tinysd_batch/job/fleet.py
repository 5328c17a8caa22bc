"""Which places for workers there are, from what Ray says of its nodes. Pure."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
