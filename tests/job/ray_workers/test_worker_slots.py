"""Which cards a pool works with, and which workers it lets in."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinysd_batch
from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job.ray_workers import handshake
from tinysd_batch.job.ray_workers.slots import Card, changes, cpus_of, gpus_of


def node(name: str, gpus: float | None, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 1.0} | ({"GPU": gpus} if gpus is not None else {})}


def test_the_cards_of_living_nodes() -> None:
    nodes = [node("head", None), node("a", 2.0), node("dead", 4.0, alive=False), node("b", 1.0)]
    assert gpus_of(nodes) == [Card("a", 0), Card("b", 0), Card("a", 1)]


def test_without_gpus_each_machine_gets_its_share() -> None:
    cores = {"head": 0.0, "a": 8.0, "b": 2.0}
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": count}} for name, count in cores.items()]
    assert cpus_of(nodes, 4, None) == [
        Card("a", 0), Card("b", 0), Card("a", 1), Card("b", 1), Card("a", 2), Card("a", 3),
    ]  # fmt: skip
    assert cpus_of(nodes, 1, None) == [Card("a", 0), Card("b", 0)]
    new, _ = changes([], [], cpus_of(nodes, 4, 3), 3)
    assert new == [Card("a", 0), Card("b", 0), Card("a", 1)]


CARDS = st.sets(st.builds(Card, st.sampled_from("abcd"), st.integers(0, 3)))


@given(CARDS, CARDS, CARDS, st.one_of(st.none(), st.integers(1, 5)))
def test_cards_come_and_go(known: set[Card], given_up: set[Card], present: set[Card], most: int | None) -> None:
    known -= given_up
    new, gone = changes(known, given_up, sorted(present, key=str), most)
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
    word = handshake.offer(tmp_path)
    assert handshake.answer(tmp_path, word, "gpu-0")
    handshake.check(description(), tmp_path, word, "gpu-0", "ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0"}, "rig runs tinysd-batch 0.0, and this machine"),
        ({"model_digest": "cd"}, "the model on rig has other weights"),
        ({"shares_storage": False}, "rig does not see the job's folder"),
    ],
)
def test_others_are_told_apart(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    word = handshake.offer(tmp_path)
    handshake.answer(tmp_path, word, "gpu-0")
    with pytest.raises(NoWorkerError, match=message):
        handshake.check(description(**change), tmp_path, word, "gpu-0", "ab")


def test_a_path_that_is_local_to_each_machine_is_found_out(tmp_path: Path) -> None:
    """The worker sees another folder under the same path, an empty one or one of an earlier run, or cannot write."""
    here, there = tmp_path / "here", tmp_path / "there"
    word = handshake.offer(here)
    handshake.offer(there)
    assert not handshake.answer(there, word, "gpu-0")
    assert not handshake.answer(tmp_path / "nowhere", word, "gpu-0")
    with pytest.raises(NoWorkerError, match="put the job on storage that all machines share"):
        handshake.check(description(), here, word, "gpu-0", "ab")
