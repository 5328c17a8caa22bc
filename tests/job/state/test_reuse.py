"""`--reuse` takes images over from another job, even from one that has lost its job.json or rows."""

import os
from pathlib import Path

import pytest

from tests.support.damaged_jobs import Command, list_files, truncate
from tests.support.files import names_below
from tests.support.jobs import check_whole


def test_the_plan_counts_the_images_that_reuse_finds(submit: Command, finished_job: Path) -> None:
    files = list_files(finished_job)
    files[0].unlink()
    truncate(50)(files[1])
    files[2].write_bytes(files[2].read_bytes() + b"more")
    planned = submit("-o", "new", "--reuse", "job", command="plan")
    assert "2 can be reused" in planned.stdout
    done = submit("-o", "new", "--reuse", "job")
    assert "3 images generated" in done.stdout
    assert "2 reused" in done.stdout


def test_a_job_without_its_job_file_is_reused_by_its_table(submit: Command, finished_job: Path, tmp_path: Path) -> None:
    (finished_job / "job.json").unlink()
    (tmp_path / "m.csv").write_text("prompt,seed\nnew,\nowl,\npear,\nbee,9\n")
    assert "3 can be reused" in submit("-o", "new", "--reuse", "job", command="plan").stdout
    done = submit("-o", "new", "--reuse", "job")
    assert done.returncode == 0, done.stderr
    assert "has lost its job.json: images and seeds are taken over from its results table alone" in done.stdout
    assert "3 reused" in done.stdout
    rows = check_whole(tmp_path / "new", 4)
    assert [(row["prompt"], row["seed"]) for row in rows[1:]] == [("owl", 7), ("pear", 6), ("bee", 9)]
    assert [row["reused"] for row in rows] == [None, *[str(finished_job)] * 3]
    assert "job.json" not in names_below(finished_job)


@pytest.mark.parametrize("truncated_bytes", [None, 10])
def test_a_job_without_its_rows_is_reused_by_its_table(
    submit: Command, finished_job: Path, tmp_path: Path, truncated_bytes: int | None
) -> None:
    rows_file = finished_job / "_tinysd" / "rows.jsonl.gz"
    if truncated_bytes is None:
        rows_file.unlink()
    else:
        os.truncate(rows_file, truncated_bytes)
    (tmp_path / "m.csv").write_text("prompt,seed\nnew,\nowl,\n")
    done = submit("-o", "new", "--reuse", "job")
    assert done.returncode == 0, done.stderr
    assert "has lost its rows in _tinysd: images and seeds are taken over from its results table alone" in done.stdout
    rows = check_whole(tmp_path / "new", 2)
    assert [(row["prompt"], row["seed"]) for row in rows[1:]] == [("owl", 7)]
    assert [row["reused"] for row in rows] == [None, str(finished_job)]


def test_a_folder_that_is_not_a_job_is_not_reused(submit: Command, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    done = submit("-o", "new", "--reuse", "none")
    assert (done.returncode, "none: not a job folder" in done.stderr) == (2, True)
    assert not (tmp_path / "new").exists()
