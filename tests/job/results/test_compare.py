"""`submit`, `status` and `plan` detect files that differ from the results table."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.support.damaged_jobs import (
    DAMAGES,
    Command,
    list_files,
    read_generated,
    replace_with_folder,
    run_command,
    truncate,
)
from tests.support.files import snapshot
from tests.support.jobs import check_whole, read_results
from tinysd_batch.job.results import writer
from tinysd_batch.job.results.compare import FileState, compare_folders, find_differences
from tinysd_batch.job.results.table import ResultsTable, read_table
from tinysd_batch.job.workers.worker import Worker
from tinysd_batch.records import ImageResult


def test_missing_and_truncated_files_are_generated_again(submit: Command, tmp_path: Path) -> None:
    job, options = tmp_path / "job", ("-o", "job", "--n_samples", 2)
    submit(*options)
    files = list_files(job)
    before = {path.name: path.read_bytes() for path in files}
    for path, change in zip(files, DAMAGES.values(), strict=False):
        change(path)
    differences = (
        "of 10 image files 1 is missing, 4 are shorter than the table says, 2 are not a regular file (images/00000/"
    )
    assert differences in run_command("status", job).stdout
    assert "3 are already generated; 7 to be generated again" in submit(*options, command="plan").stdout
    done = submit(*options)
    assert done.returncode == 0, done.stderr
    assert f"Generating images again: {differences}" in done.stdout
    assert "7 images generated" in done.stdout
    assert read_generated(job) == [1, 2, 3, 4, 5, 6, 7]
    check_whole(job, 10)
    assert {path.name: path.read_bytes() for path in list_files(job)} == before
    assert "again" not in run_command("status", job).stdout + submit(*options).stdout
    assert (run_command("verify", job).returncode, run_command("verify", job).stderr) == (0, "")


@pytest.mark.parametrize("file_format", [
    "png", pytest.param("jpg", marks=pytest.mark.slow), pytest.param("webp", marks=pytest.mark.slow)
])  # fmt: skip
def test_truncated_files_are_never_kept(submit: Command, tmp_path: Path, file_format: str) -> None:
    job = tmp_path / "job"
    submit("-o", "job", "--format", file_format)
    before = [path.read_bytes() for path in list_files(job)]
    for forget_table in (False, True):
        for path, size in zip(list_files(job), (-1, -2, -5, 1), strict=False):
            truncate(size)(path)
        if forget_table:
            (job / "results.parquet").unlink()
        submit("-o", "job", "--format", file_format)
        assert [path.read_bytes() for path in list_files(job)] == before


@pytest.mark.parametrize("options", [
    ["--no-metadata"],
    pytest.param(["--n_samples", 2], marks=pytest.mark.slow),
    pytest.param(["--format", "jpg", "--quality", 50], marks=pytest.mark.slow),
])  # fmt: skip
def test_jobs_with_various_options_are_compared(submit: Command, tmp_path: Path, options: list[object]) -> None:
    submit("-o", "job", *options)
    files = list_files(tmp_path / "job")
    files[0].unlink()
    truncate(7)(files[3])
    done = submit("-o", "job", *options)
    assert "of " in done.stdout
    assert done.returncode == 0, done.stderr
    assert read_generated(tmp_path / "job") == [1, 4]
    check_whole(tmp_path / "job", len(files))


def test_images_that_were_not_saved_do_not_count_as_missing(submit: Command, tmp_path: Path) -> None:
    submit("-o", "job", "--skip_save")
    done = submit("-o", "job", "--skip_save")
    assert "5 of 5 images are already generated" in done.stdout
    assert "missing" not in done.stdout + run_command("status", tmp_path / "job").stdout
    done = run_command("verify", tmp_path / "job")
    assert (done.returncode, "5 not saved" in done.stdout) == (0, True)


def test_a_large_job_keeps_one_row_per_image(
    submit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "MAX_SINGLE_FILE_ROWS", 2)
    submit("-o", "job")
    rows = ResultsTable(tmp_path / "job").read_newest(["row", "index", "file_name"])
    (tmp_path / "job" / rows["file_name"][3].as_py()).unlink()
    assert submit("-o", "job").returncode == 0
    parts = ResultsTable(tmp_path / "job").sealed_files()
    assert len(parts) == 2
    assert sorted(pa.concat_tables(map(read_table, parts))["index"].to_pylist()) == [1, 2, 3, 4, 5]
    assert run_command("verify", tmp_path / "job").returncode == 0


def test_changed_files_that_are_not_smaller_are_reported_by_verify(submit: Command, finished_job: Path) -> None:
    same_size, larger = list_files(finished_job)[:2]
    data = bytearray(same_size.read_bytes())
    data[-20] ^= 1
    same_size.write_bytes(data)
    larger.write_bytes(larger.read_bytes() + b"more")
    changed = same_size.read_bytes(), larger.read_bytes()
    assert "0 images generated" in submit("-o", "job").stdout
    assert (same_size.read_bytes(), larger.read_bytes()) == changed
    assert "Files:" not in run_command("status", finished_job).stdout
    before = snapshot(finished_job)
    done = run_command("verify", finished_job)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines()[1:4] == [
        "2 changed: the SHA-256 differs from the table's:",
        "  images/00000/seed_5_00001.png",
        "  images/00000/seed_6_00002.png",
    ]
    report = json.loads(run_command("verify", finished_job, "--json").stdout)
    assert (report["images"], report["is_right"]) == (5, False)
    assert report["changed"] == ["images/00000/seed_5_00001.png", "images/00000/seed_6_00002.png"]
    assert report["missing"] == report["extra"] == report["shorter"] == []
    assert snapshot(finished_job) == before


@pytest.mark.parametrize(("lost", "stops"), [(2, False), (3, True)])
def test_more_than_half_of_the_files_missing_suggests_an_unmounted_disk(
    submit: Command, finished_job: Path, lost: int, stops: bool
) -> None:
    for path in list_files(finished_job)[:lost]:
        path.unlink()
    before = snapshot(finished_job)
    done = submit("-o", "job")
    if stops:
        assert done.returncode == 5
        assert f"job/images: of 5 image files {lost} are missing" in done.stderr
        assert "--redo-missing generates them again" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert snapshot(finished_job) == before
        assert "--redo-missing" in run_command("status", finished_job).stdout
        assert "--redo-missing" in submit("-o", "job", command="plan").stdout
        done = submit("-o", "job", "--redo-missing")
    assert done.returncode == 0
    assert read_generated(finished_job) == list(range(1, lost + 1))
    check_whole(finished_job, 5)


@pytest.mark.slow
def test_a_job_whose_image_folder_was_deleted(submit: Command, finished_job: Path) -> None:
    shutil.rmtree(finished_job / "images")
    assert submit("-o", "job").returncode == 5
    (finished_job / "images").mkdir()
    assert submit("-o", "job").returncode == 5
    assert submit("-o", "job", "--redo-missing").returncode == 0
    check_whole(finished_job, 5)


@pytest.mark.slow
def test_truncated_files_do_not_suggest_an_unmounted_disk(submit: Command, finished_job: Path) -> None:
    for path in list_files(finished_job):
        os.truncate(path, 0)
    assert submit("-o", "job").returncode == 0
    check_whole(finished_job, 5)


def test_a_folder_with_an_images_name_fails_only_that_image(submit: Command, finished_job: Path) -> None:
    replace_with_folder(list_files(finished_job)[1])
    done = submit("-o", "job")
    assert done.returncode == 3
    assert [row["status"] for row in read_results(finished_job)] == ["ok", "failed", "ok", "ok", "ok"]
    assert "1 failed or invalid" in run_command("verify", finished_job).stdout
    (finished_job / "images" / "00000" / "seed_6_00002.png").rmdir()
    assert submit("-o", "job", "--retry-failed").returncode == 0
    check_whole(finished_job, 5)


def test_an_unreadable_image_folder_does_not_count_as_missing(
    finished_job: Path, submit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "scandir", refuse)
    done = submit("-o", "job")
    assert done.returncode == 5
    assert "images/00000: Permission denied" in done.stderr


def test_symbolic_links_are_not_followed(finished_job: Path) -> None:
    (finished_job / "images").rename(finished_job.parent / "images")
    (finished_job / "images").symlink_to(finished_job.parent / "images")
    assert find_differences(finished_job).is_mostly_missing


def test_a_file_deleted_during_the_run_is_left_for_the_next_run(
    submit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Worker.generate_batch

    def delete_second_image(self: Worker, batch: Any) -> list[ImageResult]:
        results = original(self, batch)
        if results[0].index == 2:
            (self.setup.job_folder / str(results[0].file_name)).unlink()
        return results

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "generate_batch", delete_second_image)
        done = submit("-o", "job")
    assert done.returncode == 1
    assert "Deleted or changed while the job ran: of 5 image files 1 is missing" in done.stdout
    assert "Stopped with 1 image left" in done.stdout
    assert submit("-o", "job").returncode == 0
    check_whole(tmp_path / "job", 5)


def test_each_folder_is_listed_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    original = os.scandir

    def record_listing(folder: Path) -> Any:
        listed.append(folder.name)
        return original(folder)

    for folder in ("00000", "00001"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "a.png").write_bytes(b"123")
    monkeypatch.setattr(os, "scandir", record_listing)
    images = [(index, f"images/0000{index % 2}/{'a' if index < 2 else 'b'}.png", 3) for index in range(10)]
    compared = [
        file
        for folder in compare_folders(tmp_path, sorted(images, key=lambda image: image[1]))
        for file in folder.files
    ]
    assert listed == ["00000", "00001"]
    assert {file.image_index: file.state for file in compared if file.state is FileState.SAME_SIZE}.keys() == {0, 1}
