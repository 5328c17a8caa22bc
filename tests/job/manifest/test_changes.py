"""What submit does with a manifest that grows or changes, and with images that failed, as a user sees it."""

import functools
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.support.jobs import check_whole, read_results
from tests.support.program import run_here
from tinysd_batch.job.results import writer
from tinysd_batch.job.results.table import ResultsTable, read_table
from tinysd_batch.job.workers.worker import Worker
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.records import ImageResult

QUICK = ("--sampler", "ddim", "--steps", 1, "--scale", 1, "--skip_grid")
PROMPTS = ("apple", "cta", "owl", "apple")
Program = Callable[..., CompletedProcess[str]]


load_model_once = functools.cache(TinySD.from_pretrained)  # loading is not under test here, so it happens once


@pytest.fixture
def submit(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(TinySD, "from_pretrained", load_model_once)

    def program(*arguments: object, command: str = "submit") -> CompletedProcess[str]:
        inline = ("--inline",) if command == "submit" else ()
        return run_here(command, *QUICK, "--model", tiny_model, *inline, *arguments, cwd=tmp_path)

    return program


def write(path: Path, *prompts: str, columns: str = "prompt") -> Path:
    path.write_text("".join(f"{line}\n" for line in (columns, *prompts)), encoding="utf-8")
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write(tmp_path / "m.csv", *PROMPTS)


def get_seeds(job: Path) -> list[int]:
    return [row["seed"] for row in read_results(job)]


def get_generated_indexes(job: Path) -> list[int]:
    """Return the indexes of the images that the last run of the job generated."""
    newest = json.loads((job / "job.json").read_text())["last_run"]["run_id"]
    return [row["index"] for row in read_results(job) if row["run_id"] == newest and row["reused"] is None]


def test_appended_rows_extend_the_job(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--seed", 5)
    write(manifest, *PROMPTS, "fox", "bee")
    done = submit(manifest, "-o", "job")
    assert done.returncode == 0, done.stderr
    assert "The manifest has grown by 2 rows" in done.stdout
    assert get_generated_indexes(tmp_path / "job") == [5, 6]
    check_whole(tmp_path / "job", 6)
    assert get_seeds(tmp_path / "job") == [5, 6, 7, 8, 9, 10]
    assert "grown" not in submit(manifest, "-o", "job").stdout


@pytest.mark.parametrize(("name", "old", "new"), [
    ("m.jsonl", '{"prompt": "a"}\n', '{"text": "a"}\n\n{"prompt": "b", "artist": "me"}\n'),
    ("m.txt", "a", "a\nb\n"),
    ("m.csv", "prompt,seed\na,\n", 'seed,prompt,artist\n"",a,\n,b,me\n'),
])  # fmt: skip
def test_every_format_can_gain_rows_and_columns(tmp_path: Path, submit: Program, name: str, old: str, new: str) -> None:
    (tmp_path / name).write_text(old)
    submit(name, "-o", "job")
    (tmp_path / name).write_text(new)
    done = submit(name, "-o", "job")
    assert done.returncode == 0, done.stderr
    rows = check_whole(tmp_path / "job", 2)
    assert [row.get("artist") for row in rows] == ([None, "me"] if "artist" in new else [None, None])


def test_interrupted_job_can_grow(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--limit", 2)
    write(manifest, *PROMPTS, "fox")
    assert submit(manifest, "-o", "job").returncode == 0
    check_whole(tmp_path / "job", 5)


def test_interrupted_growth_is_not_a_change(manifest: Path, tmp_path: Path, submit: Program) -> None:
    """If killed between writing the rows and job.json, the folder holds more rows than job.json counts."""
    submit(manifest, "-o", "job")
    before = (tmp_path / "job" / "job.json").read_bytes()
    write(manifest, *PROMPTS, "fox")
    submit(manifest, "-o", "job", "--limit", 4)
    (tmp_path / "job" / "job.json").write_bytes(before)
    write(manifest, *PROMPTS, "bee", "ant")
    assert submit(manifest, "-o", "job").returncode == 0
    rows = check_whole(tmp_path / "job", 6)
    assert rows[-1]["prompt"] == "ant"


def test_other_changes_are_rejected_with_the_difference(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--limit", 1)
    before = read_results(tmp_path / "job")
    write(manifest, "apple", "cat", "owl", "apple", "fox")
    for command in ("submit", "plan"):
        done = submit(manifest, "-o", "job", command=command)
        assert done.returncode == 2
        assert "row 2: prompt 'cta' is now 'cat'" in done.stderr
        assert "--reuse job" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert read_results(tmp_path / "job") == before
    write(manifest, *PROMPTS)
    assert submit(manifest, "-o", "job").returncode == 0


def test_unchanged_manifest_resumes_without_the_snapshot(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--limit", 1)
    (tmp_path / "job" / "_tinysd" / "rows.jsonl.gz").unlink()
    write(tmp_path / "grown.csv", *PROMPTS, "fox")
    assert submit("grown.csv", "-o", "job").returncode == 5
    assert submit(manifest, "-o", "job").returncode == 0


@pytest.mark.parametrize("rows", [b"no gzip", None])
def test_images_are_reused_from_a_job_without_its_snapshot(
    manifest: Path, tmp_path: Path, submit: Program, rows: bytes | None
) -> None:
    submit(manifest, "-o", "job")
    kept = tmp_path / "job" / "_tinysd" / "rows.jsonl.gz"
    kept.unlink()
    if rows is not None:
        kept.write_bytes(rows)
    write(tmp_path / "grown.csv", *PROMPTS, "fox")
    refused = submit("grown.csv", "-o", "job")
    assert refused.returncode == 5
    assert "--reuse job" in refused.stderr
    assert submit("grown.csv", "-o", "new", "--reuse", "job").returncode == 0
    assert get_generated_indexes(tmp_path / "new") == [5]
    assert get_seeds(tmp_path / "new")[:4] == get_seeds(tmp_path / "job")


def test_line_after_an_array_is_not_ignored(tmp_path: Path, submit: Program) -> None:
    """The file is then read line by line, and the array is a line that is not an object."""
    file = tmp_path / "m.jsonl"
    file.write_text('[{"prompt": "a"}, {"prompt": "b"}]\n')
    submit(file, "-o", "job")
    with file.open("a") as lines:
        lines.write('{"prompt": "c"}\n')
    refused = submit(file, "-o", "job")
    assert (refused.returncode, "row 1: is invalid now" in refused.stderr) == (2, True)


def test_fixed_typo_regenerates_one_row(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job")
    fixed = write(tmp_path / "fixed.csv", "new", "apple", "cat", "owl", "apple")
    planned = submit(fixed, "-o", "new", "--reuse", "job", command="plan")
    assert "3 can be reused" in planned.stdout
    assert "2 are to be generated" in planned.stdout
    assert not (tmp_path / "new").exists()
    done = submit(fixed, "-o", "new", "--reuse", "job")
    assert done.returncode == 0, done.stderr
    assert "2 images generated" in done.stdout
    assert "3 reused" in done.stdout
    assert get_generated_indexes(tmp_path / "new") == [1, 3]
    rows, old = check_whole(tmp_path / "new", 5), read_results(tmp_path / "job")
    assert [rows[at]["seed"] for at in (1, 3, 4)] == [old[at]["seed"] for at in (0, 2, 3)]
    kept = ("sha256", "image_id", "denoise_s", "device_name", "started_at", "prompt")
    assert [rows[4][name] for name in kept] == [old[3][name] for name in kept]
    assert rows[4]["reused"] == str(tmp_path / "job")
    assert rows[0]["reused"] is None
    assert (tmp_path / "new" / rows[4]["file_name"]).samefile(tmp_path / "job" / old[3]["file_name"])
    assert rows[4]["file_name"].endswith("_00005.png")


def test_reused_images_are_copied_if_they_cannot_be_linked(manifest: Path, tmp_path: Path, submit: Program) -> None:
    shared_memory = Path("/dev/shm")
    if not shared_memory.exists() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    with tempfile.TemporaryDirectory(dir=shared_memory) as elsewhere:
        submit(manifest, "-o", f"{elsewhere}/job", "--limit", 2)
        submit(manifest, "-o", "new", "--reuse", f"{elsewhere}/job", "--limit", 2)
    check_whole(tmp_path / "new", 2)
    assert get_generated_indexes(tmp_path / "new") == []


def test_new_job_does_not_need_the_old_one(manifest: Path, tmp_path: Path, submit: Program) -> None:
    """Its seeds are stored with it, so it can be resumed, grow and be reused after the old job was deleted."""
    submit(manifest, "-o", "job", "--limit", 3)
    fixed = write(tmp_path / "fixed.csv", "apple", "cat", "owl", "apple")
    submit(fixed, "-o", "new", "--reuse", "job", "--limit", 2)
    new_seeds = get_seeds(tmp_path / "new")
    shutil.rmtree(tmp_path / "job")
    write(fixed, "apple", "cat", "owl", "apple", "fox")
    done = submit(fixed, "-o", "new")
    assert "not a job folder" in done.stdout  # no more images are reused
    check_whole(tmp_path / "new", 5)
    assert get_seeds(tmp_path / "new")[:2] == new_seeds
    submit(write(tmp_path / "third.csv", "owl", "apple"), "-o", "third", "--reuse", "new")
    assert get_generated_indexes(tmp_path / "third") == []
    assert get_seeds(tmp_path / "third") == [get_seeds(tmp_path / "new")[2], new_seeds[0]]


def test_rows_with_the_same_id_keep_their_seeds(tmp_path: Path, submit: Program) -> None:
    old = write(tmp_path / "old.csv", "a,apple,2", "b,cta,2", columns="id,prompt,n_samples")
    submit(old, "-o", "job")
    submit(write(tmp_path / "new.csv", "b,cat,2", "a,apple,3", columns=old.read_text().split()[0]), "-o", "new",
           "--reuse", "job")  # fmt: skip
    first = get_seeds(tmp_path / "job")[0]
    assert get_seeds(tmp_path / "new") == [first + 2, first + 3, first, first + 1, first + 2]
    assert get_generated_indexes(tmp_path / "new") == [1, 2, 5]


def test_missing_or_changed_images_are_generated_again(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job")
    files = sorted((tmp_path / "job" / "images").rglob("*.png"))
    files[0].unlink()
    files[1].write_bytes(files[2].read_bytes())
    files[3].rename(tmp_path / "elsewhere.png")
    files[3].symlink_to(tmp_path / "elsewhere.png")
    done = submit(manifest, "-o", "new", "--reuse", "job")
    assert "Generating again: 3 whose file" in done.stdout
    assert sorted(get_generated_indexes(tmp_path / "new")) == [1, 2, 4]
    check_whole(tmp_path / "new", 4)


def test_images_of_other_settings_or_models_are_not_reused(tmp_path: Path, submit: Program, tiny_model: Path) -> None:
    manifest = write(tmp_path / "m.csv", "apple", "owl")
    submit(manifest, "-o", "job")
    done = submit(manifest, "-o", "steps", "--reuse", "job", "--steps", 3)
    assert "Nothing can be reused" in done.stdout
    assert "steps: 1 there, 3 here" in done.stdout
    assert "format: png there, jpg here" in submit(manifest, "-o", "jpg", "--reuse", "job", "--format", "jpg").stdout
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    done = submit(manifest, "-o", "model", "--reuse", "job", "--model", other)
    assert "has other weights" in done.stdout
    for name in ("jpg", "model"):
        assert get_seeds(tmp_path / name) == get_seeds(tmp_path / "job")
        assert get_generated_indexes(tmp_path / name) == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "new", "--reuse", "nowhere"], "nowhere: not a job folder"),
        (["-o", "new", "--reuse", "m.csv"], "m.csv: not a job folder"),
        (["-o", "job", "--reuse", "job"], "started without --reuse"),
        (["-o", "fresh/../job", "--reuse", "job"], "started without --reuse"),
    ],
)
def test_invalid_reuse_is_rejected(
    manifest: Path, tmp_path: Path, submit: Program, options: list[str], message: str
) -> None:
    (tmp_path / "fresh").mkdir()
    submit(manifest, "-o", "job", "--limit", 1)
    done = submit(manifest, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.fixture
def failing_seeds(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Seeds whose images fail. The test can remove seeds from the set."""
    seeds = {6, 8}
    original = Worker.generate_and_publish

    def fail_for_seeds(self: Worker, images: Any, wanted: Any) -> list[ImageResult]:
        if any(image.seed in seeds for image in images):
            raise RuntimeError("this seed fails")
        return original(self, images, wanted)

    monkeypatch.setattr(Worker, "generate_and_publish", fail_for_seeds)
    return seeds


@pytest.mark.parametrize("rows_of_a_small_job", [100_000, 2])
def test_failed_images_are_retried(
    manifest: Path, tmp_path: Path, submit: Program, failing_seeds: set[int], monkeypatch: pytest.MonkeyPatch,
    rows_of_a_small_job: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "MAX_SINGLE_FILE_ROWS", rows_of_a_small_job)
    assert submit(manifest, "-o", "job", "--seed", 5).returncode == 3
    assert submit(manifest, "-o", "job").returncode == 3
    failing_seeds.remove(6)
    done = submit(manifest, "-o", "job", "--retry-failed")
    assert done.returncode == 3
    assert "Trying 2 failed images again" in done.stdout
    failing_seeds.clear()
    assert submit(manifest, "-o", "job", "--retry-failed").returncode == 0
    assert "No failed image to try again" in submit(manifest, "-o", "job", "--retry-failed").stdout
    job = tmp_path / "job"
    if rows_of_a_small_job == 2:
        rows = [row for part in ResultsTable(job).sealed_files() for row in read_table(part).to_pylist()]
        assert sorted((row["index"], row["status"]) for row in rows) == [(number, "ok") for number in range(1, 5)]
    else:
        assert all(row["status"] == "ok" for row in check_whole(job, 4))


def test_job_that_exceeds_one_results_file_continues_in_parts(
    manifest: Path, tmp_path: Path, submit: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(manifest, "-o", "job")
    monkeypatch.setattr(writer, "MAX_SINGLE_FILE_ROWS", 4)
    write(manifest, *PROMPTS, "fox")
    submit(manifest, "-o", "job")
    job = tmp_path / "job"
    assert [file.name for file in ResultsTable(job).sealed_files()] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert sorted(row["index"] for row in ResultsTable(job).read_rows(["index", "row", "status"])) == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_snapshot_is_readable_json_lines(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--limit", 1)
    with gzip.open(tmp_path / "job" / "_tinysd" / "rows.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
