"""The results table: rows go to a journal, are sealed into files, and survive crashes and deleted files."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.settings import make_image_settings
from tinysd_batch.errors import ManifestError, StorageError
from tinysd_batch.job.results import writer as writer_module
from tinysd_batch.job.results.columns import COLUMN_FIELDS
from tinysd_batch.job.results.rows import make_image_row, make_invalid_row
from tinysd_batch.job.results.schema import build_results_schema, keep_earlier_columns
from tinysd_batch.job.results.table import ResultsTable, keep_newest_rows
from tinysd_batch.job.results.writer import ResultsWriter
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status

RUN_COLUMNS = {"model": "m", "model_digest": "d", "run_id": "r", "version": "0"}
SCHEMA = build_results_schema([pa.field("artist", pa.string()), pa.field("status", pa.string())])


def make_row(index: int, status: Status = Status.OK) -> dict[str, Any]:
    request = ImageRequest(
        f"p{index}",
        index,
        make_image_settings(),
        image_id=f"{index:032x}",
        index=index,
        row=index,
        file_name=f"f{index}",
        extra={"artist": f"artist {index}", "status": "theirs"},
    )
    return make_image_row(request, ImageResult(index, status, started_at=time.time()), RUN_COLUMNS)


def read_indexes(folder: Path) -> list[int]:
    return [row["index"] for row in pq.read_table(folder / "results.parquet").to_pylist()]


def test_the_results_table_has_the_documented_columns() -> None:
    assert SCHEMA.names == [
        "index",
        "row",
        "sample",
        "id",
        "prompt",
        "negative_prompt",
        "prompt_syntax",
        "clip_skip",
        "seed",
        "width",
        "height",
        "steps",
        "sampler",
        "scale",
        "eta",
        "image_id",
        "status",
        "file_name",
        "sha256",
        "bytes",
        "error_class",
        "error_message",
        "attempts",
        "degraded",
        "n_tokens",
        "truncated",
        "negative_truncated",
        "model",
        "model_digest",
        "precision",
        "device_name",
        "worker",
        "node",
        "text_s",
        "denoise_s",
        "decode_s",
        "peak_memory_bytes",
        "started_at",
        "finished_at",
        "run_id",
        "version",
        "reused",
        "artist",
        "manifest_status",
    ]


def test_extra_columns_with_colliding_names_are_refused() -> None:
    with pytest.raises(ManifestError, match="becomes manifest_index in the results, which is taken"):
        build_results_schema([pa.field("manifest_index", pa.string()), pa.field("index", pa.string())])


def test_a_damaged_results_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match=r"results\.parquet: cannot be read"):
        ResultsWriter(tmp_path, SCHEMA, 1)


def test_sealed_rows_are_sorted_and_have_their_extra_columns(tmp_path: Path) -> None:
    writer = ResultsWriter(tmp_path, SCHEMA, 3)
    for index in (3, 1, 2):
        writer.append(make_row(index))
        writer.flush()
    writer.seal()
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["index"], row["artist"], row["manifest_status"], row["status"]) for row in rows] == [
        (index, f"artist {index}", "theirs", "ok") for index in (1, 2, 3)
    ]
    assert not list(writer.table.journal.iterdir())


def test_rows_of_a_second_run_replace_and_extend_the_first(tmp_path: Path) -> None:
    first = ResultsWriter(tmp_path, SCHEMA, 3)
    first.append(make_row(1))
    first.append(make_row(2, Status.FAILED))
    first.seal()
    second = ResultsWriter(tmp_path, SCHEMA, 3)
    second.append(make_row(2))
    second.append(make_row(3))
    second.seal()
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["index"], row["status"]) for row in rows] == [(1, "ok"), (2, "ok"), (3, "ok")]


def test_journal_rows_of_a_killed_run_are_read_and_sealed_by_the_next_run(tmp_path: Path) -> None:
    killed_run = ResultsWriter(tmp_path, SCHEMA, 2)
    killed_run.append(make_row(1))
    killed_run.flush()
    assert [row["index"] for row in ResultsTable(tmp_path).read_rows(["index"])] == [1]
    next_run = ResultsWriter(tmp_path, SCHEMA, 2)
    next_run.append(make_row(2))
    next_run.seal()
    assert read_indexes(tmp_path) == [1, 2]


def test_a_crash_before_deleting_sealed_parts_adds_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ResultsWriter(tmp_path, SCHEMA, 2)
    writer.append(make_row(1))
    writer.flush()
    with monkeypatch.context() as crash:
        crash.setattr(ResultsTable, "delete_covered_parts", lambda self: None)
        writer.seal()
    assert list(writer.table.journal.iterdir())
    assert [row["index"] for row in ResultsTable(tmp_path).read_rows(["index"])] == [1]
    next_run = ResultsWriter(tmp_path, SCHEMA, 2)
    assert not list(writer.table.journal.iterdir())
    next_run.append(make_row(2))
    next_run.seal()
    assert read_indexes(tmp_path) == [1, 2]


LOST_FILES = {
    "a journal part": ["_tinysd/journal/00000002.parquet"],
    "two journal parts": ["_tinysd/journal/00000001.parquet", "_tinysd/journal/00000003.parquet"],
    "all journal parts": [f"_tinysd/journal/0000000{number}.parquet" for number in (1, 2, 3)],
}


@pytest.mark.parametrize("lost", LOST_FILES)
def test_journal_parts_deleted_during_the_run_are_reported(tmp_path: Path, lost: str) -> None:
    writer = ResultsWriter(tmp_path, SCHEMA, 3)
    for index in (1, 2, 3):
        writer.append(make_row(index))
        writer.flush()
    for name in LOST_FILES[lost]:
        (tmp_path / name).unlink()
    lost_parts = len(LOST_FILES[lost])
    with pytest.raises(StorageError, match=rf"{LOST_FILES[lost][0]}.*deleted.* with {lost_parts} rows.*submit again"):
        writer.seal()
    writer.seal()  # the remaining parts are sealed, and the loss is reported once
    assert len(list(ResultsTable(tmp_path).read_rows(["row", "status"]))) == 3 - lost_parts
    next_run = ResultsWriter(tmp_path, SCHEMA, 3)
    for index in (1, 2, 3):
        next_run.append(make_row(index))
    next_run.seal()
    assert read_indexes(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("left", [0, 1])
def test_a_table_deleted_or_truncated_during_the_run_is_reported(tmp_path: Path, left: int) -> None:
    path = tmp_path / "results.parquet"
    first = ResultsWriter(tmp_path, SCHEMA, 3)
    first.append(make_row(1))
    first.append(make_row(2))
    first.seal()
    second = ResultsWriter(tmp_path, SCHEMA, 3)
    second.append(make_row(3))
    second.flush()
    truncated = pq.read_table(path).slice(0, left)
    path.unlink()
    if left:
        pq.write_table(truncated, path)
    with pytest.raises(StorageError, match=rf"results\.parquet: deleted or cut short.* with {2 - left} row"):
        second.seal()
    assert read_indexes(tmp_path) == [1, 3][-1 - left :]


def test_a_new_part_never_replaces_an_existing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a part with a lower number was deleted."""
    monkeypatch.setattr(writer_module, "MAX_SINGLE_FILE_ROWS", 1)
    for index in (1, 2):
        writer = ResultsWriter(tmp_path, SCHEMA, 3)
        writer.append(make_row(index))
        writer.seal()
    (tmp_path / "results" / "part-00000.parquet").unlink()
    writer = ResultsWriter(tmp_path, SCHEMA, 3)
    writer.append(make_row(3))
    writer.seal()
    assert [path.name for path in ResultsTable(tmp_path).sealed_files()] == ["part-00001.parquet", "part-00002.parquet"]
    assert sorted(row["index"] for row in ResultsTable(tmp_path).read_rows(["index"])) == [2, 3]


