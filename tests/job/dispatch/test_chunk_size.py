"""Chunk sizes alone, on simulated workers."""

import heapq
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.job.dispatch.chunk_size import (
    TARGET_CHUNK_S,
    WorkerLoad,
    WorkerSpeed,
    choose_chunk_cost,
    estimate_finish_s,
)

UNEQUAL_SPEEDS = (1.0, 0.5, 0.25, 0.1)


def simulate_makespan_s(speeds: Sequence[float], images: int, seed: int, unit: int = 1) -> float:
    """Return the seconds until workers of these speeds (images per second) have generated all images.

    The duration of an image varies by 15 %, each call adds 50 ms, and speeds are known only as they are measured.
    """
    rng = random.Random(seed)
    measured = [WorkerSpeed() for _ in speeds]
    free_at = [0.0] * len(speeds)
    idle = set(range(len(speeds)))
    events: list[tuple[float, int, int, float]] = []  # time, worker, images done by then, their duration
    remaining, now = images, 0.0
    while remaining or events:
        for worker in sorted(idle):
            others = [
                WorkerLoad(measured[other].cost_per_s, max(0.0, free_at[other] - now))
                for other in range(len(speeds))
                if other != worker
            ]
            load = WorkerLoad(measured[worker].cost_per_s)
            chunk = min(remaining, round(choose_chunk_cost(load, others, remaining, unit)))
            if chunk:
                duration_s = 0.05 + sum(rng.uniform(0.85, 1.15) / speeds[worker] for _ in range(chunk))
                heapq.heappush(events, (now + duration_s, worker, chunk, duration_s))
                free_at[worker] = now + chunk / (measured[worker].cost_per_s or speeds[worker])
                idle.discard(worker)
                remaining -= chunk
        now, worker, chunk, duration_s = heapq.heappop(events)
        measured[worker].add_measurement(chunk, duration_s)
        idle.add(worker)
    return now


@pytest.mark.parametrize(("images", "max_ratio"), [(40, 1.1), (400, 1.02)])
def test_workers_finish_together(images: int, max_ratio: float) -> None:
    """Compare the makespan with perfect utilization: the worst case of unequal speeds, the median of equal ones."""

    def ratios(speeds: Sequence[float]) -> list[float]:
        return [simulate_makespan_s(speeds, images, seed) * sum(speeds) / images for seed in range(50)]

    assert max(ratios(UNEQUAL_SPEEDS)) <= max_ratio
    assert statistics.median(ratios((1.0, 1.0, 1.0, 1.0))) <= max_ratio


def test_a_worker_too_slow_to_help_at_the_end_gets_nothing() -> None:
    fast, slow = WorkerLoad(1.0), WorkerLoad(0.05)
    assert choose_chunk_cost(slow, [fast], remaining=10, unit=1) == 0
    assert choose_chunk_cost(fast, [slow], remaining=10, unit=1) >= 1
    assert choose_chunk_cost(slow, [fast], remaining=100, unit=1) >= 1
    assert choose_chunk_cost(slow, [replace(fast, busy_s=60)], remaining=2, unit=1) >= 1


def test_chunks_take_the_worker_about_fifteen_seconds() -> None:
    for speed in (0.5, 2.0, 20.0):
        others = [WorkerLoad(1.0)] * 3
        cost = choose_chunk_cost(WorkerLoad(speed), others, remaining=1e6, unit=1)
        assert cost == max(1, int(TARGET_CHUNK_S * speed))
    assert choose_chunk_cost(WorkerLoad(None), [WorkerLoad(20.0)], remaining=1e6, unit=4) == 4


LOADS = st.lists(
    st.builds(WorkerLoad, st.one_of(st.none(), st.floats(0.01, 100)), st.floats(0, 60)), min_size=1, max_size=6
)


@given(LOADS, st.integers(1, 1000), st.sampled_from([1.0, 3.5]))
def test_of_idle_workers_at_least_one_gets_work(workers: list[WorkerLoad], units: int, unit: float) -> None:
    idle = [replace(worker, busy_s=0.0) for worker in workers]
    costs = [
        choose_chunk_cost(worker, idle[:number] + idle[number + 1 :], units * unit, unit)
        for number, worker in enumerate(idle)
    ]
    assert any(cost >= unit for cost in costs)
    assert all(cost == 0 or cost >= unit for cost in costs)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 60)), min_size=1, max_size=6), st.integers(1, 1000))
def test_the_estimated_finish_is_when_all_units_are_done(workers: list[tuple[float, float]], units: int) -> None:
    finish_s = estimate_finish_s(workers, units, 1.0)

    def count_units_done(seconds: float) -> int:
        return sum(int(max(0.0, seconds - busy_s) * speed + 1e-6) for speed, busy_s in workers)

    assert count_units_done(finish_s * 1.001) >= units
    assert count_units_done(finish_s * 0.998 - 1e-3) < units


def test_speed_converges_to_the_measurements() -> None:
    speed = WorkerSpeed()
    speed.add_measurement(10, 5)
    assert speed.cost_per_s == 2
    for _ in range(30):
        speed.add_measurement(10, 10)
    assert speed.cost_per_s == pytest.approx(1, rel=1e-3)
