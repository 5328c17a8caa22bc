"""Progress of work on a UNet's layers, weighted by their number of weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerProgressUpdate:
    """How many layers of a task are done."""

    task: str  # such as "packing"
    done_layers: int
    total_layers: int
    weights_fraction: float  # done share of all weights, 0 to 1


ProgressCallback = Callable[[LayerProgressUpdate], None]


def ignore_progress(_: LayerProgressUpdate) -> None:
    """The callback for callers that show no progress."""


def iterate_with_progress(
    names: Iterable[str], weights: Mapping[str, int], task: str, on_progress: ProgressCallback
) -> Iterator[str]:
    """Yield the layers' names, and call `on_progress` before each one and once at the end."""
    total_weights, done_weights, done_layers = max(1, sum(weights.values())), 0, 0
    for name in names:
        on_progress(LayerProgressUpdate(task, done_layers, len(weights), done_weights / total_weights))
        yield name
        done_weights += weights[name]
        done_layers += 1
    on_progress(LayerProgressUpdate(task, done_layers, len(weights), 1.0))
