"""How much work a worker gets at a time. Pure: speeds in, work out.

Work is counted in units that take a worker equally long: pixels through the UNet. A chunk is some 15 seconds for the
worker that asks, less towards the end, so that all end together; nothing for one so slow that it would end last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TARGET_CHUNK_S = 15.0
NEW_MEASUREMENT_WEIGHT = 0.3  # how much the latest measurement counts against all before it


@dataclass(slots=True)
class WorkerSpeed:
    """A worker's work per second as measured, newer measurements counting more; None before the first."""

    cost_per_s: float | None = None

    def add_measurement(self, work: float, seconds: float) -> None:
        latest = work / max(seconds, 1e-6)
        if self.cost_per_s is None:
            self.cost_per_s = latest
        else:  # seconds per work are averaged, not work per second: one lucky batch must not count double
            self.cost_per_s = 1 / ((1 - NEW_MEASUREMENT_WEIGHT) / self.cost_per_s + NEW_MEASUREMENT_WEIGHT / latest)


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker as the scheduler sees it."""

    speed: float | None
    busy_s: float = 0.0  # until it has done what it holds


def choose_chunk_cost(asking: WorkerLoad, others: Sequence[WorkerLoad], left: float, unit: float) -> float:
    """How much of the work `left` the idle worker gets now, in whole units (a micro-batch); 0 to leave it out.

    A worker of unknown speed gets one unit.
    """
    if left <= 0:
        return 0.0
    if asking.speed is None:
        return unit
    known = [other.speed for other in others if other.speed is not None]
    mean = sum([asking.speed, *known]) / (1 + len(known))
    fleet = [(asking.speed, asking.busy_s), *((other.speed or mean, other.busy_s) for other in others)]
    mine = math.floor(estimate_finish_s(fleet, left, unit) * asking.speed / unit + 1e-6)
    if mine < 1:
        return 0.0
    return unit * max(1, min(mine // 2, math.floor(TARGET_CHUNK_S * asking.speed / unit)))


def estimate_finish_s(fleet: Sequence[tuple[float, float]], left: float, unit: float) -> float:
    """Seconds until workers of these speeds, each busy for so long yet, could have done all that is left."""
    units = math.ceil(left / unit - 1e-6)

    def done_by(seconds: float) -> int:
        return sum(math.floor(max(0.0, seconds - busy) * speed / unit + 1e-9) for speed, busy in fleet)

    low, high = 0.0, min(busy + units * unit / speed for speed, busy in fleet) * (1 + 1e-6)
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if done_by(middle) >= units else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class HangTimeout:
    """How long a worker may take for one micro-batch before it counts as hung."""

    min_s: float = 120.0
    expected_factor: float = 10.0  # what its measured speed says
    without_speed_s: float = 3600.0  # while its speed is unknown

    def compute_s(self, work: float, speed: float | None) -> float:
        """Seconds."""
        return self.without_speed_s if speed is None else max(self.min_s, self.expected_factor * work / speed)