def test_any_text_from_the_system_can_be_stored(tmp_path: Path) -> None:
    """Paths and host names may not be UTF-8, and messages of libraries may contain any characters."""
    writer = ResultsWriter(tmp_path, SCHEMA, 1)
    unusual = "x\udce9\ud800\0"
    names = ("error_class", "error_message", "model", "precision", "device_name", "worker", "node", "reused")
    writer.append(make_row(1) | dict.fromkeys(names, unusual) | {"degraded": [unusual]})
    writer.seal()
    (row,) = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {row[name] for name in names} == {row["degraded"][0]}
    assert row["node"].startswith("x")


def test_names_of_journal_parts_are_not_reused(tmp_path: Path) -> None:
    """A new part with a name that a sealed file lists would be deleted as a leftover."""
    for index in (1, 2, 3):
        writer = ResultsWriter(tmp_path, SCHEMA, 3)
        writer.append(make_row(index))
        writer.flush()
        ResultsTable(tmp_path).delete_covered_parts()
        writer.seal()
    assert read_indexes(tmp_path) == [1, 2, 3]


def test_large_jobs_end_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_SINGLE_FILE_ROWS", 10)
    monkeypatch.setattr(writer_module, "SEAL_ROWS", 5)
    writer = ResultsWriter(tmp_path, SCHEMA, 12)
    for index in range(1, 13):
        writer.append(make_row(index))
        writer.flush()
    writer.seal()
    assert [path.name for path in sorted((tmp_path / "results").iterdir())] == [
        f"part-{n:05d}.parquet" for n in range(3)
    ]
    assert sorted(row["index"] for row in ResultsTable(tmp_path).read_rows(["index"])) == list(range(1, 13))


