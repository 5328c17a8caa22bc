"""Table and disk disagree: what `submit`, `status`, `plan --reuse` and `verify` make of it."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.files import names_below, snapshot
from tests.support.jobs import check_whole, read_results
from tests.support.program import run_here
from tinysd_batch.job.results import writer
from tinysd_batch.job.results.compare import FileState, compare_folders, find_differences
from tinysd_batch.job.results.table import ResultsTable, read_table
from tinysd_batch.job.workers.worker import Worker
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.records import ImageResult

QUICK = ("--sampler", "ddim", "--steps", 1, "--scale", 1, "--seed", 5)
MANIFEST = "prompt\napple\npear\nowl\nfox\nbee\n"
Program = Callable[..., CompletedProcess[str]]

loaded = functools.cache(TinySD.from_pretrained)


@pytest.fixture
def submit(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(TinySD, "from_pretrained", loaded)
    (tmp_path / "m.csv").write_text(MANIFEST)

    def program(*arguments: object, command: str = "submit") -> CompletedProcess[str]:
        inline = ("--inline", "--skip_grid") if command == "submit" else ()
        return run_here(command, "m.csv", *QUICK, "--model", tiny_model, *inline, *arguments, cwd=tmp_path)

    return program


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "m.csv").write_text(MANIFEST)
    done = run_here(
        "submit", "m.csv", *QUICK, "--model", tiny_model, "--inline", "--skip_grid", "-o", "job", cwd=folder
    )
    assert done.returncode == 0
    return folder / "job"


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A finished job of five images."""
    return Path(shutil.copytree(finished, tmp_path / "job"))


def files_of(job: Path) -> list[Path]:
    return [job / row["file_name"] for row in read_results(job)]


def generated(job: Path) -> list[int]:
    """Indexes of the images that the newest run generated."""
    newest = json.loads((job / "job.json").read_text())["last_run"]["run_id"]
    return [row["index"] for row in read_results(job) if row["run_id"] == newest]


def say(command: str, job: Path, *more: object) -> CompletedProcess[str]:
    return run_here(command, job, *more, cwd=job.parent)


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size + size if size < 0 else size)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent.parent.parent / "elsewhere.png")
    path.symlink_to(path.parent.parent.parent.parent / "elsewhere.png")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


LOST: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": cut(0),
    "cut to 100 bytes": cut(100),
    "its last byte missing": cut(-1),
    "its last chunk missing": cut(-12),
    "a link": replace_by_link,
    "a pipe": replace_by_pipe,
}


def test_what_is_missing_or_shorter_is_generated_again(submit: Program, tmp_path: Path) -> None:
    job, many = tmp_path / "job", ("-o", "job", "--n_samples", 2)
    submit(*many)
    files = files_of(job)
    before = {path.name: path.read_bytes() for path in files}
    for path, change in zip(files, LOST.values(), strict=False):
        change(path)
    told = "of 10 image files 1 is missing, 4 are shorter than the table says, 2 are not a regular file (images/00000/"
    assert told in say("status", job).stdout
    assert "3 are already generated; 7 to be generated again" in submit(*many, command="plan").stdout
    done = submit(*many)
    assert done.returncode == 0, done.stderr
    assert f"Generating images again: {told}" in done.stdout
    assert "7 images made" in done.stdout
    assert generated(job) == [1, 2, 3, 4, 5, 6, 7]
    check_whole(job, 10)
    assert {path.name: path.read_bytes() for path in files_of(job)} == before
    assert "again" not in say("status", job).stdout + submit(*many).stdout
    assert (say("verify", job).returncode, say("verify", job).stderr) == (0, "")


