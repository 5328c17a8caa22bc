import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.errors import ManifestError, StorageError
from tinysd_batch.job.results import writer as results
from tinysd_batch.job.results.rows import make_image_row, make_invalid_row
from tinysd_batch.job.results.schema import RESULT_FIELDS, build_results_schema, keep_earlier_columns
from tinysd_batch.job.results.table import ResultsTable, keep_newest_rows
from tinysd_batch.job.results.writer import ResultsWriter
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, SamplingParams, Status

RUN = {"model": "m", "model_digest": "d", "run_id": "r", "version": "0"}
SCHEMA = build_results_schema([pa.field("artist", pa.string()), pa.field("status", pa.string())])


def row(index: int, status: Status = Status.OK) -> dict[str, Any]:
    params = SamplingParams(64, 64, 5, "plms", 0.0)
    extra = {"artist": f"artist {index}", "status": "theirs"}
    request = ImageRequest(
        index, index, 1, f"p{index}", "", index, 4.0, params, f"{index:032x}", f"f{index}", extra=extra
    )
    return make_image_row(request, ImageResult(index, status, started_at=time.time()), RUN)


def indexes(folder: Path) -> list[int]:
    return [one["index"] for one in pq.read_table(folder / "results.parquet").to_pylist()]


def test_the_columns_are_those_that_were_promised() -> None:
    assert SCHEMA.names == [
        "index",
        "row",
        "sample",
        "id",
        "prompt",
        "negative_prompt",
        "prompt_syntax",
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


def test_a_manifest_column_that_would_come_twice_is_refused() -> None:
    with pytest.raises(ManifestError, match="becomes manifest_index in the results, which is taken"):
        build_results_schema([pa.field("manifest_index", pa.string()), pa.field("index", pa.string())])


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match=r"results\.parquet: cannot be read"):
        ResultsWriter(tmp_path, SCHEMA, 1)


def test_rows_come_back_sorted_with_their_extra_columns(tmp_path: Path) -> None:
    writer = ResultsWriter(tmp_path, SCHEMA, 3)
    for index in (3, 1, 2):
        writer.append(row(index))
        writer.flush()
    writer.seal()
    found = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(one["index"], one["artist"], one["manifest_status"], one["status"]) for one in found] == [
        (index, f"artist {index}", "theirs", "ok") for index in (1, 2, 3)
    ]
    assert not list(writer.table.journal.iterdir())


def test_a_second_run_adds_and_its_rows_count(tmp_path: Path) -> None:
    first = ResultsWriter(tmp_path, SCHEMA, 3)
    first.append(row(1))
    first.append(row(2, Status.FAILED))
    first.seal()
    second = ResultsWriter(tmp_path, SCHEMA, 3)
    second.append(row(2))
    second.append(row(3))
    second.seal()
    found = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(one["index"], one["status"]) for one in found] == [(1, "ok"), (2, "ok"), (3, "ok")]


def test_unsealed_rows_are_read_and_sealed_by_the_next_run(tmp_path: Path) -> None:
    killed = ResultsWriter(tmp_path, SCHEMA, 2)
    killed.append(row(1))
    killed.flush()
    assert [one["index"] for one in ResultsTable(tmp_path).read_rows(["index"])] == [1]
    following = ResultsWriter(tmp_path, SCHEMA, 2)
    following.append(row(2))
    following.seal()
    assert indexes(tmp_path) == [1, 2]


def test_a_crash_between_sealing_and_deleting_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ResultsWriter(tmp_path, SCHEMA, 2)
    writer.append(row(1))
    writer.flush()
    with monkeypatch.context() as crash:
        crash.setattr(ResultsTable, "delete_covered_parts", lambda self: None)
        writer.seal()
    assert list(writer.table.journal.iterdir())
    assert [one["index"] for one in ResultsTable(tmp_path).read_rows(["index"])] == [1]
    following = ResultsWriter(tmp_path, SCHEMA, 2)
    assert not list(writer.table.journal.iterdir())
    following.append(row(2))
    following.seal()
    assert indexes(tmp_path) == [1, 2]


LOST_FILES = {
    "a journal part": ["_tinysd/journal/00000002.parquet"],
    "two journal parts": ["_tinysd/journal/00000001.parquet", "_tinysd/journal/00000003.parquet"],
    "all journal parts": [f"_tinysd/journal/0000000{number}.parquet" for number in (1, 2, 3)],
}