def test_an_invalid_row_has_no_image_index(tmp_path: Path) -> None:
    writer = ResultsWriter(tmp_path, SCHEMA, 1)
    invalid = InvalidRow(5, "column seed is odd", prompt="cat", extra={"artist": "x"})
    writer.append(make_invalid_row(invalid, RUN_COLUMNS))
    writer.seal()
    (row,) = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert (row["index"], row["row"], row["status"], row["error_message"], row["artist"]) == (
        None, 5, "invalid", "column seed is odd", "x",
    )  # fmt: skip


def test_a_table_with_a_new_column_keeps_its_rows(tmp_path: Path) -> None:
    """Rows with new keys may be appended to a JSONL manifest."""
    first = ResultsWriter(tmp_path, build_results_schema([]), 2)
    first.append(make_row(1))
    first.seal()
    second = ResultsWriter(tmp_path, SCHEMA, 2)
    second.append(make_row(2))
    second.seal()
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["index"], row["artist"]) for row in rows] == [(1, None), (2, "artist 2")]


def test_a_resumed_job_keeps_its_columns_and_their_types(tmp_path: Path) -> None:
    """A newer version may read a list where an older one read text, or not copy a column any more."""
    first = ResultsWriter(
        tmp_path, build_results_schema([pa.field("tags", pa.string()), pa.field("old", pa.int64())]), 2
    )
    first.append({**make_row(1), "tags": "[1, 2]", "old": 7})
    first.seal()
    newer = build_results_schema([pa.field("tags", pa.list_(pa.int64())), pa.field("artist", pa.string())])
    second = ResultsWriter(tmp_path, keep_earlier_columns(newer, ResultsTable(tmp_path).read_schemas()), 2)
    second.append({**make_row(2), "tags": [3, None]})
    second.seal()
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["tags"], row["old"], row["artist"]) for row in rows] == [
        ("[1, 2]", 7, None), ("[3, null]", None, "artist 2"),
    ]  # fmt: skip


KEYS = st.lists(st.tuples(st.integers(1, 4), st.one_of(st.none(), st.integers(1, 6))), max_size=30)


@given(KEYS)
def test_of_several_rows_with_the_same_key_the_last_counts(keys: list[tuple[int, int | None]]) -> None:
    written = [{"row": number, "index": index, "error_message": str(when)} for when, (number, index) in enumerate(keys)]
    schema = pa.schema([field for field in COLUMN_FIELDS if field.name in ("row", "index", "error_message")])
    with_images = {number for number, index in keys if index}  # an earlier fault of such a row does not count
    last = {(row["row"], row["index"] or 0): row for row in written if row["index"] or row["row"] not in with_images}
    assert keep_newest_rows(pa.Table.from_pylist(written, schema)).select(
        ["row", "index", "error_message"]
    ).to_pylist() == [last[key] for key in sorted(last)]
