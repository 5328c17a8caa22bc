import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.files import write_csv
from tests.support.manifests import DEFAULTS, get_reason, read_all_rows
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.validate import build_row
from tinysd_batch.records import InvalidRow, Row


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ""}, "column prompt is empty"),
        ({"prompt": "   "}, "column prompt is empty"),
        ({"prompt": "x" * 100_000}, "100000 characters, at most 10000"),
        ({"prompt": "nul\0byte"}, "NUL"),
        ({"prompt": "a:0 b:0"}, "weights sum to 0"),
        ({"height": "100"}, "column height = '100': must be a multiple of 16"),
        ({"width": "4096"}, "column width = '4096': must be between 8 and 2048"),
        ({"steps": "0"}, "column steps = '0': must be between 1 and 1000"),
        ({"steps": str(10**9)}, "must be between 1 and 1000"),
        ({"steps": "2.5"}, "a whole number was expected"),
        ({"seed": "abc"}, "column seed = 'abc': a whole number was expected"),
        ({"seed": "-2"}, "must be between 0"),
        ({"seed": str(2**63 - 1), "n_samples": "2"}, "the last image's seed would exceed"),
        ({"sampler": "karras"}, "no such sampler; one of plms, ddim, euler"),
        ({"scale": "inf"}, "must be finite"),
        ({"scale": True}, "a number was expected"),
        ({"scale": "much"}, "a number was expected"),
        ({"eta": "1.5"}, "column eta = '1.5': must be between 0 and 1"),
        ({"n_samples": "0"}, "must be between 1"),
        ({"n_iter": "100000", "n_samples": "1000"}, "at most 100000 images a row"),
    ],
)
def test_error_names_column_value_and_rule(values: dict[str, object], message: str) -> None:
    assert message in get_reason(build_row(1, {"prompt": "cat", **values}, DEFAULTS))


def test_eta_is_zero_for_samplers_without_eta() -> None:
    rows = [build_row(1, {"prompt": "cat", "eta": "0.5", "sampler": name}, DEFAULTS) for name in ("ddim", "Euler a")]
    assert [(row.settings.sampler, row.settings.eta) for row in rows if isinstance(row, Row)] == [
        ("ddim", 0.5),
        ("euler_a", 0.0),
    ]


def test_all_errors_of_a_row_are_reported() -> None:
    reason = get_reason(build_row(1, {"prompt": "cat", "seed": "x", "steps": "0", "scale": "inf"}, DEFAULTS))
    assert all(f"column {name}" in reason for name in ("seed", "steps", "scale"))


def test_csv_with_defaults_extra_columns_and_empty_cells(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "m.csv", [
        {"prompt": "cat", "seed": "7", "n_samples": "2", "id": "a", "artist": "me"},
        {"prompt": "dog, \"sitting\"", "seed": "", "n_samples": "", "id": "", "artist": ""},
    ])  # fmt: skip
    cat, dog = read_all_rows(path)
    assert isinstance(cat, Row)
    assert isinstance(dog, Row)
    assert (cat.prompt, cat.seed, cat.n_samples, cat.id, cat.extra) == ("cat", 7, 2, "a", {"artist": "me"})
    assert (dog.prompt, dog.seed, dog.n_samples, dog.id, dog.extra) == ('dog, "sitting"', None, 1, None, {})
    assert dog.settings.steps == 25


def test_csv_and_parquet_yield_the_same_rows(tmp_path: Path) -> None:
    columns = {"prompt": ["cat", "dog"], "seed": [1, 2**40], "scale": [2.5, 3.0], "height": [32, 64]}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    with (tmp_path / "m.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    assert read_all_rows(tmp_path / "m.csv") == read_all_rows(tmp_path / "m.parquet")


def test_parquet_keeps_types_of_extra_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["cat", None], "rank": [3, 4], "tags": [["a"], ["b"]]}), tmp_path / "m.parquet")
    cat, empty = read_all_rows(tmp_path / "m.parquet")
    assert cat.extra == {"rank": 3, "tags": ["a"]}
    assert "column prompt is empty" in get_reason(empty)


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes('\ufeffprompt,seed\r\ncat,1\r\n\r\n"two\r\nlines",2\r\n'.encode())
    assert [(row.number, row.prompt) for row in read_all_rows(path)] == [(1, "cat"), (2, "two\r\nlines")]


def test_bad_line_invalidates_only_its_row(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"prompt,seed\ncat,1\ndog\nowl,2,3\n\xff\xfe,4\nfox,5\n")
    rows = read_all_rows(path)
    assert [type(row) for row in rows] == [Row, Row, InvalidRow, InvalidRow, Row]
    assert "3 cells where the header has 2 columns" in get_reason(rows[2])
    assert "not UTF-8" in get_reason(rows[3])


def test_unclosed_quote_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text('prompt\ncat\n"red apple\nblue heart\n')
    cat, rest = read_all_rows(path)
    assert isinstance(cat, Row)
    assert "check the quotes" in get_reason(rest)


def test_row_with_too_many_cells_keeps_its_prompt(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("id,prompt\n7,cat,dog\n")
    (row,) = read_all_rows(path)
    assert row.prompt == "cat"


def test_too_long_cell_invalidates_only_its_row(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(f"prompt\ncat\n{'x' * 200_000}\nfox\n")
    assert [type(row) for row in read_all_rows(path)] == [Row, InvalidRow, Row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"words,seed\ncat,1\n", "no column named prompt; found 'words', 'seed'"),
        (b"prompt,prompt\ncat,1\n", "column 'prompt' appears twice"),
        (b"\xef\xbb\xbf", "no column named prompt; found nothing"),
        (b"x" * 200_000 + b",prompt\ncat\n", "header: column 'xxx.*: a name has at most 1000 characters"),
        (b"prompt\n", "no rows; add one for each prompt"),
        ("prompt\ncat\n".encode("utf-16-le"), "not UTF-8"),
        ("prompt\ncat\n".encode("utf-32"), r"not UTF-8 \(it looks like UTF-32"),
        ("prompt\ncat\n".encode("utf-16")[:-1], "not UTF-16: truncated data"),
        (b"\xe9t\xe9,prompt\nx,cat\n", "header: not UTF-8"),
    ],
)
def test_errors_of_the_whole_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_all_rows(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.csv", "no such file"),
        ("m.xlsx", "manifests are .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .pq, .txt files"),
        ("bad.parquet", "not a readable Parquet"),
    ],
)
def test_files_that_are_not_manifests(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really PAR1")
    (tmp_path / "m.xlsx").write_bytes(b"PK")
    with pytest.raises(ManifestError, match=message):
        read_all_rows(tmp_path / name)


CELL = st.one_of(st.none(), st.text(max_size=30), st.integers(), st.floats(), st.booleans())


@given(
    st.dictionaries(
        st.sampled_from(
            ["prompt", "seed", "height", "steps", "scale", "sampler", "eta", "n_iter", "n_samples", "id", "x"]
        ),
        CELL,
    )
)
def test_any_row_is_valid_or_has_a_reason(values: dict[str, object]) -> None:
    row = build_row(1, {"prompt": None, **values}, DEFAULTS)
    if isinstance(row, Row):
        assert row.prompt.strip()
        assert row.settings.height % 16 == 0
        assert row.n_iter * row.n_samples >= 1
        row.prompt.encode()
    else:
        assert row.reason
        row.reason.encode()