@pytest.mark.parametrize("lost", LOST_FILES)
def test_journal_parts_that_are_deleted_meanwhile_are_noticed(tmp_path: Path, lost: str) -> None:
    writer = ResultsWriter(tmp_path, SCHEMA, 3)
    for index in (1, 2, 3):
        writer.append(row(index))
        writer.flush()
    for name in LOST_FILES[lost]:
        (tmp_path / name).unlink()
    gone = len(LOST_FILES[lost])
    with pytest.raises(StorageError, match=rf"{LOST_FILES[lost][0]}.*deleted.* with {gone} rows.*submit again"):
        writer.seal()
    writer.seal()  # what is left is sealed, and said once
    assert len(list(ResultsTable(tmp_path).read_rows(["row", "status"]))) == 3 - gone
    following = ResultsWriter(tmp_path, SCHEMA, 3)
    for index in (1, 2, 3):
        following.append(row(index))
    following.seal()
    assert indexes(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("left", [0, 1])
def test_a_table_that_is_deleted_or_cut_short_meanwhile_is_noticed(tmp_path: Path, left: int) -> None:
    path = tmp_path / "results.parquet"
    first = ResultsWriter(tmp_path, SCHEMA, 3)
    first.append(row(1))
    first.append(row(2))
    first.seal()
    second = ResultsWriter(tmp_path, SCHEMA, 3)
    second.append(row(3))
    second.flush()
    shorter = pq.read_table(path).slice(0, left)
    path.unlink()
    if left:
        pq.write_table(shorter, path)
    with pytest.raises(StorageError, match=rf"results\.parquet: deleted or cut short.* with {2 - left} row"):
        second.seal()
    assert indexes(tmp_path) == [1, 3][-1 - left :]


def test_a_part_never_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of a lower number was deleted."""
    monkeypatch.setattr(results, "MAX_SINGLE_FILE_ROWS", 1)
    for index in (1, 2):
        writer = ResultsWriter(tmp_path, SCHEMA, 3)
        writer.append(row(index))
        writer.seal()
    (tmp_path / "results" / "part-00000.parquet").unlink()
    writer = ResultsWriter(tmp_path, SCHEMA, 3)
    writer.append(row(3))
    writer.seal()
    assert [path.name for path in ResultsTable(tmp_path).sealed_files()] == ["part-00001.parquet", "part-00002.parquet"]
    assert sorted(one["index"] for one in ResultsTable(tmp_path).read_rows(["index"])) == [2, 3]


def test_text_from_the_system_is_stored_whatever_it_is(tmp_path: Path) -> None:
    """Paths and host names may be no UTF-8, messages of libraries anything."""
    writer = ResultsWriter(tmp_path, SCHEMA, 1)
    odd = "x\udce9\ud800\0"
    names = ("error_class", "error_message", "model", "precision", "device_name", "worker", "node", "reused")
    writer.append(row(1) | dict.fromkeys(names, odd) | {"degraded": [odd]})
    writer.seal()
    (found,) = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {found[name] for name in names} == {found["degraded"][0]}
    assert found["node"].startswith("x")


def test_journal_names_never_come_again(tmp_path: Path) -> None:
    """A new part under a name that the sealed file covers would be deleted as a leftover."""
    for index in (1, 2, 3):
        writer = ResultsWriter(tmp_path, SCHEMA, 3)
        writer.append(row(index))
        writer.flush()
        ResultsTable(tmp_path).delete_covered_parts()
        writer.seal()
    assert indexes(tmp_path) == [1, 2, 3]


def test_big_jobs_end_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MAX_SINGLE_FILE_ROWS", 10)
    monkeypatch.setattr(results, "SEAL_ROWS", 5)
    writer = ResultsWriter(tmp_path, SCHEMA, 12)
    for index in range(1, 13):
        writer.append(row(index))
        writer.flush()
    writer.seal()
    assert [path.name for path in sorted((tmp_path / "results").iterdir())] == [
        f"part-{n:05d}.parquet" for n in range(3)
    ]
    assert sorted(one["index"] for one in ResultsTable(tmp_path).read_rows(["index"])) == list(range(1, 13))


def test_an_invalid_row_has_no_index(tmp_path: Path) -> None:
    writer = ResultsWriter(tmp_path, SCHEMA, 1)
    writer.append(make_invalid_row(InvalidRow(5, "column seed is odd", prompt="cat", extra={"artist": "x"}), RUN))
    writer.seal()
    (found,) = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert (found["index"], found["row"], found["status"], found["error_message"], found["artist"]) == (
        None, 5, "invalid", "column seed is odd", "x",
    )  # fmt: skip


def test_a_table_that_gains_a_column_keeps_its_rows(tmp_path: Path) -> None:
    """A JSONL manifest may grow by rows with new keys."""
    first = ResultsWriter(tmp_path, build_results_schema([]), 2)
    first.append(row(1))
    first.seal()
    second = ResultsWriter(tmp_path, SCHEMA, 2)
    second.append(row(2))
    second.seal()
    found = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(one["index"], one["artist"]) for one in found] == [(1, None), (2, "artist 2")]


def test_a_job_that_goes_on_keeps_its_columns_and_their_types(tmp_path: Path) -> None:
    """Newer rules may read a list where text was read, or not carry a column any more."""
    first = ResultsWriter(
        tmp_path, build_results_schema([pa.field("tags", pa.string()), pa.field("old", pa.int64())]), 2
    )
    first.append({**row(1), "tags": "[1, 2]", "old": 7})
    first.seal()
    newer = build_results_schema([pa.field("tags", pa.list_(pa.int64())), pa.field("artist", pa.string())])
    second = ResultsWriter(tmp_path, keep_earlier_columns(newer, ResultsTable(tmp_path).read_schemas()), 2)
    second.append({**row(2), "tags": [3, None]})
    second.seal()
    found = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(one["tags"], one["old"], one["artist"]) for one in found] == [
        ("[1, 2]", 7, None), ("[3, null]", None, "artist 2"),
    ]  # fmt: skip


KEYS = st.lists(st.tuples(st.integers(1, 4), st.one_of(st.none(), st.integers(1, 6))), max_size=30)


@given(KEYS)
def test_of_rows_written_more_than_once_the_last_counts(keys: list[tuple[int, int | None]]) -> None:
    written = [{"row": number, "index": index, "error_message": str(when)} for when, (number, index) in enumerate(keys)]
    schema = pa.schema([field for field in RESULT_FIELDS if field.name in ("row", "index", "error_message")])
    with_images = {number for number, index in keys if index}  # what was wrong with such a row is the past
    last = {(one["row"], one["index"] or 0): one for one in written if one["index"] or one["row"] not in with_images}
    assert keep_newest_rows(pa.Table.from_pylist(written, schema)).select(
        ["row", "index", "error_message"]
    ).to_pylist() == [last[key] for key in sorted(last)]
