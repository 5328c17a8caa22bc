"""When another worker takes a lost one's place, and when its card is given up."""

import time

import pytest

from tinysd_batch.job.ray_workers.slots import (
    MAX_BACKOFF_S,
    MAX_HOST_OOM_LOSSES,
    MAX_START_ATTEMPTS,
    Placement,
    WorkerSlot,
)
from tinysd_batch.job.workers.faults import FaultType


def booted(name: str, node: str = "n") -> WorkerSlot:
    slot = WorkerSlot(name, Placement(node, 0))
    slot.record_started(node)
    slot.mark_ready()
    return slot


def test_a_worker_that_dies_is_replaced_after_growing_delays() -> None:
    slot, now, delays = booted("a"), time.monotonic(), []
    for _ in range(9):
        slot.record_loss(FaultType.WORKER_DIED, now)
        delays.append(slot.next_start_at - now)
        slot.mark_ready()
        assert not slot.should_retire(FaultType.WORKER_DIED, [slot], machine_is_gone=False)
    assert delays == sorted(delays)
    assert delays[0] < 1
    assert delays[-1] == pytest.approx(MAX_BACKOFF_S)


def test_a_card_on_which_the_model_does_not_load_is_given_up() -> None:
    slot = WorkerSlot("a")
    for attempt in range(1, MAX_START_ATTEMPTS + 1):
        slot.record_loss(FaultType.WORKER_DIED, 0.0)
        assert slot.should_retire(FaultType.WORKER_DIED, [slot], machine_is_gone=False) == (
            attempt == MAX_START_ATTEMPTS
        )


def test_a_machine_short_of_memory_keeps_its_last_worker_for_a_while() -> None:
    one, neighbour, elsewhere = booted("a"), booted("b"), booted("c", "other")
    one.record_loss(FaultType.HOST_OUT_OF_MEMORY, 0.0)
    assert one.should_retire(FaultType.HOST_OUT_OF_MEMORY, [one, neighbour, elsewhere], machine_is_gone=False)
    given_up = [neighbour.should_retire(FaultType.HOST_OUT_OF_MEMORY, [neighbour, elsewhere], machine_is_gone=False)]
    for _ in range(MAX_HOST_OOM_LOSSES):
        neighbour.record_loss(FaultType.HOST_OUT_OF_MEMORY, 0.0)
        given_up.append(
            neighbour.should_retire(FaultType.HOST_OUT_OF_MEMORY, [neighbour, elsewhere], machine_is_gone=False)
        )
    assert given_up == [False] * MAX_HOST_OOM_LOSSES + [True]


def test_a_card_goes_with_its_machine_and_comes_back_when_that_was_only_out_of_reach() -> None:
    slot = booted("a")
    slot.record_loss(FaultType.NODE_LOST, 0.0)
    assert slot.should_retire(FaultType.NODE_LOST, [slot], machine_is_gone=True)
    assert not slot.should_retire(FaultType.NODE_LOST, [slot], machine_is_gone=False)