@pytest.mark.parametrize("kind", [
    "png", pytest.param("jpg", marks=pytest.mark.slow), pytest.param("webp", marks=pytest.mark.slow)
])  # fmt: skip
def test_files_that_were_cut_are_never_taken_over(submit: Program, tmp_path: Path, kind: str) -> None:
    job = tmp_path / "job"
    submit("-o", "job", "--format", kind)
    before = [path.read_bytes() for path in files_of(job)]
    for forget_table in (False, True):
        for path, size in zip(files_of(job), (-1, -2, -5, 1), strict=False):
            cut(size)(path)
        if forget_table:
            (job / "results.parquet").unlink()
        submit("-o", "job", "--format", kind)
        assert [path.read_bytes() for path in files_of(job)] == before


@pytest.mark.parametrize("options", [
    ["--no-metadata"],
    pytest.param(["--n_samples", 2], marks=pytest.mark.slow),
    pytest.param(["--format", "jpg", "--quality", 50], marks=pytest.mark.slow),
])  # fmt: skip
def test_jobs_of_every_kind_are_compared(submit: Program, tmp_path: Path, options: list[object]) -> None:
    submit("-o", "job", *options)
    files = files_of(tmp_path / "job")
    files[0].unlink()
    cut(7)(files[3])
    done = submit("-o", "job", *options)
    assert "of " in done.stdout
    assert done.returncode == 0, done.stderr
    assert generated(tmp_path / "job") == [1, 4]
    check_whole(tmp_path / "job", len(files))


def test_images_that_were_not_saved_are_not_missing(submit: Program, tmp_path: Path) -> None:
    submit("-o", "job", "--skip_save")
    done = submit("-o", "job", "--skip_save")
    assert "5 of 5 images are already generated" in done.stdout
    assert "missing" not in done.stdout + say("status", tmp_path / "job").stdout
    done = say("verify", tmp_path / "job")
    assert (done.returncode, "5 not saved" in done.stdout) == (0, True)


def test_a_large_job_keeps_one_row_an_image(
    submit: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "MAX_SINGLE_FILE_ROWS", 2)
    submit("-o", "job")
    rows = ResultsTable(tmp_path / "job").read_newest(["row", "index", "file_name"])
    (tmp_path / "job" / rows["file_name"][3].as_py()).unlink()
    assert submit("-o", "job").returncode == 0
    parts = ResultsTable(tmp_path / "job").sealed_files()
    assert len(parts) == 2
    assert sorted(pa.concat_tables(map(read_table, parts))["index"].to_pylist()) == [1, 2, 3, 4, 5]
    assert say("verify", tmp_path / "job").returncode == 0


def test_what_is_as_large_or_larger_is_left_alone_and_told_by_verify(submit: Program, job: Path) -> None:
    same_size, larger = files_of(job)[:2]
    data = bytearray(same_size.read_bytes())
    data[-20] ^= 1
    same_size.write_bytes(data)
    larger.write_bytes(larger.read_bytes() + b"more")
    changed = same_size.read_bytes(), larger.read_bytes()
    assert "0 images made" in submit("-o", "job").stdout
    assert (same_size.read_bytes(), larger.read_bytes()) == changed
    assert "Files:" not in say("status", job).stdout
    before = snapshot(job)
    done = say("verify", job)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines()[1:4] == [
        "2 changed: the SHA-256 differs from the table's:",
        "  images/00000/seed_5_00001.png",
        "  images/00000/seed_6_00002.png",
    ]
    told = json.loads(say("verify", job, "--json").stdout)
    assert (told["images"], told["is_right"]) == (5, False)
    assert told["changed"] == ["images/00000/seed_5_00001.png", "images/00000/seed_6_00002.png"]
    assert told["missing"] == told["extra"] == told["shorter"] == []
    assert snapshot(job) == before


@pytest.mark.parametrize(("lost", "stops"), [(2, False), (3, True)])
def test_more_than_half_missing_is_taken_for_an_unmounted_disk(
    submit: Program, job: Path, lost: int, stops: bool
) -> None:
    for path in files_of(job)[:lost]:
        path.unlink()
    before = snapshot(job)
    done = submit("-o", "job")
    if stops:
        assert done.returncode == 5
        assert f"job/images: of 5 image files {lost} are missing" in done.stderr
        assert "--redo-missing generates them again" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert snapshot(job) == before
        assert "--redo-missing" in say("status", job).stdout
        assert "--redo-missing" in submit("-o", "job", command="plan").stdout
        done = submit("-o", "job", "--redo-missing")
    assert done.returncode == 0
    assert generated(job) == list(range(1, lost + 1))
    check_whole(job, 5)


