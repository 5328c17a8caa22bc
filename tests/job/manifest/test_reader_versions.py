"""Rows that were invalid and are valid now, by newer rules or a correction. No other row of the job changes."""

import json
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import check_whole, draw, read_results
from tests.support.paths import FIXTURES
from tinysd_batch.errors import JobMismatchError, UsageError
from tinysd_batch.job.manifest.snapshot import READER_VERSION
from tinysd_batch.job.manifest.validate import read_rows
from tinysd_batch.job.results import writer
from tinysd_batch.job.results.table import ResultsTable, read_table
from tinysd_batch.job.state import job as job_module
from tinysd_batch.job.state import job_json
from tinysd_batch.job.state.open_job import open_job

MODEL = FIXTURES / "model"
QUICK: dict[str, Any] = {"sampler": "ddim", "steps": 1, "scale": 1.0, "skip_grid": True}


def summarize_results(job: Path) -> list[tuple[Any, ...]]:
    return [(row["row"], row["index"], row["seed"], row["status"]) for row in read_results(job)]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of six rows, of which 2 and 5 are invalid, generated with the job seed 100."""
    write(tmp_path, "cat,-7", "bee,oops")
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, seed=100, **QUICK)
    return tmp_path / "job"


def write(folder: Path, second: str, fifth: str, *more: str) -> Path:
    lines = ["prompt,seed", "red apple,7", second, "owl,", "fox,", fifth, "ant,", *more]
    (folder / "m.csv").write_text("".join(f"{line}\n" for line in lines))
    return folder / "m.csv"


def test_image_of_a_corrected_row_comes_last(job: Path, tmp_path: Path) -> None:
    assert summarize_results(job)[1] == (2, None, None, "invalid")
    before = [row for row in read_results(job) if row["index"]]
    _, progress = draw(write(tmp_path, "cat,8", "bee,oops"), job, MODEL, **QUICK)
    assert progress.made == [5]
    assert [row for row in read_results(job) if row["index"] and row["index"] < 5] == before
    assert summarize_results(job) == [
        (1, 1, 7, "ok"), (2, 5, 8, "ok"), (3, 2, 101, "ok"), (4, 3, 102, "ok"), (5, None, None, "invalid"),
        (6, 4, 103, "ok"),
    ]  # fmt: skip
    check_whole(job, 5)


def test_corrected_row_without_seed_gets_the_seed_of_its_index(job: Path, tmp_path: Path) -> None:
    draw(write(tmp_path, "cat,", "bee,oops"), job, MODEL, **QUICK)
    draw(write(tmp_path, "cat,", "bee,oops", "emu,", "yak,-4"), job, MODEL, **QUICK)
    _, progress = draw(write(tmp_path, "cat,", "bee,", "emu,", "yak,-4"), job, MODEL, **QUICK)
    assert progress.made == [7]
    assert summarize_results(job) == [
        (1, 1, 7, "ok"), (2, 5, 104, "ok"), (3, 2, 101, "ok"), (4, 3, 102, "ok"), (5, 7, 106, "ok"), (6, 4, 103, "ok"),
        (7, 6, 105, "ok"), (8, None, None, "invalid"),
    ]  # fmt: skip
    _, progress = draw(tmp_path / "m.csv", job, MODEL, **QUICK)
    assert progress.made == []
    check_whole(job, 7)


def test_corrected_and_appended_rows_at_once(job: Path, tmp_path: Path) -> None:
    notes = draw(write(tmp_path, "cat,", "bee,3", "emu,"), job, MODEL, **QUICK)[1].notes
    assert notes == [
        "The manifest has grown by 1 row",
        "2 rows of the manifest, faulty or blank before, can be generated now; their images come last",
    ]
    assert [entry[:2] for entry in summarize_results(job)] == [(1, 1), (2, 5), (3, 2), (4, 3), (5, 6), (6, 4), (7, 7)]


def test_valid_row_cannot_change_together_with_a_corrected_one(job: Path, tmp_path: Path) -> None:
    write(tmp_path, "cat,", "bee,oops")
    (tmp_path / "m.csv").write_text((tmp_path / "m.csv").read_text().replace("owl", "eel"))
    with pytest.raises(JobMismatchError, match="row 3: prompt 'owl' is now 'eel'"):
        draw(tmp_path / "m.csv", job, MODEL, **QUICK)
    write(tmp_path, "cat,", "bee,oops")
    (tmp_path / "m.csv").write_text((tmp_path / "m.csv").read_text().replace("owl,", "owl,x"))
    with pytest.raises(JobMismatchError, match="row 3: is invalid now"):
        draw(tmp_path / "m.csv", job, MODEL, **QUICK)


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_interrupted_job_keeps_its_order(tmp_path: Path, limit: int) -> None:
    write(tmp_path, "cat,-7", "bee,oops")
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, seed=100, limit=limit, **QUICK)
    draw(write(tmp_path, "cat,", "bee,"), tmp_path / "job", MODEL, limit=limit, **QUICK)
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, **QUICK)
    assert [entry[:3] for entry in summarize_results(tmp_path / "job")] == [
        (1, 1, 7), (2, 5, 104), (3, 2, 101), (4, 3, 102), (5, 6, 105), (6, 4, 103),
    ]  # fmt: skip


@pytest.mark.parametrize("more", [(), ("emu,", "yak,-4")])
def test_kill_between_rows_and_job_json_changes_no_order(job: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    before = (job / "job.json").read_bytes()
    manifest = write(tmp_path, "cat,", "bee,", *more)
    draw(manifest, job, MODEL, limit=4, **QUICK)
    (job / "job.json").write_bytes(before)
    draw(manifest, job, MODEL, **QUICK)
    assert [entry[:3] for entry in summarize_results(job)] == [
        (1, 1, 7), (2, 5, 104), (3, 2, 101), (4, 3, 102), (5, 6, 105), (6, 4, 103),
        *[(7, 7, 106), (8, None, None)][: len(more)],
    ]  # fmt: skip


def test_blank_row_can_become_invalid_and_be_corrected(tmp_path: Path) -> None:
    for second in (",", "cat,x", "cat,y", "cat,"):
        draw(write(tmp_path, second, "bee,"), tmp_path / "job", MODEL, seed=100, **QUICK)
    assert [entry[:2] for entry in summarize_results(tmp_path / "job")] == [
        (1, 1),
        (2, 6),
        (3, 2),
        (4, 3),
        (5, 4),
        (6, 5),
    ]
    _, progress = draw(tmp_path / "m.csv", tmp_path / "job", MODEL, **QUICK)
    assert (progress.made, progress.notes) == ([], [])


def test_blanked_row_is_reported_even_if_another_is_appended(job: Path, tmp_path: Path) -> None:
    write(tmp_path, "cat,-7", "bee,oops", "emu,")
    (tmp_path / "m.csv").write_text((tmp_path / "m.csv").read_text().replace("owl,", ","))
    with pytest.raises(JobMismatchError, match="row 3 is missing"):
        draw(tmp_path / "m.csv", job, MODEL, **QUICK)


def test_error_of_a_corrected_row_is_removed_before_its_image_exists(job: Path, tmp_path: Path) -> None:
    draw(write(tmp_path, "cat,", "bee,oops"), job, MODEL, limit=4, **QUICK)
    assert [(row["row"], row["status"]) for row in read_results(job)] == [
        (1, "ok"), (3, "ok"), (4, "ok"), (5, "invalid"), (6, "ok"),
    ]  # fmt: skip


def test_big_job_removes_the_error_of_a_corrected_row(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of invalid rows stays the same."""
    monkeypatch.setattr(writer, "MAX_SINGLE_FILE_ROWS", 2)
    draw(write(tmp_path, "cat,", "bee,oops", "yak,-4"), job, MODEL, **QUICK)
    rows = [row for part in ResultsTable(job).sealed_files() for row in read_table(part).to_pylist()]
    assert sorted((row["row"], row["status"]) for row in rows) == [
        (1, "ok"), (2, "ok"), (3, "ok"), (4, "ok"), (5, "invalid"), (6, "ok"), (7, "invalid"),
    ]  # fmt: skip


