"""Extra columns of a Parquet manifest never invalidate a row, and keep their types in the results."""

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import draw, read_results
from tests.support.manifests import DEFAULTS, get_reason, read_all_rows
from tests.support.program import Capture, call
from tinysd_batch.errors import ManifestError
from tinysd_batch.export.table import export_table
from tinysd_batch.job.manifest.files import compute_fingerprint
from tinysd_batch.job.manifest.formats.parquet_footer import read_column_sizes
from tinysd_batch.job.manifest.readers import read_extra_fields
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.manifest.validate import read_rows
from tinysd_batch.job.state.open_job import default_job_folder
from tinysd_batch.records import InvalidRow, Row


def read(path: Path) -> tuple[list[Row | InvalidRow], list[str]]:
    notes = ReadingNotes()
    return list(read_rows(path, DEFAULTS, notes=notes)), list(notes.lines())


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


# Columns that are not read

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("arrow_type", "note"),
    [
        (IMAGE, "bytes within structs or lists are not copied to the results"),
        (pa.list_(IMAGE), "bytes within structs or lists are not copied to the results"),
        (pa.binary(), "its values are too long for the results"),
        (pa.string(), "its values are too long for the results"),
        (pa.list_(pa.string()), "its values are too long for the results"),
    ],
    ids=str,
)
def test_column_of_images_is_not_read(tmp_path: Path, arrow_type: Any, note: str) -> None:
    image: Any = bytes(i % 251 for i in range(300_000)) if "binary" in str(arrow_type) else "x" * 300_000
    image = {"bytes": image, "path": "a.png"} if "struct" in str(arrow_type) else image
    value = [image] if pa.types.is_list(arrow_type) else image
    columns = {"text": ["cat", "dog", "owl"], "image": pa.array([value] * 3, arrow_type), "n": [1, 2, 3]}
    path = write(tmp_path / "m.parquet", columns, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    middle = data.index(b"\x00\x01\x02" if "binary" in str(arrow_type) else b"xxxx") + 1000
    data[middle : middle + 200_000] = b"\xff" * 200_000  # damage that reading the column would find
    path.write_bytes(data)
    rows, notes = read(path)
    assert [(row.prompt, row.extra) for row in rows] == [("cat", {"n": 1}), ("dog", {"n": 2}), ("owl", {"n": 3})]
    assert notes == [f"column 'image': not read, {note}"]
    assert [field.name for field in read_extra_fields(path, [])] == ["n"]


def test_row_group_limit_counts_only_columns_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinysd_batch.job.manifest.formats.parquet.PARQUET_SPARE_BYTES", 1 << 20)
    columns = {"prompt": ["cat"] * 15, "note": ["x" * 100_000] * 15, "few": ["y" * 900] * 15}
    path = write(tmp_path / "m.parquet", columns, use_dictionary=False)
    rows, notes = read(path)
    assert [row.extra for row in rows] == [{"few": "y" * 900}] * 15
    assert notes == ["column 'note': not read, its values are too long for the results"]


def test_long_value_of_an_extra_column_is_dropped(tmp_path: Path) -> None:
    columns = {
        "prompt": ["cat", "dog"],
        "note": ["x" * 131_073, "y"],
        "tags": [["x" * 131_073], ["y"]],
        "few": [["a"], None],
    }
    (cat, dog), notes = read(write(tmp_path / "m.parquet", columns))
    assert (cat.prompt, cat.extra) == ("cat", {"few": ["a"]})
    assert dog.extra == {"note": "y", "tags": ["y"]}
    assert notes[0] == "column 'note': some values are not copied to the results: some 131,073 bytes, at most 131,072"


def test_long_value_of_a_known_column_invalidates_its_row(tmp_path: Path) -> None:
    columns = {"prompt": ["x" * 131_073, "dog"], "negative_prompt": [None, "y"]}
    bad, dog = read_all_rows(write(tmp_path / "m.parquet", columns))
    assert "column prompt: some 131,073 bytes, at most 131,072" in get_reason(bad)
    assert dog.prompt == "dog"


def test_lists_of_text_in_several_row_groups(tmp_path: Path) -> None:
    columns = {"prompt": [f"cat {n}" for n in range(90)], "tags": [[f"{n}", "same"] for n in range(90)]}
    rows = read_all_rows(write(tmp_path / "m.parquet", columns, row_group_size=40))
    assert [row.extra for row in rows] == [{"tags": [f"{n}", "same"]} for n in range(90)]


def test_column_sizes_are_those_of_pyarrow(tmp_path: Path) -> None:
    columns = {"prompt": ["cat", "dog"] * 40, "größe.x": [1.5] * 80, "s": [{"a": "x", "b": [1, 2]}] * 80}
    path = write(tmp_path / "m.parquet", columns, row_group_size=30)
    metadata = pq.read_metadata(path)
    with path.open("rb") as file:
        group_sizes = read_column_sizes(file)
    for number, sizes in enumerate(group_sizes):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        assert sizes.total() == group.total_byte_size
        for name, size in sizes.items():
            leaves = [
                chunk for chunk in chunks if chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.")
            ]
            assert size == sum(leaf.total_uncompressed_size for leaf in leaves)
    assert len(group_sizes) == 3


# Missing values and integers


def test_missing_values_as_pandas_writes_them(tmp_path: Path) -> None:
    columns = {
        "prompt": ["cat", None, "dog", None],
        "seed": pa.array([42.0, float("nan"), None, None]),
        "steps": ["3.0", "", "NULL", None],
        "aesthetic": [float("nan"), None, float("inf"), None],
    }
    rows, notes = read(write(tmp_path / "m.parquet", columns))
    assert [(row.number, row.prompt, row.seed, row.settings.steps) for row in rows if isinstance(row, Row)] == [
        (1, "cat", 42, 3), (3, "dog", None, 25),
    ]  # fmt: skip
    assert [row.extra for row in rows] == [{}, {"aesthetic": float("inf")}]
    assert notes == ["2 blank rows skipped"]


def test_many_blank_rows_are_skipped(tmp_path: Path) -> None:
    prompts = pa.array([None] * 300_000 + ["cat"], pa.string())
    rows, notes = read(write(tmp_path / "m.parquet", {"prompt": prompts}))
    assert [(row.number, row.prompt) for row in rows] == [(300_001, "cat")]
    assert notes == ["300,000 blank rows skipped"]


# Types in the results

SPAN = pa.struct([("from", pa.timestamp("us", "UTC")), ("days", pa.list_(pa.date32()))])
TYPED = {
    "prompt": ["cat", "dog"],
    "seed": [7, 8],
    "tags": pa.array([["red", "a b"], None], pa.list_(pa.string())),
    "vector": pa.array([[1.5, None], []], pa.list_(pa.float32())),
    "box": pa.array([{"x": 1, "names": ["ü"]}, None]),
    "when": pa.array([1, None], pa.timestamp("ns")),
    "far": pa.array([2**62, 0], pa.timestamp("ms", "No/Where")),
    "day": pa.array([date(2024, 2, 29), None]),
    "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
    "lasting": pa.array([5, None], pa.duration("s")),
    "moments": pa.array([[5, None], None], pa.list_(pa.timestamp("ns"))),
    "span": pa.array([{"from": 5, "days": [date(2024, 2, 29)]}, None], SPAN),
    "pair": pa.array([[1, 2], None], pa.list_(pa.int8(), 2)),
    "large": pa.array([[1, 2], None], pa.large_list(pa.int8())),
    "small": pa.array([3, None], pa.uint8()),
    "flag": pa.array([True, None]),
    "kind": pa.array(["a", None]).dictionary_encode(),
}


def test_extra_columns_keep_their_types(here: Path, capfd: Capture, tiny_model: Path) -> None:
    manifest = write(here / "m.parquet", TYPED)
    draw(manifest, here / "job", tiny_model, limit=1)
    draw(manifest, here / "job", tiny_model)
    results = pq.read_table(here / "job" / "results.parquet")
    for name in TYPED.keys() - {"prompt", "seed"}:
        expected = pa.chunked_array([TYPED[name]])
        expected = expected.cast(pa.string()) if name == "kind" else expected
        assert results.schema.field(name).type == expected.type, name
        assert results[name].cast(expected.type) == expected, name
    export_table(here / "job", here / "x.jsonl")
    cat, _ = (json.loads(line) for line in (here / "x.jsonl").read_text().splitlines())
    assert (cat["tags"], cat["box"], cat["when"]) == (
        ["red", "a b"], {"x": 1, "names": ["ü"]}, "1970-01-01 00:00:00.000000001",
    )  # fmt: skip
    code, _, stderr = call(capfd, "export", "job", "x.csv")
    assert code == 0, stderr
    assert '"[""red"", ""a b""]","[1.5, null]"' in (here / "x.csv").read_text()


def test_job_started_with_text_columns_keeps_them(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", TYPED)
    types = {field.name: field.type for field in read_extra_fields(path, [], as_text=True)}
    assert {name for name, arrow_type in types.items() if not pa.types.is_string(arrow_type)} == {"small", "flag"}


# A folder of Parquet files


def write_parquet_folder(folder: Path, *numbers: int) -> Path:
    folder.mkdir()
    for number in numbers:
        write(folder / f"part.{number}.parquet", {"prompt": [f"cat {number}", None, "dog"], "n": [number, None, 7]})
    for name in ("_SUCCESS", "_metadata", ".part.0.parquet.crc", "._part.1.parquet"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("name", ["m.parquet", "m"])
def test_folder_of_parquet_files_is_one_table(tmp_path: Path, name: str) -> None:
    folder = write_parquet_folder(tmp_path / name, 10, 9, 0)
    rows, notes = read(folder)
    assert [(row.number, row.prompt) for row in rows] == [
        (1, "cat 0"), (3, "dog"), (4, "cat 9"), (6, "dog"), (7, "cat 10"), (9, "dog"),
    ]  # fmt: skip
    assert notes == ["3 blank rows skipped"]
    assert read_extra_fields(folder, []) == [pa.field("n", pa.int64())]
    assert default_job_folder(folder) == Path("outputs/m")


def test_fingerprint_of_a_folder_covers_its_files(tmp_path: Path) -> None:
    folder = write_parquet_folder(tmp_path / "m.parquet", 0, 1)
    seen = {compute_fingerprint(folder)}
    (folder / "_SUCCESS").unlink()
    assert compute_fingerprint(folder) in seen
    write(folder / "part.1.parquet", {"prompt": ["owl"]})
    seen.add(compute_fingerprint(folder))
    (folder / "part.1.parquet").rename(folder / "part.2.parquet")
    seen.add(compute_fingerprint(folder))
    (folder / "part.2.parquet").unlink()
    assert len(seen | {compute_fingerprint(folder)}) == 4


def test_files_with_different_columns(tmp_path: Path) -> None:
    folder = tmp_path / "m.parquet"
    folder.mkdir()
    write(folder / "a.parquet", {"prompt": ["cat"], "n": [1], "t": pa.array([1], pa.timestamp("s")), "e": pa.nulls(1)})
    write(folder / "b.parquet", {"text": ["dog"], "n": [1.5], "t": ["x"], "e": [["y"]], "more": ["z"]})
    rows, notes = read(folder)
    assert [(row.prompt, row.extra) for row in rows] == [
        ("cat", {"n": 1}), ("dog", {"n": 1.5, "e": ["y"], "more": "z"}),
    ]  # fmt: skip
    assert notes == ["column 't': not copied to the results, its type differs between the files"]
    types = {field.name: str(field.type) for field in read_extra_fields(folder, [])}
    assert types == {"n": "double", "e": "list<item: string>", "more": "string"}


def test_folders_that_are_not_tables(tmp_path: Path) -> None:
    (tmp_path / "m.parquet" / "year=2024").mkdir(parents=True)
    with pytest.raises(ManifestError, match=r"its tables are in subfolders \(year=2024\)"):
        read_all_rows(tmp_path / "m.parquet")
    (tmp_path / "m.parquet" / "year=2024").rmdir()
    with pytest.raises(ManifestError, match="is a directory without Parquet files"):
        read_all_rows(tmp_path / "m.parquet")
    write(tmp_path / "m.parquet" / "a.parquet", {"words": ["cat"]})
    with pytest.raises(ManifestError, match=r"a\.parquet: header: no column named prompt"):
        read_all_rows(tmp_path / "m.parquet")


def test_job_of_a_parquet_folder(tmp_path: Path, tiny_model: Path) -> None:
    folder = write_parquet_folder(tmp_path / "m.parquet", 0, 1)
    draw(folder, tmp_path / "job", tiny_model, limit=1)
    draw(folder, tmp_path / "job", tiny_model)
    assert [(row["row"], row["n"]) for row in read_results(tmp_path / "job")] == [(1, 0), (3, 7), (4, 1), (6, 7)]
