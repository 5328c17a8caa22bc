"""Where workers are placed, when a lost one is replaced, and when its slot is retired."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.job.ray_workers.worker_slots import (
    MAX_BACKOFF_S,
    MAX_HOST_OOM_LOSSES,
    MAX_START_ATTEMPTS,
    Placement,
    WorkerSlot,
    diff_placements,
    is_node_dead,
    list_cpu_placements,
    list_gpu_placements,
)
from tinysd_batch.job.workers.faults import FaultType


def make_node(name: str, gpus: float | None, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 1.0} | ({"GPU": gpus} if gpus is not None else {})}


def test_gpus_of_nodes_that_are_alive() -> None:
    nodes = [make_node("head", None), make_node("a", 2.0), make_node("dead", 4.0, alive=False), make_node("b", 1.0)]
    assert list_gpu_placements(nodes) == [Placement("a", 0), Placement("b", 0), Placement("a", 1)]
    assert [is_node_dead(name, nodes) for name in ("a", "dead", "unknown")] == [False, True, True]


def test_without_gpus_each_machine_gets_workers_by_its_cores() -> None:
    cores = {"head": 0.0, "a": 8.0, "b": 2.0}
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": count}} for name, count in cores.items()]
    positions = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("a", 3)]
    assert list_cpu_placements(nodes, 4, None) == [Placement(*position) for position in positions]
    assert list_cpu_placements(nodes, 1, None) == [Placement("a", 0), Placement("b", 0)]
    new, _ = diff_placements([], [], list_cpu_placements(nodes, 4, 3), 3)
    assert new == [Placement("a", 0), Placement("b", 0), Placement("a", 1)]


PLACEMENTS = st.sets(st.builds(Placement, st.sampled_from("abcd"), st.integers(0, 3)))


@given(PLACEMENTS, PLACEMENTS, PLACEMENTS, st.one_of(st.none(), st.integers(1, 5)))
def test_placements_join_and_leave(
    current: set[Placement], retired: set[Placement], available: set[Placement], max_workers: int | None
) -> None:
    current -= retired
    new, gone = diff_placements(current, retired, sorted(available, key=str), max_workers)
    candidates = available - current - retired
    assert set(gone) == current - available
    assert set(new) <= candidates
    kept = len(current) - len(gone)
    if max_workers is None:
        assert set(new) == candidates
    else:
        assert len(new) == max(0, min(len(candidates), max_workers - kept))


def make_ready_slot(name: str, node_id: str = "n") -> WorkerSlot:
    slot = WorkerSlot(name, Placement(node_id, 0))
    slot.record_started(node_id)
    slot.mark_ready()
    return slot


def test_a_worker_that_dies_is_replaced_after_growing_delays() -> None:
    slot, now, delays = make_ready_slot("a"), time.monotonic(), []
    for _ in range(9):
        slot.record_loss(FaultType.WORKER_DIED, now)
        delays.append(slot.next_start_at - now)
        slot.mark_ready()
        assert not slot.should_retire(FaultType.WORKER_DIED, [slot], is_machine_gone=False)
    assert delays == sorted(delays)
    assert delays[0] < 1
    assert delays[-1] == pytest.approx(MAX_BACKOFF_S)


def test_a_slot_in_which_the_model_does_not_load_is_retired() -> None:
    slot = WorkerSlot("a")
    for attempt in range(1, MAX_START_ATTEMPTS + 1):
        slot.record_loss(FaultType.WORKER_DIED, 0.0)
        should_retire = slot.should_retire(FaultType.WORKER_DIED, [slot], is_machine_gone=False)
        assert should_retire == (attempt == MAX_START_ATTEMPTS)


def test_a_machine_short_of_memory_keeps_its_last_worker_for_some_losses() -> None:
    fault = FaultType.HOST_OUT_OF_MEMORY
    slot, neighbour, elsewhere = make_ready_slot("a"), make_ready_slot("b"), make_ready_slot("c", "other")
    slot.record_loss(fault, 0.0)
    assert slot.should_retire(fault, [slot, neighbour, elsewhere], is_machine_gone=False)
    retired = [neighbour.should_retire(fault, [neighbour, elsewhere], is_machine_gone=False)]
    for _ in range(MAX_HOST_OOM_LOSSES):
        neighbour.record_loss(fault, 0.0)
        retired.append(neighbour.should_retire(fault, [neighbour, elsewhere], is_machine_gone=False))
    assert retired == [False] * MAX_HOST_OOM_LOSSES + [True]


def test_a_slot_is_retired_with_its_machine_but_not_if_that_was_only_unreachable() -> None:
    slot = make_ready_slot("a")
    slot.record_loss(FaultType.NODE_LOST, 0.0)
    assert slot.should_retire(FaultType.NODE_LOST, [slot], is_machine_gone=True)
    assert not slot.should_retire(FaultType.NODE_LOST, [slot], is_machine_gone=False)
