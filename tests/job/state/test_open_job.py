"""Jobs are resumed where they stopped, and refused if settings, model or manifest differ."""

import os
import platform
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.support.jobs import Quiet, check_whole, draw, read_results, setup_for
from tinysd_batch.errors import JobMismatchError, ManifestError, StorageError
from tinysd_batch.job.dispatch.job_progress import InvalidRows
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.results import writer
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.worker import Worker


def pixels(job: Path) -> dict[int, bytes]:
    return {row["index"]: Image.open(job / row["file_name"]).tobytes() for row in read_results(job) if row["index"]}


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_stopped_and_resumed_job_equals_an_uninterrupted_one(
    manifest: Path, tmp_path: Path, tiny_model: Path, stop_after: int
) -> None:
    draw(manifest, tmp_path / "whole", tiny_model, seed=5)
    summary, first = draw(manifest, tmp_path / "job", tiny_model, seed=5, stop_after=stop_after)
    assert summary.stopped
    assert summary.left == 6 - len(first.made)
    _, second = draw(manifest, tmp_path / "job", tiny_model)
    assert sorted(first.made + second.made) == list(range(1, 7))
    check_whole(tmp_path / "job", 6)
    assert pixels(tmp_path / "job") == pixels(tmp_path / "whole")


def test_a_finished_job_opens_no_pool(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model)
    job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model)})
    summary = run_job(job, lambda _: pytest.fail("a pool was opened"), Quiet(), lambda: False)
    assert (summary.left, summary.finished_before, summary.invalid_rows) == (0, 6, 1)
    check_whole(tmp_path / "job", 6)


def test_a_limit_generates_the_first_images_and_a_later_run_the_rest(
    manifest: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """The limit splits a micro-batch of three images, which must not change any of them."""
    draw(manifest, tmp_path / "whole", tiny_model, seed=5)
    summary, progress = draw(manifest, tmp_path / "job", tiny_model, limit=2, seed=5)
    assert (progress.made, summary.left, summary.stopped) == ([1, 2], 0, False)
    _, progress = draw(manifest, tmp_path / "job", tiny_model)
    assert progress.made == [3, 4, 5, 6]
    check_whole(tmp_path / "job", 6)
    assert pixels(tmp_path / "job") == pixels(tmp_path / "whole")


def test_image_files_without_rows_are_adopted(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(manifest, tmp_path / "job", tiny_model)
    before = read_results(tmp_path / "job")
    (tmp_path / "job" / "results.parquet").unlink()
    monkeypatch.setattr(Worker, "generate_and_publish", lambda *_: pytest.fail("an image was generated again"))
    draw(manifest, tmp_path / "job", tiny_model)
    stored = ("index", "sha256", "n_tokens", "precision")
    after = check_whole(tmp_path / "job", 6)
    assert [[row[name] for name in stored] for row in after] == [[row[name] for name in stored] for row in before]
    measured = ("text_s", "denoise_s", "decode_s", "peak_memory_bytes")
    assert all(row[name] is not None for row in before if row["index"] for name in measured)
    assert all(row[name] is None for row in after for name in measured)  # an image file does not contain them


def test_a_foreign_or_truncated_file_is_replaced(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model, seed=5)
    rows = read_results(tmp_path / "job")
    before = pixels(tmp_path / "job")
    (tmp_path / "job" / "results.parquet").unlink()
    truncated, foreign = (tmp_path / "job" / rows[number]["file_name"] for number in (0, 1))
    truncated.write_bytes(truncated.read_bytes()[:200])
    Image.new("RGB", (16, 16)).save(foreign)
    draw(manifest, tmp_path / "job", tiny_model)
    check_whole(tmp_path / "job", 6)
    assert pixels(tmp_path / "job") == before


class InvalidRowsRecorder(Quiet):
    def report_start(self, total: int, finished: int, invalid: InvalidRows) -> None:
        self.invalid = [(row.number, row.reason) for row in invalid.first]


def test_a_resumed_job_reports_invalid_rows_without_reading_the_manifest_again(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invalid_rows: list[list[tuple[int, str]]] = []
    for limit in (2, 4, None):
        job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model)})
        assert job.needs_snapshot == (not invalid_rows)
        progress = InvalidRowsRecorder()
        run_job(job, lambda _: InlinePool(setup_for(job)), progress, lambda: False, limit)  # noqa: B023 - called here
        invalid_rows.append(progress.invalid)
    assert invalid_rows[0] == invalid_rows[1] == invalid_rows[2]
    assert "column seed = 'oops'" in invalid_rows[0][0][1]
    rows = check_whole(tmp_path / "job", 6)
    assert [row["row"] for row in rows if row["status"] == "invalid"] == [3]
    assert [row["note"] for row in rows] == ["a", "a", "a", "b", "c", "d", "d"]


def test_invalid_rows_that_a_killed_run_did_not_record_are_found_again(
    manifest: Path, tmp_path: Path, tiny_model: Path
) -> None:
    draw(manifest, tmp_path / "job", tiny_model, limit=1, seed=100)
    (tmp_path / "job" / "results.parquet").unlink()
    draw(manifest, tmp_path / "job", tiny_model)
    rows = check_whole(tmp_path / "job", 6)
    assert [row["row"] for row in rows if row["status"] == "invalid"] == [3]


