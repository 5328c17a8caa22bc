"""How far work on a UNet's layers is; they count by their weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerProgressUpdate:
    """`layers` of `of_layers` are done."""

    task: str
    done_layers: int
    total_layers: int
    weights_fraction: float  # of all weights, 0 to 1


ProgressCallback = Callable[[LayerProgressUpdate], None]


def ignore_progress(_: LayerProgressUpdate) -> None:
    """For callers that show nothing."""


def iterate_with_progress(
    names: Iterable[str], weights: Mapping[str, int], task: str, on_layers: ProgressCallback
) -> Iterator[str]:
    """The layers' names, with a call before each and one at the end."""
    total, done, number = max(1, sum(weights.values())), 0, 0
    for name in names:
        on_layers(LayerProgressUpdate(task, number, len(weights), done / total))
        yield name
        done += weights[name]
        number += 1
    on_layers(LayerProgressUpdate(task, number, len(weights), 1.0))
