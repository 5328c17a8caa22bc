"""Rows kept, and how a changed manifest is told from one that has grown."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.errors import StorageError
from tinysd_batch.job.rows import ROWS_FILE, Change, RowKeeper, as_line, parse_line, read_kept_lines
from tinysd_batch.records import InvalidRow, Row, SamplingParams

PARAMS = SamplingParams(width=64, height=64, steps=20, sampler="plms", eta=0.0)


def row(number: int, prompt: str, seed: int | None = None, **extra: object) -> Row:
    return Row(number, prompt, "", seed, 7.5, 1, 1, PARAMS, extra=extra)


def lines(*prompts: str) -> list[str]:
    return [as_line(row(number, prompt)) for number, prompt in enumerate(prompts, start=1)]


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ("a x c d e", "row 2: prompt 'b' is now 'x'"),
        ("a x c y e", "row 2: prompt 'b' is now 'x'; row 4: prompt 'd' is now 'y'"),
        ("a x c d e f", "row 2: prompt 'b' is now 'x'; and there are 6 rows instead of 5"),
        (
            "1 2 3 4 5",
            "row 1: prompt 'a' is now '1'; row 2: prompt 'b' is now '2'; row 3: prompt 'c' is now '3'; "
            "2 rows more differ",
        ),
        ("a b n c d e", "row 3 is new, before 3 of the old ones"),
        ("m n a b c d e", "rows 1 to 2 are new, before 5 of the old ones"),
        ("a b c", "rows 4 to 5 are gone"),
        ("a c d e", "row 2 is gone"),
        ("a x y z c d e", "from row 2 on 1 row became 3; row 2: prompt 'b' is now 'x'"),
    ],
)  # fmt: skip
def test_what_is_told_of_a_change(now: str, told: str) -> None:
    change = Change.between(lines(*"abcde"), lines(*now.split()))
    assert change.appended is None
    assert str(change) == told


PROMPTS = st.lists(st.sampled_from("abc"), max_size=8)


@given(PROMPTS, PROMPTS)
def test_only_rows_behind_the_old_ones_are_appended(old: list[str], new: list[str]) -> None:
    change = Change.between(lines(*old), lines(*new))
    grown = new[: len(old)] == old
    assert change.appended == (len(new) - len(old) if grown else None)
    assert grown or str(change)


def test_a_difference_names_columns_with_both_values() -> None:
    faulty = InvalidRow(1, "column seed = 'x': a whole number was expected", prompt="a")
    for new, told in (
        (row(1, "a", 7), "row 1: seed nothing is now 7"),
        (row(1, "a", artist="\x1b[2J"), "row 1: artist nothing is now '\\x1b[2J'"),
        (faulty, "row 1: is faulty now: prompt 'a'"),
    ):
        assert str(Change.between(lines("a"), [as_line(new)])) == told
    assert str(Change.between([as_line(faulty)], lines("a"))) == "row 1: was faulty, and can be made now"


def test_the_wording_of_faults_is_no_change() -> None:
    one, other = (InvalidRow(1, reason, prompt="a") for reason in ("bad seed", "a seed that is bad"))
    assert Change.between([as_line(one)], [as_line(other)]).appended == 0


def test_rows_are_read_as_they_were_kept_and_no_further_than_asked(tmp_path: Path) -> None:
    keeper = RowKeeper()
    kept = [row(1, "a\nb\u2028c", 2**63 - 1, artist="é", price=1.5), row(2, "b")]
    for one in kept:
        keeper.add(one)
    keeper.save(tmp_path)
    assert list(read_kept_lines(tmp_path, 2)) == [as_line(one) for one in kept]
    assert list(read_kept_lines(tmp_path, 1)) == [as_line(kept[0])]


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{}", "7", '{"id": 1, "extra": {}}', '{"id": null, "extra": {}, "seed": 1, "n_iter": "x"}', "[" * 9999],
)
def test_what_is_no_row_is_named(line: str) -> None:
    with pytest.raises(StorageError, match="not a row of a job"):
        parse_line(line)


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    file = tmp_path / ROWS_FILE
    whole = gzip.compress("".join(f"{line}\n" for line in lines("a", "b")).encode())
    for content in (whole, whole[:-12], b"no gzip", gzip.compress(b"{}\n{}"), gzip.compress(b"\xff\n" * 3)):
        file.write_bytes(content)
        with pytest.raises(StorageError, match="bring the manifest back"):
            list(read_kept_lines(tmp_path, 3))
    file.unlink()
    with pytest.raises(StorageError, match="No such file"):
        list(read_kept_lines(tmp_path, 1))
