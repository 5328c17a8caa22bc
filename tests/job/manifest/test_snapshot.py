"""Rows in a snapshot, and how a changed manifest is distinguished from one with appended rows."""

import gzip
from itertools import zip_longest
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.settings import make_image_settings
from tinysd_batch.errors import StorageError
from tinysd_batch.job.manifest.changes import LinePair, ManifestDiff
from tinysd_batch.job.manifest.files import compute_fingerprint, starts_with_fingerprint
from tinysd_batch.job.manifest.snapshot import (
    ROWS_FILE,
    Snapshot,
    SnapshotRow,
    SnapshotWriter,
    parse_snapshot_line,
    read_snapshot_lines,
    row_to_line,
)
from tinysd_batch.records import InvalidRow, Row

SETTINGS = make_image_settings()


def row(number: int, prompt: str, seed: int | None = None, **extra: object) -> Row:
    return Row(number, prompt, SETTINGS, seed, extra=extra)


def lines(*prompts: str) -> list[str]:
    return [row_to_line(row(number, prompt)) for number, prompt in enumerate(prompts, start=1)]


def pairs(old: list[str], new: list[str]) -> list[LinePair]:
    return [(number, *both) for number, both in enumerate(zip_longest(old, new), start=1)]


@pytest.mark.parametrize(
    ("prompts", "description"),
    [
        ("a x c d e", "row 2: prompt 'b' is now 'x'"),
        ("a x c y e", "row 2: prompt 'b' is now 'x'; row 4: prompt 'd' is now 'y'"),
        ("a x c d e f", "row 2: prompt 'b' is now 'x'; and there are 6 rows instead of 5"),
        (
            "1 2 3 4 5",
            "row 1: prompt 'a' is now '1'; row 2: prompt 'b' is now '2'; row 3: prompt 'c' is now '3'; "
            "2 more rows differ",
        ),
        ("a b n c d e", "row 3 is new, before 3 of the old ones"),
        ("m n a b c d e", "rows 1 to 2 are new, before 5 of the old ones"),
        ("a b c", "rows 4 to 5 are missing"),
        ("a c d e", "row 2 is missing"),
        ("a x y z c d e", "from row 2 on, 1 row became 3; row 2: prompt 'b' is now 'x'"),
    ],
)  # fmt: skip
def test_description_of_a_change(prompts: str, description: str) -> None:
    diff = ManifestDiff.from_pairs(pairs(lines(*"abcde"), lines(*prompts.split())))
    assert not diff.is_append_only
    assert str(diff) == description


PROMPTS = st.lists(st.sampled_from("abc"), max_size=8)


@given(PROMPTS, PROMPTS)
def test_only_rows_after_the_old_ones_count_as_appended(old: list[str], new: list[str]) -> None:
    diff = ManifestDiff.from_pairs(pairs(lines(*old), lines(*new)))
    is_append_only = new[: len(old)] == old
    assert diff.is_append_only == is_append_only
    assert is_append_only or str(diff)


def test_difference_names_columns_with_both_values() -> None:
    invalid_row = InvalidRow(1, "column seed = 'x': a whole number was expected", prompt="a")
    for new, description in (
        (row(1, "a", 7), "row 1: seed (empty) is now 7"),
        (row(1, "a", artist="\x1b[2J"), "row 1: artist (empty) is now '\\x1b[2J'"),
        (invalid_row, "row 1: is invalid now: prompt 'a'"),
    ):
        assert str(ManifestDiff.from_pairs(pairs(lines("a"), [row_to_line(new)]))) == description


def test_rows_are_read_back_up_to_the_count(tmp_path: Path) -> None:
    writer = SnapshotWriter()
    rows = [row(1, "a\nb\u2028c", 2**63 - 1, artist="é", price=1.5), row(2, "b")]
    for each in rows:
        writer.add(each)
    writer.save(tmp_path)
    assert list(read_snapshot_lines(tmp_path, 2)) == [row_to_line(each) for each in rows]
    assert list(read_snapshot_lines(tmp_path, 1)) == [row_to_line(rows[0])]
    assert [snapshot_row.to_row() for snapshot_row in Snapshot(tmp_path, 2).rows()] == rows


