"""Millions of invalid rows take no memory, and a manifest with only invalid rows is rejected early."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import draw, read_results
from tests.support.manifests import DEFAULTS
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.dispatch import job_progress
from tinysd_batch.job.manifest import validate
from tinysd_batch.job.manifest.validate import read_rows


def test_small_file_with_millions_of_nulls_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": pa.nulls(3_000_000, pa.string())}), path, row_group_size=3_000_000)
    assert path.stat().st_size < 20_000
    with pytest.raises(ManifestError, match=r"none of the first 1,\d+,\d+ rows can be generated: all are blank"):
        list(read_rows(path, DEFAULTS))


def test_only_invalid_rows_are_rejected_with_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "MAX_ROWS_BEFORE_FIRST_VALID", 100)
    path = tmp_path / "m.csv"
    path.write_text("prompt,seed\n" + "cat,oops\n" * 150)
    with pytest.raises(
        ManifestError, match=r"none of the first 100 rows can be generated: row 1: column seed = 'oops'"
    ):
        list(read_rows(path, DEFAULTS))
    path.write_text("prompt,seed\n" + "cat,oops\n" * 99 + "cat,1\n" + "cat,oops\n" * 150)
    assert len(list(read_rows(path, DEFAULTS))) == 250


def test_invalid_rows_beyond_those_in_memory_are_in_the_results(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_progress, "MAX_INVALID_ROWS_IN_MEMORY", 5)
    path = tmp_path / "m.csv"
    path.write_text("prompt,seed,steps\n" + "cat,oops,\n" * 20 + "cat,1,1\n" + "cat,oops,\n" * 20)
    for _ in range(2):  # and once only
        done, _ = draw(path, tmp_path / "job", tiny_model, sampler="ddim")
        assert (done.total, done.invalid_rows) == (1, 40)
        rows = read_results(tmp_path / "job")
        assert [row["row"] for row in rows] == list(range(1, 42))
        assert [row["row"] for row in rows if row["status"] == "ok"] == [21]