def test_strict_applies_to_a_resumed_job(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model, limit=1)
    with pytest.raises(ManifestError, match="unknown column 'note'"):
        draw(manifest, tmp_path / "job", tiny_model, strict=True)


def test_the_same_bytes_in_another_format_are_another_job(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model, limit=1)
    with pytest.raises(JobMismatchError, match="this job belongs to the manifest"):
        draw(manifest.rename(tmp_path / "m.txt"), tmp_path / "job", tiny_model)


def test_other_settings_are_refused_with_the_difference(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model, seed=5)
    for change, message in (
        ({"steps": 9}, "steps: 2 in the job, 9 now"),
        ({"seed": 6}, "seed: 5 in the job, 6 now"),
        ({"sampler": "ddim"}, "sampler: plms in the job, ddim now"),
    ):
        with pytest.raises(JobMismatchError, match=message):
            draw(manifest, tmp_path / "job", tiny_model, **change)


def test_another_model_and_another_manifest_are_refused(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(JobMismatchError, match="the weights differ"):
        draw(manifest, tmp_path / "job", other)
    manifest.write_text(manifest.read_text().replace("owl", "fox"))
    with pytest.raises(JobMismatchError, match="row 4: prompt 'owl' is now 'fox'"):
        draw(manifest, tmp_path / "job", tiny_model)


def test_a_job_that_another_run_started_in_the_meantime_is_refused(
    manifest: Path, tmp_path: Path, tiny_model: Path
) -> None:
    late = open_job(manifest, tmp_path / "job", {"model": str(tiny_model)})
    draw(manifest, tmp_path / "job", tiny_model, seed=2, limit=1)
    with pytest.raises(JobMismatchError, match="another run started this job in the meantime"):
        run_job(late, lambda _: InlinePool(setup_for(late)), Quiet(), lambda: False)


def test_a_folder_with_results_but_no_job_json_is_refused(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model)
    (tmp_path / "job" / "job.json").unlink()
    with pytest.raises(JobMismatchError, match=r"holds results but no job\.json"):
        draw(manifest, tmp_path / "job", tiny_model)


def test_a_run_whose_journal_is_deleted_can_be_resumed(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FLUSH_EVERY_S", 0.0)
    job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model)})

    class JournalDeleter(Quiet):
        def report_flush(self) -> None:
            for part in (tmp_path / "job" / "_tinysd" / "journal").iterdir():
                part.unlink()

    with pytest.raises(StorageError, match=r"journal/00000001\.parquet.*: deleted or cut short while the job ran"):
        run_job(job, lambda _: InlinePool(setup_for(job)), JournalDeleter(), lambda: False)
    monkeypatch.setattr(Worker, "generate_and_publish", lambda *_: pytest.fail("an image was generated again"))
    draw(manifest, tmp_path / "job", tiny_model)
    check_whole(tmp_path / "job", 6)


@pytest.mark.parametrize("file_format", [
    "png", pytest.param("jpg", marks=pytest.mark.slow), pytest.param("webp", marks=pytest.mark.slow)
])  # fmt: skip
def test_equal_settings_give_equal_files(manifest: Path, tmp_path: Path, tiny_model: Path, file_format: str) -> None:
    for name in ("first", "second"):
        draw(manifest, tmp_path / name, tiny_model, seed=5, format=file_format)
    first, second = (
        {row["file_name"]: row["sha256"] for row in check_whole(tmp_path / name, 6)} for name in ("first", "second")
    )
    assert first == second
    row = read_results(tmp_path / "first")[0]
    assert all(row[name] is not None for name in ("text_s", "denoise_s", "decode_s", "peak_memory_bytes"))


def test_host_and_folder_names_that_are_not_utf_8(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "node", lambda: "h\udce9st")
    old, new = tmp_path / os.fsdecode(b"alt\xe9"), tmp_path / "new"
    draw(manifest, old, tiny_model, seed=5)
    for _ in range(2):
        job = open_job(manifest, new, {"model": str(tiny_model)}, old)
        run_job(job, lambda _: InlinePool(setup_for(job)), Quiet(), lambda: False)  # noqa: B023 - called here
    rows = [row for row in check_whole(new, 6) if row["index"]]
    assert {row["reused"] for row in rows} == {f"{tmp_path}/alt\\xe9"}
    assert {row["node"] for row in rows} == {"h\\xe9st"}


def test_a_resumed_job_reads_the_prompt_under_the_same_names(tmp_path: Path, tiny_model: Path) -> None:
    """Where one row has a prompt and a caption, and another a caption alone, only the latter is a prompt."""
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"prompt": "a bee", "caption": "x"}\n{"caption": "an owl"}\n')
    draw(manifest, tmp_path / "job", tiny_model, steps=1)
    with manifest.open("a") as file:
        file.write('{"caption": "a panda"}\n')
    draw(manifest, tmp_path / "job", tiny_model, steps=1)
    assert [row["prompt"] for row in check_whole(tmp_path / "job", 3)] == ["a bee", "an owl", "a panda"]
