"""Rows that had a fault and are good now: by newer rules, or corrected in place. No other row of the job moves."""

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
from tinysd_batch.config import Settings
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


def brief(job: Path) -> list[tuple[Any, ...]]:
    return [(row["row"], row["index"], row["seed"], row["status"]) for row in read_results(job)]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Six rows of which 2 and 5 have a fault, generated with the job's seed 100."""
    write(tmp_path, "cat,-7", "bee,oops")
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, seed=100, **QUICK)
    return tmp_path / "job"


def write(folder: Path, second: str, fifth: str, *more: str) -> Path:
    lines = ["prompt,seed", "red apple,7", second, "owl,", "fox,", fifth, "ant,", *more]
    (folder / "m.csv").write_text("".join(f"{line}\n" for line in lines))
    return folder / "m.csv"


def test_a_row_corrected_in_place_comes_last(job: Path, tmp_path: Path) -> None:
    assert brief(job)[1] == (2, None, None, "invalid")
    before = [row for row in read_results(job) if row["index"]]
    _, progress = draw(write(tmp_path, "cat,8", "bee,oops"), job, MODEL, **QUICK)
    assert progress.made == [5]
    assert [row for row in read_results(job) if row["index"] and row["index"] < 5] == before
    assert brief(job) == [
        (1, 1, 7, "ok"), (2, 5, 8, "ok"), (3, 2, 101, "ok"), (4, 3, 102, "ok"), (5, None, None, "invalid"),
        (6, 4, 103, "ok"),
    ]  # fmt: skip
    check_whole(job, 5)


def test_its_empty_seed_is_that_of_its_index_and_later_rows_follow_it(job: Path, tmp_path: Path) -> None:
    draw(write(tmp_path, "cat,", "bee,oops"), job, MODEL, **QUICK)
    draw(write(tmp_path, "cat,", "bee,oops", "emu,", "yak,-4"), job, MODEL, **QUICK)
    _, progress = draw(write(tmp_path, "cat,", "bee,", "emu,", "yak,-4"), job, MODEL, **QUICK)
    assert progress.made == [7]
    assert brief(job) == [
        (1, 1, 7, "ok"), (2, 5, 104, "ok"), (3, 2, 101, "ok"), (4, 3, 102, "ok"), (5, 7, 106, "ok"), (6, 4, 103, "ok"),
        (7, 6, 105, "ok"), (8, None, None, "invalid"),
    ]  # fmt: skip
    _, progress = draw(tmp_path / "m.csv", job, MODEL, **QUICK)
    assert progress.made == []
    check_whole(job, 7)


def test_corrected_and_appended_at_once(job: Path, tmp_path: Path) -> None:
    notes = draw(write(tmp_path, "cat,", "bee,3", "emu,"), job, MODEL, **QUICK)[1].notes
    assert notes == [
        "The manifest has grown by 1 row",
        "2 rows of the manifest, faulty or blank before, can be generated now; their images come last",
    ]
    assert [entry[:2] for entry in brief(job)] == [(1, 1), (2, 5), (3, 2), (4, 3), (5, 6), (6, 4), (7, 7)]


def test_a_good_row_may_not_change_beside_a_corrected_one(job: Path, tmp_path: Path) -> None:
    write(tmp_path, "cat,", "bee,oops")
    (tmp_path / "m.csv").write_text((tmp_path / "m.csv").read_text().replace("owl", "eel"))
    with pytest.raises(JobMismatchError, match="row 3: prompt 'owl' is now 'eel'"):
        draw(tmp_path / "m.csv", job, MODEL, **QUICK)
    write(tmp_path, "cat,", "bee,oops")
    (tmp_path / "m.csv").write_text((tmp_path / "m.csv").read_text().replace("owl,", "owl,x"))
    with pytest.raises(JobMismatchError, match="row 3: is invalid now"):
        draw(tmp_path / "m.csv", job, MODEL, **QUICK)


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_an_interrupted_job_keeps_its_order_too(tmp_path: Path, limit: int) -> None:
    write(tmp_path, "cat,-7", "bee,oops")
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, seed=100, limit=limit, **QUICK)
    draw(write(tmp_path, "cat,", "bee,"), tmp_path / "job", MODEL, limit=limit, **QUICK)
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, **QUICK)
    assert [entry[:3] for entry in brief(tmp_path / "job")] == [
        (1, 1, 7), (2, 5, 104), (3, 2, 101), (4, 3, 102), (5, 6, 105), (6, 4, 103),
    ]  # fmt: skip


