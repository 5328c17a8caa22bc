"""Which row of another job a row is, and so which seed it gets."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.errors import StorageError
from tinysd_batch.job.state.inherited_seeds import (
    SEEDS_FILE,
    SeededRow,
    match_seeds,
    read_inherited_seeds,
    save_inherited_seeds,
)

Spec = tuple[str | None, str]  # id, prompt


def job(specs: list[Spec], first_seed: int | None) -> list[SeededRow]:
    return [
        SeededRow(number, identity, prompt.encode(), None if first_seed is None else first_seed + number)
        for number, (identity, prompt) in enumerate(specs, start=1)
    ]


def matched(old: list[Spec], new: list[Spec]) -> dict[int, int]:
    return match_seeds(job(old, 100), job(new, None))


def test_a_fixed_typo_changes_one_row() -> None:
    old: list[Spec] = [(None, "apple"), (None, "cta"), (None, "owl")]
    assert matched(old, [(None, "apple"), (None, "cat"), (None, "owl")]) == {1: 101, 3: 103}


def test_with_an_id_the_changed_row_keeps_its_seed() -> None:
    assert matched([("a", "apple"), ("b", "cta")], [("a", "apple"), ("b", "cat")]) == {1: 101, 2: 102}


def test_rows_alike_are_matched_in_order() -> None:
    old: list[Spec] = [(None, "cat"), (None, "owl"), (None, "cat")]
    assert matched(old, [(None, "new"), (None, "cat"), (None, "cat"), (None, "cat")]) == {2: 101, 3: 103}


def test_an_id_goes_before_the_prompt() -> None:
    assert matched([(None, "cat"), ("a", "cat")], [("b", "cat"), ("a", "dog")]) == {1: 101, 2: 102}


SPECS = st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from("xyz")), max_size=8)


@given(SPECS, SPECS)
def test_no_seed_is_given_twice(old: list[Spec], new: list[Spec]) -> None:
    seeds = list(matched(old, new).values())
    assert len(set(seeds)) == len(seeds)


@given(SPECS)
def test_the_same_manifest_gets_all_its_seeds(specs: list[Spec]) -> None:
    assert matched(specs, specs) == {number: 100 + number for number in range(1, len(specs) + 1)}


@given(SPECS, st.integers(0, 7))
def test_leaving_out_a_row_leaves_the_others_what_their_kind_had(specs: list[Spec], gone: int) -> None:
    """Rows that bear the same id and prompt may take one another's place; each gets a seed of its own kind."""
    rest = specs[:gone] + specs[gone + 1 :]
    given_seeds = matched(specs, rest)
    assert len(given_seeds) == len(rest)


def test_seeds_are_kept(tmp_path: Path) -> None:
    save_inherited_seeds({1: 0, 20_000: 2**63 - 1}, tmp_path)
    assert read_inherited_seeds(tmp_path) == {1: 0, 20_000: 2**63 - 1}


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x1f\x8b\x08"])
def test_seeds_that_are_lost_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / SEEDS_FILE).write_bytes(content)
    with pytest.raises(StorageError, match="cannot be read"):
        read_inherited_seeds(tmp_path)