@pytest.mark.slow
def test_a_job_whose_image_folder_is_gone(submit: Program, job: Path) -> None:
    shutil.rmtree(job / "images")
    assert submit("-o", "job").returncode == 5
    (job / "images").mkdir()
    assert submit("-o", "job").returncode == 5
    assert submit("-o", "job", "--redo-missing").returncode == 0
    check_whole(job, 5)


@pytest.mark.slow
def test_files_that_were_cut_are_no_sign_of_an_unmounted_disk(submit: Program, job: Path) -> None:
    for path in files_of(job):
        os.truncate(path, 0)
    assert submit("-o", "job").returncode == 0
    check_whole(job, 5)


def test_a_folder_in_an_images_place_costs_that_image(submit: Program, job: Path) -> None:
    replace_by_folder(files_of(job)[1])
    done = submit("-o", "job")
    assert done.returncode == 3
    assert [row["status"] for row in read_results(job)] == ["ok", "failed", "ok", "ok", "ok"]
    assert "1 failed or invalid" in say("verify", job).stdout
    (job / "images" / "00000" / "seed_6_00002.png").rmdir()
    assert submit("-o", "job", "--retry-failed").returncode == 0
    check_whole(job, 5)


def test_an_image_folder_that_cannot_be_read_is_not_missing(
    job: Path, submit: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "scandir", refuse)
    done = submit("-o", "job")
    assert done.returncode == 5
    assert "images/00000: Permission denied" in done.stderr


def test_no_link_is_followed(job: Path) -> None:
    (job / "images").rename(job.parent / "images")
    (job / "images").symlink_to(job.parent / "images")
    assert find_differences(job).is_mostly_missing