NUMBERS = st.integers(1, 10**9)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
EXTRA = st.dictionaries(st.text(max_size=3), st.text() | st.floats(allow_nan=False))
SEEDS = st.none() | st.integers(0, 2**63 - 1)
VALID_ROWS = st.builds(
    lambda number, prompt, seed, extra: row(number, prompt, seed, **extra), NUMBERS, TEXT, SEEDS, EXTRA
)
INVALID_ROWS = st.builds(InvalidRow, NUMBERS, TEXT.filter(bool), st.none() | TEXT, st.none() | TEXT)


@given(st.lists(VALID_ROWS | INVALID_ROWS, max_size=6))
def test_every_row_is_restored_with_its_number(rows: list[Row | InvalidRow]) -> None:
    writer = SnapshotWriter()
    for each in rows:
        writer.add(each)
    assert writer.highest_row_number == max((each.number for each in rows), default=0)
    assert list(writer.read_back()) == rows


@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize(
    ("old", "new", "is_append"),
    [
        ("prompt\ncat\n", "prompt\ncat\ndog\n", True),
        ("prompt\ncat", "prompt\ncat\ndog", True),
        ("prompt\r\ncat", "prompt\r\ncat\r\ndog\r\n", True),
        ("prompt\ncat", "prompt\ncats\n", False),  # starts with the same bytes, but the row is another one
        ("prompt\ncat\n", "prompt\ndog\ncat\n", False),
        ("prompt\ncat\n", "prompt\ncat\n", True),
        ("prompt\ncat\ndog\n", "prompt\ncat\n", False),
    ],
)
def test_fingerprint_recognizes_a_file_with_appended_lines(
    tmp_path: Path, old: str, new: str, is_append: bool, size: bool
) -> None:
    file = tmp_path / "m.csv"
    file.write_bytes(old.encode())
    digest = compute_fingerprint(file)
    file.write_bytes(new.encode())
    assert starts_with_fingerprint(file, digest, len(old) if size else None) == is_append


VALID = parse_snapshot_line(row_to_line(row(1, "a", 7)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 7), ("prompt", "a\0"), ("prompt", "x" * 10_001), ("seed", -1), ("seed", 1.0), ("seed", True),
        ("steps", 0), ("steps", 10**9), ("width", "64"), ("height", 10**6), ("n_iter", 10**6), ("scale", float("nan")),
        ("scale", "7"), ("eta", 2), ("sampler", "magic"), ("sampler", []), ("prompt_syntax", {}), ("extra", []),
        ("id", 7), ("negative_prompt", None),
    ],
)  # fmt: skip
def test_values_that_no_manifest_allows_are_rejected(name: str, value: object) -> None:
    import json

    with pytest.raises(StorageError, match="not a row of a job"):
        SnapshotRow(1, json.dumps({**VALID, name: value})).to_row()


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{}", "7", '{"id": 1, "extra": {}}', '{"id": null, "extra": {}, "seed": 1, "n_iter": "x"}', "[" * 9999],
)
def test_line_that_is_not_a_row_is_rejected(line: str) -> None:
    with pytest.raises(StorageError, match="not a row of a job"):
        parse_snapshot_line(line)


def test_damaged_snapshot_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / ROWS_FILE
    whole = gzip.compress("".join(f"{line}\n" for line in lines("a", "b")).encode())
    for content in (whole, whole[:-12], b"not gzip", gzip.compress(b"{}\n{}"), gzip.compress(b"\xff\n" * 3)):
        file.write_bytes(content)
        with pytest.raises(StorageError, match="restore it from a backup"):
            list(read_snapshot_lines(tmp_path, 3))
    file.unlink()
    with pytest.raises(StorageError, match="No such file"):
        list(read_snapshot_lines(tmp_path, 1))
