"""Columns of the results: declared once, and read from files of other versions."""

import json
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinysd_batch.errors import StorageError
from tinysd_batch.job.results.columns import (
    COLUMN_FIELDS,
    COLUMNS,
    COLUMNS_BY_SOURCE,
    OUTPUT_COLUMNS,
    RESERVED_COLUMNS,
    ColumnSource,
)
from tinysd_batch.job.results.schema import RESERVED_KEY
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.results.writer import ResultsWriter
from tinysd_batch.model.sampling.batch import ImageOutput
from tinysd_batch.records import ImageRequest, ImageResult
from tinysd_batch.settings.schema import IMAGE_SETTINGS


def test_every_record_has_the_columns_that_are_read_from_it() -> None:
    for source, record in ((ColumnSource.REQUEST, ImageRequest), (ColumnSource.RESULT, ImageResult)):
        assert set(COLUMNS_BY_SOURCE[source]) <= {field.name for field in fields(record)}
    assert {field.name for field in fields(ImageResult)} == set(COLUMNS_BY_SOURCE[ColumnSource.RESULT])


def test_the_model_reports_what_is_read_from_its_output() -> None:
    assert {field.name for field in fields(ImageOutput)} - {"request", "image"} == set(OUTPUT_COLUMNS)


def test_every_setting_that_is_a_column_of_manifests_is_one_of_results() -> None:
    assert set(COLUMNS_BY_SOURCE[ColumnSource.SETTINGS]) == {
        name for name, setting in IMAGE_SETTINGS.items() if setting.is_column
    }
    assert all(column.meaning for column in COLUMNS)


def write_table_without(name: str, folder: Path) -> None:
    """Write a sealed file of a version that did not have a column; its manifest had one of that name, with text."""
    columns = [field for field in COLUMN_FIELDS if field.name != name] + [pa.field(name, pa.string())]
    reserved = json.dumps(sorted(RESERVED_COLUMNS - {name})).encode()
    table = pa.Table.from_pylist(
        [{"row": 1, "index": 1, "status": "ok", name: "theirs"}], pa.schema(columns, {RESERVED_KEY: reserved})
    )
    folder.mkdir()
    pq.write_table(table, folder / "results.parquet")


def test_a_column_of_the_manifest_is_renamed_when_the_program_gets_one_of_that_name(tmp_path: Path) -> None:
    write_table_without("eta", tmp_path / "job")
    table = ResultsTable(tmp_path / "job")
    assert table.list_manifest_columns() == ("eta",)
    rows = table.read_newest_all_columns().select(["index", "eta", "manifest_eta"]).to_pylist()
    assert rows == [{"index": 1, "eta": None, "manifest_eta": "theirs"}]
    assert table.read_newest(["row", "index", "eta"]).to_pylist() == [{"index": 1, "row": 1, "eta": None}]
    (schema,) = table.read_schemas()
    assert "manifest_eta" in schema.names
    assert "eta" not in schema.names


def test_files_of_different_versions_are_sealed_together(tmp_path: Path) -> None:
    write_table_without("eta", tmp_path / "job")
    schema = pa.schema([*COLUMN_FIELDS, pa.field("manifest_eta", pa.string())])
    writer = ResultsWriter(tmp_path / "job", schema, 2)
    writer.append({"row": 2, "index": 2, "status": "ok", "eta": 0.5, "manifest_eta": "new"})
    writer.flush()
    assert [len(part) for part in ResultsTable(tmp_path / "job").read(None)] == [1, 1]
    writer.seal()
    sealed = pq.read_table(tmp_path / "job" / "results.parquet")
    assert sealed.schema.field("eta").type == pa.float64()
    assert sealed.select(["index", "eta", "manifest_eta"]).to_pylist() == [
        {"index": 1, "eta": None, "manifest_eta": "theirs"},
        {"index": 2, "eta": 0.5, "manifest_eta": "new"},
    ]
    assert ResultsTable(tmp_path / "job").list_manifest_columns() == ("manifest_eta",)


@pytest.mark.parametrize("metadata", [b"{", b"7", b"[7]"])
def test_a_damaged_list_of_columns_is_an_error(tmp_path: Path, metadata: bytes) -> None:
    table = pa.Table.from_pylist(
        [{"row": 1, "index": 1, "status": "ok"}], pa.schema(COLUMN_FIELDS, {RESERVED_KEY: metadata})
    )
    pq.write_table(table, tmp_path / "results.parquet")
    with pytest.raises(StorageError, match=r"results\.parquet: cannot be read"):
        list(ResultsTable(tmp_path).read(None))