def test_a_file_that_vanishes_while_the_job_runs_is_left_for_the_next_run(
    submit: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Worker.generate_batch

    def lose_second(self: Worker, batch: Any) -> list[ImageResult]:
        made = original(self, batch)
        if made[0].index == 2:
            (self.setup.job_folder / str(made[0].file_name)).unlink()
        return made

    monkeypatch.setattr(Worker, "generate_batch", lose_second)
    done = submit("-o", "job")
    assert done.returncode == 1
    assert "Deleted or changed while the job ran: of 5 image files 1 is missing" in done.stdout
    assert "Stopped with 1 image left" in done.stdout
    monkeypatch.undo()
    monkeypatch.setattr(TinySD, "from_pretrained", loaded)
    assert submit("-o", "job").returncode == 0
    check_whole(tmp_path / "job", 5)


def test_the_plan_says_what_reuse_will_find(submit: Program, job: Path) -> None:
    files = files_of(job)
    files[0].unlink()
    cut(50)(files[1])
    files[2].write_bytes(files[2].read_bytes() + b"more")
    planned = submit("-o", "new", "--reuse", "job", command="plan")
    assert "2 can be reused" in planned.stdout
    done = submit("-o", "new", "--reuse", "job")
    assert "3 images made" in done.stdout
    assert "2 reused" in done.stdout


def test_verify_names_each_kind(job: Path) -> None:
    files = files_of(job)
    files[0].unlink()
    cut(10)(files[1])
    replace_by_link(files[2])
    (job / "images" / "00000" / "note.txt").touch()
    (job / "images" / "00003").mkdir()
    (job / "images" / "00003" / "a.png").touch()
    (job / "images" / "b.png").touch()
    (job / "images" / "00004").symlink_to("/etc")
    told = json.loads(say("verify", job, "--json").stdout)
    assert [told[name] for name in ("missing", "shorter", "no_file")] == [
        [f"images/00000/seed_{seed}_0000{seed - 4}.png"] for seed in (5, 6, 7)
    ]
    assert told["extra"] == ["images/00000/note.txt", "images/00003/a.png", "images/00004", "images/b.png"]
    assert "--redo-missing" not in say("verify", job).stdout


def test_verify_says_how_to_go_on_where_most_images_are_missing(job: Path) -> None:
    shutil.rmtree(job / "images")
    assert "submit requires --redo-missing" in say("verify", job).stdout


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
def test_verify_checks_the_table_against_itself(
    job: Path, values: dict[str, object], problem: str, name: str
) -> None:  # fmt: skip
    table = read_table(job / "results.parquet")
    first, *rest = table.to_pylist()
    pq.write_table(pa.Table.from_pylist([first | values, *rest], table.schema), job / "results.parquet")
    done = say("verify", job, "--json")
    assert done.returncode == 3
    assert name in json.loads(done.stdout)[problem]


def test_verify_needs_a_table(tmp_path: Path) -> None:
    done = say("verify", tmp_path / "nothing")
    assert (done.returncode, "has no results to verify" in done.stderr) == (2, True)


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    original = os.scandir

    def note(folder: Path) -> Any:
        listed.append(folder.name)
        return original(folder)

    for folder in ("00000", "00001"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "a.png").write_bytes(b"123")
    monkeypatch.setattr(os, "scandir", note)
    images = [(index, f"images/0000{index % 2}/{'a' if index < 2 else 'b'}.png", 3) for index in range(10)]
    compared = [
        file
        for folder in compare_folders(tmp_path, sorted(images, key=lambda image: image[1]))
        for file in folder.files
    ]
    assert listed == ["00000", "00001"]
    assert {file.image_index: file.state for file in compared if file.state is FileState.SAME_SIZE}.keys() == {0, 1}


# Jobs that have lost their job.json


def test_a_job_without_its_job_file_is_reused_by_its_table(submit: Program, job: Path, tmp_path: Path) -> None:
    (job / "job.json").unlink()
    (tmp_path / "m.csv").write_text("prompt,seed\nnew,\nowl,\npear,\nbee,9\n")
    assert "3 can be reused" in submit("-o", "new", "--reuse", "job", command="plan").stdout
    done = submit("-o", "new", "--reuse", "job")
    assert done.returncode == 0, done.stderr
    assert "has lost its job.json: images and seeds are taken over from its results table alone" in done.stdout
    assert "3 reused" in done.stdout
    rows = check_whole(tmp_path / "new", 4)
    assert [(row["prompt"], row["seed"]) for row in rows[1:]] == [("owl", 7), ("pear", 6), ("bee", 9)]
    assert [row["reused"] for row in rows] == [None, *[str(job)] * 3]
    assert "job.json" not in names_below(job)


@pytest.mark.parametrize("cut_to", [None, 10])
def test_a_job_without_its_rows_is_reused_by_its_table(
    submit: Program, job: Path, tmp_path: Path, cut_to: int | None
) -> None:
    rows_file = job / "_tinysd" / "rows.jsonl.gz"
    if cut_to is None:
        rows_file.unlink()
    else:
        os.truncate(rows_file, cut_to)
    (tmp_path / "m.csv").write_text("prompt,seed\nnew,\nowl,\n")
    done = submit("-o", "new", "--reuse", "job")
    assert done.returncode == 0, done.stderr
    assert "has lost its rows in _tinysd: images and seeds are taken over from its results table alone" in done.stdout
    rows = check_whole(tmp_path / "new", 2)
    assert [(row["prompt"], row["seed"]) for row in rows[1:]] == [("owl", 7)]
    assert [row["reused"] for row in rows] == [None, str(job)]


def test_a_folder_that_is_no_job_is_not_reused(submit: Program, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    done = submit("-o", "new", "--reuse", "none")
    assert (done.returncode, "none: not a job folder" in done.stderr) == (2, True)
    assert not (tmp_path / "new").exists()