@pytest.mark.parametrize("more", [(), ("emu,", "yak,-4")])
def test_a_kill_between_the_rows_and_job_json_moves_nothing(job: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    before = (job / "job.json").read_bytes()
    manifest = write(tmp_path, "cat,", "bee,", *more)
    draw(manifest, job, MODEL, limit=4, **QUICK)
    (job / "job.json").write_bytes(before)
    draw(manifest, job, MODEL, **QUICK)
    assert [entry[:3] for entry in brief(job)] == [
        (1, 1, 7), (2, 5, 104), (3, 2, 101), (4, 3, 102), (5, 6, 105), (6, 4, 103),
        *[(7, 7, 106), (8, None, None)][: len(more)],
    ]  # fmt: skip


def test_a_blank_row_may_be_spoilt_and_corrected(tmp_path: Path) -> None:
    for second in (",", "cat,x", "cat,y", "cat,"):
        draw(write(tmp_path, second, "bee,"), tmp_path / "job", MODEL, seed=100, **QUICK)
    assert [entry[:2] for entry in brief(tmp_path / "job")] == [(1, 1), (2, 6), (3, 2), (4, 3), (5, 4), (6, 5)]
    _, progress = draw(tmp_path / "m.csv", tmp_path / "job", MODEL, **QUICK)
    assert (progress.made, progress.notes) == ([], [])


def test_a_row_made_blank_is_told_though_another_was_appended(job: Path, tmp_path: Path) -> None:
    write(tmp_path, "cat,-7", "bee,oops", "emu,")
    (tmp_path / "m.csv").write_text((tmp_path / "m.csv").read_text().replace("owl,", ","))
    with pytest.raises(JobMismatchError, match="row 3 is missing"):
        draw(tmp_path / "m.csv", job, MODEL, **QUICK)


def test_the_fault_of_a_corrected_row_is_gone_before_its_image_is_there(job: Path, tmp_path: Path) -> None:
    draw(write(tmp_path, "cat,", "bee,oops"), job, MODEL, limit=4, **QUICK)
    assert [(row["row"], row["status"]) for row in read_results(job)] == [
        (1, "ok"), (3, "ok"), (4, "ok"), (5, "invalid"), (6, "ok"),
    ]  # fmt: skip


def test_a_big_job_drops_the_fault_of_a_corrected_row(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though as many rows have a fault as before."""
    monkeypatch.setattr(writer, "MAX_SINGLE_FILE_ROWS", 2)
    draw(write(tmp_path, "cat,", "bee,oops", "yak,-4"), job, MODEL, **QUICK)
    rows = [row for part in ResultsTable(job).sealed_files() for row in read_table(part).to_pylist()]
    assert sorted((row["row"], row["status"]) for row in rows) == [
        (1, "ok"), (2, "ok"), (3, "ok"), (4, "ok"), (5, "invalid"), (6, "ok"), (7, "invalid"),
    ]  # fmt: skip


def test_a_correction_that_was_cut_short_costs_nothing(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between writing the rows and job.json, in which the order of the rows changes."""
    write(tmp_path, "cat,", "bee,oops", "emu,")
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(job_json, "write_job_json", lambda *_, **__: sys.exit(137))
            with pytest.raises(SystemExit):
                draw(tmp_path / "m.csv", job, MODEL, **QUICK)
    draw(tmp_path / "m.csv", job, MODEL, **QUICK)
    assert [entry[:3] for entry in brief(job)] == [
        (1, 1, 7), (2, 5, 104), (3, 2, 101), (4, 3, 102), (5, None, None), (6, 4, 103), (7, 6, 105),
    ]  # fmt: skip
    check_whole(job, 6)


def test_reuse_gives_each_row_the_seed_it_had(job: Path, tmp_path: Path) -> None:
    draw(write(tmp_path, "cat,", "bee,oops"), job, MODEL, **QUICK)
    fixed = tmp_path / "fixed.csv"
    fixed.write_text("prompt,seed\nant,\ncat,\nowl,\n")
    new = open_job(fixed, tmp_path / "new", Settings(model=str(MODEL), **QUICK), reuse=job)
    assert new.inherited_seeds == {1: 103, 2: 104, 3: 101}


@pytest.mark.parametrize("name", ["invalid_rows", "invalid_rows_limited"])
def test_a_job_of_0_1_0_gets_the_rows_that_only_newer_rules_read(name: str, tmp_path: Path) -> None:
    """Rows 2 (seed 42.0, steps 1.0) and 4 (seed -1) had a fault then."""
    shutil.copytree(FIXTURES / name, tmp_path / name)
    job = tmp_path / name / "job"
    _, progress = draw(tmp_path / name / "m.csv", job, MODEL, **QUICK)
    assert (
        "2 rows of the manifest, faulty or blank before, can be generated now; their images come last" in progress.notes
    )
    assert brief(job) == [
        (1, 1, 7, "ok"), (2, 4, 42, "ok"), (3, 2, 6, "ok"), (4, 5, 9, "ok"), (5, None, None, "invalid"),
        (6, 3, 7, "ok"),
    ]  # fmt: skip
    assert json.loads((job / "job.json").read_text())["reader"] == READER_VERSION
    _, progress = draw(tmp_path / name / "m.csv", job, MODEL, **QUICK)
    assert (progress.made, progress.notes) == ([], [])
    check_whole(job, 5)


def test_a_job_of_0_1_0_may_grow_whatever_is_read_otherwise_now(tmp_path: Path) -> None:
    """Its prompts keep the characters that are dropped today."""
    shutil.copytree(FIXTURES / "invisible", tmp_path / "old")
    with (tmp_path / "old" / "m.csv").open("a", encoding="utf-8") as file:
        file.write("fo\u200bx\n")
    draw(tmp_path / "old" / "m.csv", tmp_path / "old" / "job", MODEL, **QUICK)
    rows = read_results(tmp_path / "old" / "job")
    assert [row["prompt"] for row in rows] == ["red\u200b apple", "blue\u00a0heart", "owl", "fox"]
    expected = json.loads((FIXTURES / "invisible" / "expected.json").read_text(encoding="utf-8"))
    assert [row["image_id"] for row in rows[:3]] == [row["image_id"] for row in expected]
    # The same rows in another order of bytes: each is still the row that it was.
    text = (tmp_path / "old" / "m.csv").read_text(encoding="utf-8").replace("prompt\n", '"prompt"\n') + "emu\n"
    (tmp_path / "old" / "m.csv").write_text(text, encoding="utf-8")
    _, progress = draw(tmp_path / "old" / "m.csv", tmp_path / "old" / "job", MODEL, **QUICK)
    assert progress.made == [5]


def begin_in_0_1_0(manifest: Path, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job as 0.1.0 left it, of a manifest whose rows it found elsewhere."""
    with monkeypatch.context() as patch:
        as_then = lambda *given, **named: read_rows(*given, **(named | {"compat_0_1_0": True}))  # noqa: E731
        patch.setattr(job_module, "read_rows", as_then)
        draw(manifest, job, MODEL, seed=100, **QUICK)
    saved = json.loads((job / "job.json").read_text())
    del saved["reader"], saved["manifest"]["bytes"], saved["manifest"]["columns_as_text"]
    (job / "job.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("name", "text", "more", "begun", "grown"),
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
def test_a_job_of_0_1_0_counts_rows_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, more: str, begun: dict[int, int | None],
    grown: dict[int, int | None],
) -> None:  # fmt: skip
    manifest, job = tmp_path / name, tmp_path / "job"
    manifest.write_text(text, encoding="utf-8")
    begin_in_0_1_0(manifest, job, monkeypatch)
    _, progress = draw(manifest, job, MODEL, **QUICK)
    assert progress.made == []
    assert {row["row"]: row["index"] for row in read_results(job)} == begun
    with manifest.open("a", encoding="utf-8") as file:
        file.write(more)
    draw(manifest, job, MODEL, **QUICK)
    assert {row["row"]: row["index"] for row in read_results(job)} == begun | grown


def test_a_job_of_0_1_0_carries_times_and_lists_as_text(tmp_path: Path) -> None:
    table = {"prompt": ["cat"], "when": [datetime(2024, 1, 1)], "sizes": [[1, 2]], "price": [1.5]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    job = open_job(tmp_path / "m.parquet", tmp_path / "job", Settings(model=str(MODEL), **QUICK))
    (row,) = read_rows(job.manifest, job.row_defaults(), compat_0_1_0=True)
    assert row.extra == {"when": "2024-01-01 00:00:00.000000", "sizes": "[1, 2]", "price": 1.5}


def test_a_job_of_a_newer_version_is_refused(job: Path, tmp_path: Path) -> None:
    saved = json.loads((job / "job.json").read_text())
    (job / "job.json").write_text(json.dumps({**saved, "reader": READER_VERSION + 1, "version": "9.9"}))
    with pytest.raises(UsageError, match=r"written by tinysd-batch 9\.9"):
        draw(tmp_path / "m.csv", job, MODEL, **QUICK)


# Until the first image nothing is settled


def test_no_settings_are_locked_before_the_first_image(tmp_path: Path) -> None:
    write(tmp_path, "cat,-7", "bee,oops")
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, seed=100, stop_after=0, **QUICK)
    assert (tmp_path / "job" / "job.json").exists()
    (tmp_path / "m.csv").write_text("prompt\ngnu\n")
    summary, _ = draw(tmp_path / "m.csv", tmp_path / "job", MODEL, **(QUICK | {"steps": 2}))
    assert (summary.total, summary.invalid_rows) == (1, 0)
    assert [(row["prompt"], row["steps"], row["seed"]) for row in check_whole(tmp_path / "job", 1)] == [("gnu", 2, 100)]


def test_from_the_first_image_on_they_are(tmp_path: Path) -> None:
    write(tmp_path, "cat,-7", "bee,oops")
    draw(tmp_path / "m.csv", tmp_path / "job", MODEL, limit=1, **QUICK)
    with pytest.raises(JobMismatchError, match="steps: 1 in the job, 2 now"):
        draw(tmp_path / "m.csv", tmp_path / "job", MODEL, **(QUICK | {"steps": 2}))
