"""Which cards a pool works with, and which workers it lets in."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinysd_batch
from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job.ray_workers import handshake
from tinysd_batch.job.ray_workers.slots import Placement, diff_placements, list_cpu_placements, list_gpu_placements


def node(name: str, gpus: float | None, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 1.0} | ({"GPU": gpus} if gpus is not None else {})}


def test_the_cards_of_living_nodes() -> None:
    nodes = [node("head", None), node("a", 2.0), node("dead", 4.0, alive=False), node("b", 1.0)]
    assert list_gpu_placements(nodes) == [Placement("a", 0), Placement("b", 0), Placement("a", 1)]


def test_without_gpus_each_machine_gets_its_share() -> None:
    cores = {"head": 0.0, "a": 8.0, "b": 2.0}
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": count}} for name, count in cores.items()]
    assert list_cpu_placements(nodes, 4, None) == [
        Placement("a", 0), Placement("b", 0), Placement("a", 1), Placement("b", 1), Placement("a", 2), Placement("a", 3),
    ]  # fmt: skip
    assert list_cpu_placements(nodes, 1, None) == [Placement("a", 0), Placement("b", 0)]
    new, _ = diff_placements([], [], list_cpu_placements(nodes, 4, 3), 3)
    assert new == [Placement("a", 0), Placement("b", 0), Placement("a", 1)]


CARDS = st.sets(st.builds(Placement, st.sampled_from("abcd"), st.integers(0, 3)))


@given(CARDS, CARDS, CARDS, st.one_of(st.none(), st.integers(1, 5)))
def test_cards_come_and_go(
    known: set[Placement], given_up: set[Placement], present: set[Placement], most: int | None
) -> None:
    known -= given_up
    new, gone = diff_placements(known, given_up, sorted(present, key=str), most)
    assert set(gone) == known - present
    assert set(new) <= present - known - given_up
    kept = len(known) - len(gone)
    if most is None:
        assert set(new) == present - known - given_up
    else:
        assert len(new) == max(0, min(len(present - known - given_up), most - kept))


def description(**change: Any) -> dict[str, Any]:
    told = {"node": "rig", "version": tinysd_batch.__version__, "model_digest": "ab", "shares_storage": True}
    return told | change


def test_a_worker_with_the_same_storage_model_and_version_is_let_in(tmp_path: Path) -> None:
    word = handshake.write_driver_file(tmp_path)
    assert handshake.answer_driver_file(tmp_path, word, "gpu-0")
    handshake.check_worker(description(), tmp_path, word, "gpu-0", "ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0"}, "rig runs tinysd-batch 0.0, and this machine"),
        ({"model_digest": "cd"}, "the model on rig has other weights"),
        ({"shares_storage": False}, "rig does not see the job's folder"),
    ],
)
def test_others_are_told_apart(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    word = handshake.write_driver_file(tmp_path)
    handshake.answer_driver_file(tmp_path, word, "gpu-0")
    with pytest.raises(NoWorkerError, match=message):
        handshake.check_worker(description(**change), tmp_path, word, "gpu-0", "ab")


def test_a_path_that_is_local_to_each_machine_is_found_out(tmp_path: Path) -> None:
    """The worker sees another folder under the same path, an empty one or one of an earlier run, or cannot write."""
    here, there = tmp_path / "here", tmp_path / "there"
    word = handshake.write_driver_file(here)
    handshake.write_driver_file(there)
    assert not handshake.answer_driver_file(there, word, "gpu-0")
    assert not handshake.answer_driver_file(tmp_path / "nowhere", word, "gpu-0")
    with pytest.raises(NoWorkerError, match="put the job on storage that all machines share"):
        handshake.check_worker(description(), here, word, "gpu-0", "ab")
