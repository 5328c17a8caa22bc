"""When another worker takes a lost one's place, and when its card is given up."""

import time

import pytest

from tinysd_batch.job.ray_workers.slots import BOOT_ATTEMPTS, MAX_BACKOFF_S, MAX_HOST_LOSSES, Card, Slot
from tinysd_batch.job.workers.faults import Fault


def booted(name: str, node: str = "n") -> Slot:
    slot = Slot(name, Card(node, 0))
    slot.booted(node)
    slot.welcomed()
    return slot


def test_a_worker_that_dies_is_replaced_after_growing_delays() -> None:
    slot, now, delays = booted("a"), time.monotonic(), []
    for _ in range(9):
        slot.died(Fault.WORKER_DIED, now)
        delays.append(slot.start_at - now)
        slot.welcomed()
        assert not slot.is_given_up(Fault.WORKER_DIED, [slot], machine_is_gone=False)
    assert delays == sorted(delays)
    assert delays[0] < 1
    assert delays[-1] == pytest.approx(MAX_BACKOFF_S)


def test_a_card_on_which_the_model_does_not_load_is_given_up() -> None:
    slot = Slot("a")
    for attempt in range(1, BOOT_ATTEMPTS + 1):
        slot.died(Fault.WORKER_DIED, 0.0)
        assert slot.is_given_up(Fault.WORKER_DIED, [slot], machine_is_gone=False) == (attempt == BOOT_ATTEMPTS)


def test_a_machine_short_of_memory_keeps_its_last_worker_for_a_while() -> None:
    one, neighbour, elsewhere = booted("a"), booted("b"), booted("c", "other")
    one.died(Fault.HOST_OUT_OF_MEMORY, 0.0)
    assert one.is_given_up(Fault.HOST_OUT_OF_MEMORY, [one, neighbour, elsewhere], machine_is_gone=False)
    given_up = [neighbour.is_given_up(Fault.HOST_OUT_OF_MEMORY, [neighbour, elsewhere], machine_is_gone=False)]
    for _ in range(MAX_HOST_LOSSES):
        neighbour.died(Fault.HOST_OUT_OF_MEMORY, 0.0)
        given_up.append(neighbour.is_given_up(Fault.HOST_OUT_OF_MEMORY, [neighbour, elsewhere], machine_is_gone=False))
    assert given_up == [False] * MAX_HOST_LOSSES + [True]


def test_a_card_goes_with_its_machine_and_comes_back_when_that_was_only_out_of_reach() -> None:
    slot = booted("a")
    slot.died(Fault.NODE_LOST, 0.0)
    assert slot.is_given_up(Fault.NODE_LOST, [slot], machine_is_gone=True)
    assert not slot.is_given_up(Fault.NODE_LOST, [slot], machine_is_gone=False)
