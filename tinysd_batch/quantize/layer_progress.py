"""How far work on a UNet's layers is; they count by their weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayersDone:
    """`layers` of `of_layers` are done."""

    task: str
    layers: int
    of_layers: int
    share: float  # of all weights, 0 to 1


OnLayers = Callable[[LayersDone], None]


def ignore_layers(_: LayersDone) -> None:
    """For callers that show nothing."""


def watched(names: Iterable[str], weights: Mapping[str, int], task: str, on_layers: OnLayers) -> Iterator[str]:
    """The layers' names, with a call before each and one at the end."""
    total, done, number = max(1, sum(weights.values())), 0, 0
    for name in names:
        on_layers(LayersDone(task, number, len(weights), done / total))
        yield name
        done += weights[name]
        number += 1
    on_layers(LayersDone(task, number, len(weights), 1.0))
