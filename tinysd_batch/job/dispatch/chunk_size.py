"""Choose how much work to give a worker at a time. Pure logic: speeds in, cost out.

Cost is counted in megapixels through the UNet (`job.plan.cost`). A chunk takes the worker about 15 seconds, and less
towards the end of the job so that all workers finish together. A worker that is so slow that it would finish last gets
nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TARGET_CHUNK_S = 15.0
NEW_MEASUREMENT_WEIGHT = 0.3  # of the latest measurement, against all earlier ones


@dataclass(slots=True)
class WorkerSpeed:
    """Exponential moving average of a worker's speed; None before the first measurement."""

    cost_per_s: float | None = None

    def add_measurement(self, cost: float, seconds: float) -> None:
        latest = cost / max(seconds, 1e-6)
        if self.cost_per_s is None:
            self.cost_per_s = latest
        else:  # average the seconds per cost (harmonic mean), so that a single fast batch does not dominate
            self.cost_per_s = 1 / ((1 - NEW_MEASUREMENT_WEIGHT) / self.cost_per_s + NEW_MEASUREMENT_WEIGHT / latest)


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker's speed, and how long it is still busy."""

    speed: float | None  # cost per second; None if not measured yet
    busy_s: float = 0.0  # until it has finished its current chunk


def choose_chunk_cost(worker: WorkerLoad, others: Sequence[WorkerLoad], remaining: float, unit: float) -> float:
    """Return how much of the remaining cost the idle worker gets now.

    Args:
        worker: the idle worker. It gets one unit if its speed is unknown.
        others: all other workers, busy or idle.
        remaining: cost of all images that are not assigned yet.
        unit: cost of one micro-batch.

    Returns:
        A multiple of `unit`, or 0 if the worker is too slow to help.
    """
    if remaining <= 0:
        return 0.0
    if worker.speed is None:
        return unit
    known_speeds = [other.speed for other in others if other.speed is not None]
    mean_speed = sum([worker.speed, *known_speeds]) / (1 + len(known_speeds))
    workers = [(worker.speed, worker.busy_s), *((other.speed or mean_speed, other.busy_s) for other in others)]
    units_until_finish = math.floor(estimate_finish_s(workers, remaining, unit) * worker.speed / unit + 1e-6)
    if units_until_finish < 1:
        return 0.0
    return unit * max(1, min(units_until_finish // 2, math.floor(TARGET_CHUNK_S * worker.speed / unit)))


def estimate_finish_s(workers: Sequence[tuple[float, float]], remaining: float, unit: float) -> float:
    """Estimate in how many seconds the workers together can complete all that remains.

    Args:
        workers: speed (cost per second) and remaining busy time (seconds) of each.
        remaining: cost of all images that are not assigned yet.
        unit: cost of one micro-batch, which is not divided between workers.
    """
    units = math.ceil(remaining / unit - 1e-6)

    def count_units_done(seconds: float) -> int:
        return sum(math.floor(max(0.0, seconds - busy_s) * speed / unit + 1e-9) for speed, busy_s in workers)

    low, high = 0.0, min(busy_s + units * unit / speed for speed, busy_s in workers) * (1 + 1e-6)
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if count_units_done(middle) >= units else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class HangTimeout:
    """How long a worker may take for one micro-batch before it is considered hung."""

    min_s: float = 120.0
    expected_factor: float = 10.0  # times the duration expected from its measured speed
    without_speed_s: float = 3600.0  # while its speed is unknown

    def compute_s(self, cost: float, speed: float | None) -> float:
        """Return the timeout in seconds for a micro-batch of this cost."""
        return self.without_speed_s if speed is None else max(self.min_s, self.expected_factor * cost / speed)
