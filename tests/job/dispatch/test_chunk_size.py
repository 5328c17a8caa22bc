"""The scheduler alone, on simulated fleets."""

import heapq
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.planning import PARAMS, images_of, row
from tinysd_batch.job.dispatch.chunk_size import (
    TARGET_CHUNK_S,
    WorkerLoad,
    WorkerSpeed,
    choose_chunk_cost,
    estimate_finish_s,
)
from tinysd_batch.job.plan.cost import estimate_batch_cost
from tinysd_batch.records import MicroBatch

UNEQUAL = (1.0, 0.5, 0.25, 0.1)


def makespan(speeds: Sequence[float], images: int, seed: int, unit: int = 1) -> float:
    """Seconds until all images are made, by workers of these speeds in images/s.

    Each image takes 15 % more or less, each call 50 ms; the scheduler knows speeds only as it measures them.
    """
    chance = random.Random(seed)
    measured = [WorkerSpeed() for _ in speeds]
    free_at = [0.0] * len(speeds)
    idle = set(range(len(speeds)))
    events: list[tuple[float, int, int, float]] = []  # when, who, images done then, seconds they took
    left, now = images, 0.0
    while left or events:
        for worker in sorted(idle):
            others = [
                WorkerLoad(measured[other].cost_per_s, max(0.0, free_at[other] - now))
                for other in range(len(speeds))
                if other != worker
            ]
            chunk = min(left, round(choose_chunk_cost(WorkerLoad(measured[worker].cost_per_s), others, left, unit)))
            if chunk:
                took = 0.05 + sum(chance.uniform(0.85, 1.15) / speeds[worker] for _ in range(chunk))
                heapq.heappush(events, (now + took, worker, chunk, took))
                free_at[worker] = now + chunk / (measured[worker].cost_per_s or speeds[worker])
                idle.discard(worker)
                left -= chunk
        now, worker, chunk, took = heapq.heappop(events)
        measured[worker].add_measurement(chunk, took)
        idle.add(worker)
    return now


@pytest.mark.parametrize(("images", "most"), [(40, 1.1), (400, 1.02)])
def test_cards_end_together(images: int, most: float) -> None:
    """Makespan against all cards busy to the last moment; of unequal cards at worst, of equal ones in the median."""

    def ratios(speeds: Sequence[float]) -> list[float]:
        return [makespan(speeds, images, seed) * sum(speeds) / images for seed in range(50)]

    assert max(ratios(UNEQUAL)) <= most
    assert statistics.median(ratios((1.0, 1.0, 1.0, 1.0))) <= most


def test_a_card_too_slow_to_help_at_the_end_is_left_out() -> None:
    fast, slow = WorkerLoad(1.0), WorkerLoad(0.05)
    assert choose_chunk_cost(slow, [fast], left=10, unit=1) == 0
    assert choose_chunk_cost(fast, [slow], left=10, unit=1) >= 1
    assert choose_chunk_cost(slow, [fast], left=100, unit=1) >= 1
    assert choose_chunk_cost(slow, [replace(fast, busy_s=60)], left=2, unit=1) >= 1


def test_chunks_are_some_fifteen_seconds_for_the_worker_that_asks() -> None:
    for speed in (0.5, 2.0, 20.0):
        others = [WorkerLoad(1.0)] * 3
        assert choose_chunk_cost(WorkerLoad(speed), others, left=1e6, unit=1) == max(1, int(TARGET_CHUNK_S * speed))
    assert choose_chunk_cost(WorkerLoad(None), [WorkerLoad(20.0)], left=1e6, unit=4) == 4


FLEET = st.lists(
    st.builds(WorkerLoad, st.one_of(st.none(), st.floats(0.01, 100)), st.floats(0, 60)), min_size=1, max_size=6
)


@given(FLEET, st.integers(1, 1000), st.sampled_from([1.0, 3.5]))
def test_somebody_always_gets_what_is_left(fleet: list[WorkerLoad], units: int, unit: float) -> None:
    """With all idle nobody waits for nobody: at least one is given work."""
    idle = [replace(worker, busy_s=0.0) for worker in fleet]
    given = [
        choose_chunk_cost(worker, idle[:number] + idle[number + 1 :], units * unit, unit)
        for number, worker in enumerate(idle)
    ]
    assert any(work >= unit for work in given)
    assert all(work == 0 or work >= unit for work in given)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 60)), min_size=1, max_size=6), st.integers(1, 1000))
def test_by_then_all_is_done_and_not_much_before(fleet: list[tuple[float, float]], units: int) -> None:
    end = estimate_finish_s(fleet, units, 1.0)

    def done(seconds: float) -> int:
        return sum(int(max(0.0, seconds - busy) * speed + 1e-6) for speed, busy in fleet)

    assert done(end * 1.001) >= units
    assert done(end * 0.998 - 1e-3) < units


def test_speed_follows_what_is_measured() -> None:
    speed = WorkerSpeed()
    speed.add_measurement(10, 5)
    assert speed.cost_per_s == 2
    for _ in range(30):
        speed.add_measurement(10, 10)
    assert speed.cost_per_s == pytest.approx(1, rel=1e-3)


def test_work_counts_pixels_steps_guidance_and_second_looks() -> None:
    (image,) = images_of([row(1, 7, 1, 1)])

    def work(**params: object) -> float:
        return estimate_batch_cost(MicroBatch((replace(image, params=replace(PARAMS, **params)),), frozenset({1})))  # type: ignore[arg-type]

    assert work(width=1024) == 2 * work()
    assert work(steps=100) / work() == pytest.approx(2, rel=0.05)
    assert work(sampler="heun") / work() == pytest.approx(2, rel=0.05)
    plain = estimate_batch_cost(MicroBatch((replace(image, scale=1.0),), frozenset({1})))
    assert work() / plain == pytest.approx(2, rel=0.05)
