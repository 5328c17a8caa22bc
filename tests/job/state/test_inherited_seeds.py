"""Rows inherit seeds from the matching rows of another job."""

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


def make_rows(specs: list[Spec], first_seed: int | None) -> list[SeededRow]:
    return [
        SeededRow(number, identity, prompt.encode(), None if first_seed is None else first_seed + number)
        for number, (identity, prompt) in enumerate(specs, start=1)
    ]


def match(old: list[Spec], new: list[Spec]) -> dict[int, int]:
    return match_seeds(make_rows(old, 100), make_rows(new, None))


def test_correcting_a_typo_changes_the_seed_of_one_row() -> None:
    old: list[Spec] = [(None, "apple"), (None, "cta"), (None, "owl")]
    assert match(old, [(None, "apple"), (None, "cat"), (None, "owl")]) == {1: 101, 3: 103}


def test_a_changed_row_with_an_id_keeps_its_seed() -> None:
    assert match([("a", "apple"), ("b", "cta")], [("a", "apple"), ("b", "cat")]) == {1: 101, 2: 102}


def test_equal_rows_are_matched_in_order() -> None:
    old: list[Spec] = [(None, "cat"), (None, "owl"), (None, "cat")]
    assert match(old, [(None, "new"), (None, "cat"), (None, "cat"), (None, "cat")]) == {2: 101, 3: 103}


def test_rows_are_matched_by_id_before_prompt() -> None:
    assert match([(None, "cat"), ("a", "cat")], [("b", "cat"), ("a", "dog")]) == {1: 101, 2: 102}


SPECS = st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from("xyz")), max_size=8)


@given(SPECS, SPECS)
def test_no_seed_is_inherited_twice(old: list[Spec], new: list[Spec]) -> None:
    seeds = list(match(old, new).values())
    assert len(set(seeds)) == len(seeds)


@given(SPECS)
def test_an_unchanged_manifest_inherits_all_seeds(specs: list[Spec]) -> None:
    assert match(specs, specs) == {number: 100 + number for number in range(1, len(specs) + 1)}


@given(SPECS, st.integers(0, 7))
def test_deleting_a_row_leaves_every_other_row_a_seed(specs: list[Spec], deleted: int) -> None:
    """Rows with equal id and prompt may swap their seeds, but each gets one."""
    rest = specs[:deleted] + specs[deleted + 1 :]
    given_seeds = match(specs, rest)
    assert len(given_seeds) == len(rest)


def test_seeds_are_saved_and_read_back(tmp_path: Path) -> None:
    save_inherited_seeds({1: 0, 20_000: 2**63 - 1}, tmp_path)
    assert read_inherited_seeds(tmp_path) == {1: 0, 20_000: 2**63 - 1}


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x1f\x8b\x08"])
def test_a_missing_or_damaged_seeds_file_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / SEEDS_FILE).write_bytes(content)
    with pytest.raises(StorageError, match="cannot be read"):
        read_inherited_seeds(tmp_path)
