"""Which cards there are, from what Ray says of its nodes. Pure."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU: Ray's id of its node, and which of the node's it is."""

    node: str
    number: int


def cards_of(nodes: Iterable[Mapping[str, Any]]) -> list[Card]:
    """The cards of all living nodes, as `ray.nodes()` lists them."""
    return [
        Card(node["NodeID"], number)
        for node in nodes
        if node["Alive"]
        for number in range(int(node["Resources"].get("GPU", 0)))
    ]


def changes(
    known: Collection[Card], given_up: Collection[Card], present: Sequence[Card], most: int | None
) -> tuple[list[Card], list[Card]]:
    """Cards to begin with, and cards that are gone; never more than `most` at a time, nor one that was given up."""
    gone = [card for card in known if card not in present]
    new = [card for card in present if card not in known and card not in given_up]
    room = len(new) if most is None else max(0, most - (len(known) - len(gone)))
    return new[:room], gone