def test_interrupted_correction_loses_nothing(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between writing the rows and job.json, which has the new order of the rows."""
    write(tmp_path, "cat,", "bee,oops", "emu,")
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(job_json, "write_job_json", lambda *_, **__: sys.exit(137))
            with pytest.raises(SystemExit):
                draw(tmp_path / "m.csv", job, MODEL, **QUICK)
    draw(tmp_path / "m.csv", job, MODEL, **QUICK)
    assert [entry[:3] for entry in summarize_results(job)] == [
        (1, 1, 7), (2, 5, 104), (3, 2, 101), (4, 3, 102), (5, None, None), (6, 4, 103), (7, 6, 105),
    ]  # fmt: skip
    check_whole(job, 6)


def test_reuse_keeps_the_seed_of_each_row(job: Path, tmp_path: Path) -> None:
    draw(write(tmp_path, "cat,", "bee,oops"), job, MODEL, **QUICK)
    fixed = tmp_path / "fixed.csv"
    fixed.write_text("prompt,seed\nant,\ncat,\nowl,\n")
    new = open_job(fixed, tmp_path / "new", {"model": str(MODEL), **QUICK}, reuse=job)
    assert new.inherited_seeds == {1: 103, 2: 104, 3: 101}


@pytest.mark.parametrize("name", ["invalid_rows", "invalid_rows_limited"])
def test_job_of_0_1_0_gains_rows_that_only_newer_rules_accept(name: str, tmp_path: Path) -> None:
    """Rows 2 (seed 42.0, steps 1.0) and 4 (seed -1) were invalid in 0.1.0."""
    shutil.copytree(FIXTURES / name, tmp_path / name)
    job = tmp_path / name / "job"
    _, progress = draw(tmp_path / name / "m.csv", job, MODEL, **QUICK)
    assert (
        "2 rows of the manifest, faulty or blank before, can be generated now; their images come last" in progress.notes
    )
    assert summarize_results(job) == [
        (1, 1, 7, "ok"), (2, 4, 42, "ok"), (3, 2, 6, "ok"), (4, 5, 9, "ok"), (5, None, None, "invalid"),
        (6, 3, 7, "ok"),
    ]  # fmt: skip
    assert json.loads((job / "job.json").read_text())["reader"] == READER_VERSION
    _, progress = draw(tmp_path / name / "m.csv", job, MODEL, **QUICK)
    assert (progress.made, progress.notes) == ([], [])
    check_whole(job, 5)


def test_job_of_0_1_0_can_grow_although_rules_changed(tmp_path: Path) -> None:
    """Its prompts keep characters that newer versions remove."""
    shutil.copytree(FIXTURES / "invisible", tmp_path / "old")
    with (tmp_path / "old" / "m.csv").open("a", encoding="utf-8") as file:
        file.write("fo\u200bx\n")
    draw(tmp_path / "old" / "m.csv", tmp_path / "old" / "job", MODEL, **QUICK)
    rows = read_results(tmp_path / "old" / "job")
    assert [row["prompt"] for row in rows] == ["red\u200b apple", "blue\u00a0heart", "owl", "fox"]
    expected = json.loads((FIXTURES / "invisible" / "expected.json").read_text(encoding="utf-8"))
    assert [row["image_id"] for row in rows[:3]] == [row["image_id"] for row in expected]
    # The same rows in other bytes: they still count as unchanged.
    text = (tmp_path / "old" / "m.csv").read_text(encoding="utf-8").replace("prompt\n", '"prompt"\n') + "emu\n"
    (tmp_path / "old" / "m.csv").write_text(text, encoding="utf-8")
    _, progress = draw(tmp_path / "old" / "m.csv", tmp_path / "old" / "job", MODEL, **QUICK)
    assert progress.made == [5]


def start_in_0_1_0(manifest: Path, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a job as 0.1.0 wrote it, for a manifest that 0.1.0 splits into other rows."""
    with monkeypatch.context() as patch:
        read_as_0_1_0 = lambda *args, **kwargs: read_rows(*args, **(kwargs | {"compat_0_1_0": True}))  # noqa: E731
        patch.setattr(job_module, "read_rows", read_as_0_1_0)
        draw(manifest, job, MODEL, seed=100, **QUICK)
    saved = json.loads((job / "job.json").read_text())
    del saved["reader"], saved["manifest"]["bytes"], saved["manifest"]["columns_as_text"]
    (job / "job.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("name", "text", "more", "indexes", "new_indexes"),
    [
        pytest.param("m.txt", "prompt\tseed\ncat\t7\n", "owl\t\n", {1: 1, 2: 2}, {3: 3}, id="table in a .txt"),
        pytest.param("m.txt", "cat\n\ufeff\nowl\n", "fox\n", {1: 1, 3: 2}, {4: 3}, id="mark alone"),
        pytest.param(
            "m.jsonl", '[\n{"prompt": "cat"},\n{"prompt": "owl"}\n]\n', '{"prompt": "fox"}\n',
            {1: None, 2: None, 3: 1, 4: None}, {5: 2}, id="array",
        ),
        pytest.param(
            "m.csv", 'prompt,note,seed\ncat, "a\nb",\nowl,x,oops\nfox,y,\n', "bee,z,\n",
            {1: None, 2: None, 3: None, 4: 1}, {5: 2}, id="blank before a quote",
        ),
        pytest.param(
            "m.csv", "prompt\ncat\n" + '"' + f"{'o' * 9999}\n" * 20 + "fox\n", "bee\n",
            {1: 1, 2: None, **{row: row - 1 for row in range(3, 10)}}, {10: 9}, id="open quote",
        ),
    ],
)  # fmt: skip
def test_job_of_0_1_0_counts_rows_as_0_1_0_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, more: str, indexes: dict[int, int | None],
    new_indexes: dict[int, int | None],
) -> None:  # fmt: skip
    manifest, job = tmp_path / name, tmp_path / "job"
    manifest.write_text(text, encoding="utf-8")
    start_in_0_1_0(manifest, job, monkeypatch)
    _, progress = draw(manifest, job, MODEL, **QUICK)
    assert progress.made == []
    assert {row["row"]: row["index"] for row in read_results(job)} == indexes
    with manifest.open("a", encoding="utf-8") as file:
        file.write(more)
    draw(manifest, job, MODEL, **QUICK)
    assert {row["row"]: row["index"] for row in read_results(job)} == indexes | new_indexes


