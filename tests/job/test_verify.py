"""`verify` checks every image file against the results table, and the table for consistency."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.damaged_jobs import list_files, replace_with_link, run_command, truncate
from tinysd_batch.job.results.table import read_table


def test_verify_names_the_files_of_each_problem(finished_job: Path) -> None:
    files = list_files(finished_job)
    files[0].unlink()
    truncate(10)(files[1])
    replace_with_link(files[2])
    (finished_job / "images" / "00000" / "note.txt").touch()
    (finished_job / "images" / "00003").mkdir()
    (finished_job / "images" / "00003" / "a.png").touch()
    (finished_job / "images" / "b.png").touch()
    (finished_job / "images" / "00004").symlink_to("/etc")
    report = json.loads(run_command("verify", finished_job, "--json").stdout)
    assert [report[name] for name in ("missing", "shorter", "no_file")] == [
        [f"images/00000/seed_{seed}_0000{seed - 4}.png"] for seed in (5, 6, 7)
    ]
    assert report["extra"] == ["images/00000/note.txt", "images/00003/a.png", "images/00004", "images/b.png"]
    assert "--redo-missing" not in run_command("verify", finished_job).stdout


def test_verify_advises_what_to_do_if_most_images_are_missing(finished_job: Path) -> None:
    shutil.rmtree(finished_job / "images")
    assert "submit requires --redo-missing" in run_command("verify", finished_job).stdout


@pytest.mark.parametrize(
    ("values", "problem", "name"),
    [
        ({"status": "odd"}, "unknown_status", "image 1: odd"),
        ({"row": 9, "index": 2}, "doubled", "image 2: 2 rows"),
        ({"sha256": None}, "no_hash", "images/00000/seed_5_00001.png"),
        ({"file_name": "/etc/passwd"}, "outside", "/etc/passwd"),
        ({"file_name": "images/../../x.png"}, "outside", "images/../../x.png"),
        ({"file_name": "images/00000/seed_6_00002.png"}, "doubled", "images/00000/seed_6_00002.png: 2 rows"),
    ],
)
def test_verify_checks_the_table_for_consistency(
    finished_job: Path, values: dict[str, object], problem: str, name: str
) -> None:  # fmt: skip
    table = read_table(finished_job / "results.parquet")
    first, *rest = table.to_pylist()
    pq.write_table(pa.Table.from_pylist([first | values, *rest], table.schema), finished_job / "results.parquet")
    done = run_command("verify", finished_job, "--json")
    assert done.returncode == 3
    assert name in json.loads(done.stdout)[problem]


def test_verify_needs_a_table(tmp_path: Path) -> None:
    done = run_command("verify", tmp_path / "nothing")
    assert (done.returncode, "has no results to verify" in done.stderr) == (2, True)
