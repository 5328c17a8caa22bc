"""A manifest that grows, one that changes, and images that failed: what submit does, as its user sees it."""

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
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.records import ImageResult

QUICK = ("--sampler", "ddim", "--steps", 1, "--scale", 1, "--skip_grid")
PROMPTS = ("apple", "cta", "owl", "apple")
Program = Callable[..., CompletedProcess[str]]


loaded = functools.cache(TinySD.from_pretrained)  # each run would load the model anew, which is not what is tested


@pytest.fixture
def submit(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(TinySD, "from_pretrained", loaded)

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


def seeds(job: Path) -> list[int]:
    return [row["seed"] for row in read_results(job)]


def drawn(job: Path) -> list[int]:
    """Indexes of the images that the newest run of the job drew."""
    newest = json.loads((job / "job.json").read_text())["last_run"]["run_id"]
    return [row["index"] for row in read_results(job) if row["run_id"] == newest and row["reused"] is None]


def test_appended_rows_extend_the_job(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--seed", 5)
    write(manifest, *PROMPTS, "fox", "bee")
    done = submit(manifest, "-o", "job")
    assert done.returncode == 0, done.stderr
    assert "The manifest has grown by 2 rows" in done.stdout
    assert drawn(tmp_path / "job") == [5, 6]
    check_whole(tmp_path / "job", 6)
    assert seeds(tmp_path / "job") == [5, 6, 7, 8, 9, 10]
    assert "grown" not in submit(manifest, "-o", "job").stdout


@pytest.mark.parametrize(("name", "old", "new"), [
    ("m.jsonl", '{"prompt": "a"}\n', '{"text": "a"}\n\n{"prompt": "b", "artist": "me"}\n'),
    ("m.txt", "a", "a\nb\n"),
    ("m.csv", "prompt,seed\na,\n", 'seed,prompt,artist\n"",a,\n,b,me\n'),
])  # fmt: skip
def test_every_format_may_grow_and_gain_columns(tmp_path: Path, submit: Program, name: str, old: str, new: str) -> None:
    (tmp_path / name).write_text(old)
    submit(name, "-o", "job")
    (tmp_path / name).write_text(new)
    done = submit(name, "-o", "job")
    assert done.returncode == 0, done.stderr
    rows = check_whole(tmp_path / "job", 2)
    assert [row.get("artist") for row in rows] == ([None, "me"] if "artist" in new else [None, None])


def test_an_interrupted_job_may_grow(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--limit", 2)
    write(manifest, *PROMPTS, "fox")
    assert submit(manifest, "-o", "job").returncode == 0
    check_whole(tmp_path / "job", 5)


def test_growing_that_was_cut_short_is_no_change(manifest: Path, tmp_path: Path, submit: Program) -> None:
    """Killed between writing the rows and job.json: the folder then holds more rows than job.json counts."""
    submit(manifest, "-o", "job")
    before = (tmp_path / "job" / "job.json").read_bytes()
    write(manifest, *PROMPTS, "fox")
    submit(manifest, "-o", "job", "--limit", 4)
    (tmp_path / "job" / "job.json").write_bytes(before)
    write(manifest, *PROMPTS, "bee", "ant")
    assert submit(manifest, "-o", "job").returncode == 0
    rows = check_whole(tmp_path / "job", 6)
    assert rows[-1]["prompt"] == "ant"


def test_any_other_change_is_refused_with_the_difference(manifest: Path, tmp_path: Path, submit: Program) -> None:
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


def test_without_the_kept_rows_the_old_manifest_still_goes_on(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--limit", 1)
    (tmp_path / "job" / "_tinysd" / "rows.jsonl.gz").unlink()
    write(tmp_path / "grown.csv", *PROMPTS, "fox")
    assert submit("grown.csv", "-o", "job").returncode == 5
    assert submit(manifest, "-o", "job").returncode == 0


@pytest.mark.parametrize("rows", [b"no gzip", None])
def test_images_are_taken_over_from_a_job_that_has_lost_its_rows(
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
    assert drawn(tmp_path / "new") == [5]
    assert seeds(tmp_path / "new")[:4] == seeds(tmp_path / "job")


def test_a_line_behind_an_array_is_not_lost(tmp_path: Path, submit: Program) -> None:
    """It is read as a line of its own then, and the array is one, too, which is no object."""
    file = tmp_path / "m.jsonl"
    file.write_text('[{"prompt": "a"}, {"prompt": "b"}]\n')
    submit(file, "-o", "job")
    with file.open("a") as lines:
        lines.write('{"prompt": "c"}\n')
    refused = submit(file, "-o", "job")
    assert (refused.returncode, "row 1: is invalid now" in refused.stderr) == (2, True)


def test_a_fixed_typo_redoes_one_row(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job")
    fixed = write(tmp_path / "fixed.csv", "new", "apple", "cat", "owl", "apple")
    planned = submit(fixed, "-o", "new", "--reuse", "job", command="plan")
    assert "3 can be reused" in planned.stdout
    assert "2 are to be generated" in planned.stdout
    assert not (tmp_path / "new").exists()
    done = submit(fixed, "-o", "new", "--reuse", "job")
    assert done.returncode == 0, done.stderr
    assert "2 images made" in done.stdout
    assert "3 reused" in done.stdout
    assert drawn(tmp_path / "new") == [1, 3]
    rows, old = check_whole(tmp_path / "new", 5), read_results(tmp_path / "job")
    assert [rows[at]["seed"] for at in (1, 3, 4)] == [old[at]["seed"] for at in (0, 2, 3)]
    kept = ("sha256", "image_id", "denoise_s", "device_name", "started_at", "prompt")
    assert [rows[4][name] for name in kept] == [old[3][name] for name in kept]
    assert rows[4]["reused"] == str(tmp_path / "job")
    assert rows[0]["reused"] is None
    assert (tmp_path / "new" / rows[4]["file_name"]).samefile(tmp_path / "job" / old[3]["file_name"])
    assert rows[4]["file_name"].endswith("_00005.png")


def test_pictures_are_copied_where_they_cannot_be_linked(manifest: Path, tmp_path: Path, submit: Program) -> None:
    shared_memory = Path("/dev/shm")
    if not shared_memory.exists() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    with tempfile.TemporaryDirectory(dir=shared_memory) as elsewhere:
        submit(manifest, "-o", f"{elsewhere}/job", "--limit", 2)
        submit(manifest, "-o", "new", "--reuse", f"{elsewhere}/job", "--limit", 2)
    check_whole(tmp_path / "new", 2)
    assert drawn(tmp_path / "new") == []


def test_the_new_job_stands_on_its_own(manifest: Path, tmp_path: Path, submit: Program) -> None:
    """Its seeds are kept with it: it goes on, grows, and is itself reused, when the old job is long gone."""
    submit(manifest, "-o", "job", "--limit", 3)
    fixed = write(tmp_path / "fixed.csv", "apple", "cat", "owl", "apple")
    submit(fixed, "-o", "new", "--reuse", "job", "--limit", 2)
    there = seeds(tmp_path / "new")
    shutil.rmtree(tmp_path / "job")
    write(fixed, "apple", "cat", "owl", "apple", "fox")
    done = submit(fixed, "-o", "new")
    assert "not a job folder" in done.stdout  # no more images are reused
    check_whole(tmp_path / "new", 5)
    assert seeds(tmp_path / "new")[:2] == there
    submit(write(tmp_path / "third.csv", "owl", "apple"), "-o", "third", "--reuse", "new")
    assert drawn(tmp_path / "third") == []
    assert seeds(tmp_path / "third") == [seeds(tmp_path / "new")[2], there[0]]


def test_ids_keep_seeds_where_prompts_change(tmp_path: Path, submit: Program) -> None:
    old = write(tmp_path / "old.csv", "a,apple,2", "b,cta,2", columns="id,prompt,n_samples")
    submit(old, "-o", "job")
    submit(write(tmp_path / "new.csv", "b,cat,2", "a,apple,3", columns=old.read_text().split()[0]), "-o", "new",
           "--reuse", "job")  # fmt: skip
    first = seeds(tmp_path / "job")[0]
    assert seeds(tmp_path / "new") == [first + 2, first + 3, first, first + 1, first + 2]
    assert drawn(tmp_path / "new") == [1, 2, 5]


def test_pictures_that_are_gone_or_changed_are_drawn_again(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job")
    files = sorted((tmp_path / "job" / "images").rglob("*.png"))
    files[0].unlink()
    files[1].write_bytes(files[2].read_bytes())
    files[3].rename(tmp_path / "elsewhere.png")
    files[3].symlink_to(tmp_path / "elsewhere.png")
    done = submit(manifest, "-o", "new", "--reuse", "job")
    assert "Generating again: 3 whose file" in done.stdout
    assert sorted(drawn(tmp_path / "new")) == [1, 2, 4]
    check_whole(tmp_path / "new", 4)


def test_what_was_drawn_otherwise_is_not_taken_over(tmp_path: Path, submit: Program, tiny_model: Path) -> None:
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
        assert seeds(tmp_path / name) == seeds(tmp_path / "job")
        assert drawn(tmp_path / name) == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "new", "--reuse", "nowhere"], "nowhere: not a job folder"),
        (["-o", "new", "--reuse", "m.csv"], "m.csv: not a job folder"),
        (["-o", "job", "--reuse", "job"], "started without --reuse"),
        (["-o", "fresh/../job", "--reuse", "job"], "started without --reuse"),
    ],
)
def test_a_reuse_that_cannot_be(
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
def cursed(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Seeds whose images fail; the test may lift the curse."""
    bad = {6, 8}
    original = Worker.generate_and_publish

    def poisoned(self: Worker, images: Any, wanted: Any) -> list[ImageResult]:
        if any(image.seed in bad for image in images):
            raise RuntimeError("cursed")
        return original(self, images, wanted)

    monkeypatch.setattr(Worker, "generate_and_publish", poisoned)
    return bad


@pytest.mark.parametrize("rows_of_a_small_job", [100_000, 2])
def test_failed_images_are_tried_again(
    manifest: Path, tmp_path: Path, submit: Program, cursed: set[int], monkeypatch: pytest.MonkeyPatch,
    rows_of_a_small_job: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "MAX_SINGLE_FILE_ROWS", rows_of_a_small_job)
    assert submit(manifest, "-o", "job", "--seed", 5).returncode == 3
    assert submit(manifest, "-o", "job").returncode == 3
    cursed.remove(6)
    done = submit(manifest, "-o", "job", "--retry-failed")
    assert done.returncode == 3
    assert "Trying 2 failed images again" in done.stdout
    cursed.clear()
    assert submit(manifest, "-o", "job", "--retry-failed").returncode == 0
    assert "No failed image to try again" in submit(manifest, "-o", "job", "--retry-failed").stdout
    job = tmp_path / "job"
    if rows_of_a_small_job == 2:
        rows = [row for part in ResultsTable(job).sealed_files() for row in read_table(part).to_pylist()]
        assert sorted((row["index"], row["status"]) for row in rows) == [(number, "ok") for number in range(1, 5)]
    else:
        assert all(row["status"] == "ok" for row in check_whole(job, 4))


def test_a_job_that_grows_big_goes_on_in_parts(
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


def test_kept_rows_are_plain_to_read(manifest: Path, tmp_path: Path, submit: Program) -> None:
    submit(manifest, "-o", "job", "--limit", 1)
    with gzip.open(tmp_path / "job" / "_tinysd" / "rows.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