def test_job_of_0_1_0_stores_times_and_lists_as_text(tmp_path: Path) -> None:
    table = {"prompt": ["cat"], "when": [datetime(2024, 1, 1)], "sizes": [[1, 2]], "price": [1.5]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    job = open_job(tmp_path / "m.parquet", tmp_path / "job", {"model": str(MODEL), **QUICK})
    (row,) = read_rows(job.manifest, job.row_defaults(), compat_0_1_0=True)
    assert row.extra == {"when": "2024-01-01 00:00:00.000000", "sizes": "[1, 2]", "price": 1.5}


def test_job_of_a_newer_version_is_rejected(job: Path, tmp_path: Path) -> None:
    saved = json.loads((job / "job.json").read_text())
    (job / "job.json").write_text(json.dumps({**saved, "reader": READER_VERSION + 1, "version": "9.9"}))
    with pytest.raises(UsageError, match=r"written by tinysd-batch 9\.9"):
        draw(tmp_path / "m.csv", job, MODEL, **QUICK)


# Before the first image, settings can change


def test_settings_can_change_before_the_first_image(tmp_path: Path) -> None:
    write(tmp_path, "cat,-7", "bee,oops")
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, seed=100, stop_after=0, **QUICK)
    assert (tmp_path / "job" / "job.json").exists()
    (tmp_path / "m.csv").write_text("prompt\ngnu\n")
    summary, _ = draw(tmp_path / "m.csv", tmp_path / "job", MODEL, **(QUICK | {"steps": 2}))
    assert (summary.total, summary.invalid_rows) == (1, 0)
    assert [(row["prompt"], row["steps"], row["seed"]) for row in check_whole(tmp_path / "job", 1)] == [("gnu", 2, 100)]


def test_settings_are_fixed_after_the_first_image(tmp_path: Path) -> None:
    write(tmp_path, "cat,-7", "bee,oops")
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, limit=1, **QUICK)
    with pytest.raises(JobMismatchError, match="steps: 1 in the job, 2 now"):
        draw(tmp_path / "m.csv", tmp_path / "job", MODEL, **(QUICK | {"steps": 2}))
