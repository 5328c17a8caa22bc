"""Objects on lines and in arrays: NaN, errors, limits, and reading in linear time."""

import json
import time
from pathlib import Path

import pytest

from tests.support.manifests import DEFAULTS, get_reason, write_and_read
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.validate import read_rows
from tinysd_batch.records import InvalidRow, Row


def test_nan_is_a_missing_value_and_infinity_is_not(tmp_path: Path) -> None:
    lines = (
        '{"prompt": "red apple", "aesthetic": NaN, "seed": NaN}\n'
        '{"prompt": "cat", "aesthetic": Infinity}\n'
        '{"prompt": "dog", "tags": [NaN, 1]}\n'
    )
    apple, cat, dog = write_and_read(tmp_path / "m.jsonl", lines)[0]
    assert isinstance(apple, Row)
    assert (apple.seed, apple.extra) == (None, {})
    assert (get_reason(cat), cat.prompt) == ("Infinity is not a JSON number", "cat")
    assert dog.extra == {"tags": "[NaN, 1]"}


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "cat", "x": Infinity}', "no JSON", '{"prompt": "cat", "prompt": "dog"}', '{"text": "\\ud800"}',
     json.dumps({"prompt": "cat", **{f"k{n}": 1 for n in range(1000)}})],
)  # fmt: skip
def test_missing_prompt_key_is_not_reported_if_rows_were_unreadable(tmp_path: Path, line: str) -> None:
    rows, _ = write_and_read(tmp_path / "m.jsonl", f'{line}\n{{"seed": 7}}\n')
    assert [type(row) for row in rows] == [InvalidRow, InvalidRow]
    assert "column prompt is empty" in get_reason(rows[1])


def test_too_many_keys(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "cat", **{f"k{n}": 1 for n in range(1200)}})
    (row,), _ = write_and_read(tmp_path / "m.jsonl", f"{line}\n")
    assert get_reason(row) == "1,201 keys, at most 1,000; remove those that are not needed"


def test_duplicate_keys_take_linear_time(tmp_path: Path) -> None:
    pairs = ", ".join(f'"k{n}": 1' for n in range(20_000))
    started = time.process_time()
    (row,), _ = write_and_read(tmp_path / "m.jsonl", f'{{"prompt": "cat", {pairs}, "k7": 2}}\n')
    assert time.process_time() - started < 1  # comparing all keys with each other takes five seconds
    assert get_reason(row) == "20,001 keys, at most 1,000; remove those that are not needed"
    (row,), _ = write_and_read(tmp_path / "m.jsonl", '{"prompt": "cat", "k7": 1, "k7": 2}\n')
    assert get_reason(row) == "key 'k7' appears twice"


# Arrays

ARRAY = '[\n {"prompt": "cat", "seed": 1},\n {"prompt": "dog",\n  "seed": "x"}, {"prompt": "owl"}\n]\n'


@pytest.mark.parametrize("name", ["m.json", "m.jsonl", "m.json.gz", "m.ndjson"])
def test_an_array_of_objects(tmp_path: Path, name: str) -> None:
    rows, _ = write_and_read(tmp_path / name, ARRAY)
    assert [row.prompt for row in rows] == ["cat", "dog", "owl"]
    assert isinstance(rows[1], InvalidRow)
    assert (rows[1].line, rows[1].reason) == (3, "column seed = 'x': a whole number was expected")


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "cat"}\n{"prompt": "dog"}\n',
        '{\n"prompt": "cat"}{"prompt":\n"dog"\n}',
        '[{"prompt":"cat"},{"prompt":"dog"},]',
    ],
)
def test_other_contents_of_a_json_file(tmp_path: Path, content: str) -> None:
    rows, _ = write_and_read(tmp_path / "m.json", content)
    assert [row.prompt for row in rows] == ["cat", "dog"]


def test_bad_value_in_an_array_invalidates_only_its_row(tmp_path: Path) -> None:
    content = '[3, {"prompt": "cat", "x": {"a": 1, "a": 2}}, "text", {"prompt": "\\ud800"}, [1], {"prompt": "dog"}]'
    rows, _ = write_and_read(tmp_path / "m.json", content)
    assert [getattr(row, "reason", "") for row in rows] == [
        "not a JSON object", "key 'a' appears twice", "not a JSON object",
        "half a character: a \\u escape of a surrogate without the other one of its pair", "not a JSON object", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "cat"}\n {"prompt": "dog"}]', "line 2: ',' or ']' was expected after an object"),
        ('[{"prompt": "cat"},\n{"prompt" "dog"}]', "line 2: not a JSON object: Expecting ':' delimiter"),
        ('[{"prompt": "cat"},\n', "line 2: the array is not closed"),
        ('[{"prompt": "cat"}', "line 1: the array is not closed"),
        ('[{"prompt": "cat"}] more', "line 1: text after the end of the array"),
        ('[{"prompt": "cat", "x": "' + "x" * 9_000_000 + '"}]', "over 8,388,608 characters in one object"),
        ('[{"prompt": "cat", "x": ' + "[" * 100_000, "nested too deep"),
        ("[]", "no rows"),
        ("[{}, {}]", "no rows except 2 blank ones"),
    ],
)
def test_text_that_is_not_json(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        write_and_read(tmp_path / "m.json", content)


def test_line_with_a_list_does_not_make_the_file_an_array(tmp_path: Path) -> None:
    rows, _ = write_and_read(tmp_path / "m.jsonl", '[1]\n{"prompt": "cat"}\n')
    assert [type(row) for row in rows] == [InvalidRow, Row]


def test_long_array_is_read_in_blocks(tmp_path: Path) -> None:
    """Objects cross the block boundaries at all positions."""
    objects = [{"prompt": f"cat {n} 'ü\"[]{{}},", "seed": n, "x": "y" * (n % 700)} for n in range(3000)]
    (tmp_path / "m.json").write_text(json.dumps(objects, indent=1, ensure_ascii=False), encoding="utf-8")
    rows = list(read_rows(tmp_path / "m.json", DEFAULTS))
    assert [(row.prompt, row.seed) for row in rows if isinstance(row, Row)] == [
        (row["prompt"], row["seed"]) for row in objects
    ]
