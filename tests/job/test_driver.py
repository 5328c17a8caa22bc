"""Whole jobs, in this process, on a real (tiny) model."""

import json
import shutil
from collections.abc import Container
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.tools import Quiet, check_whole, draw, read_results, setup_for, write_csv
from tinysd_batch.config import Settings
from tinysd_batch.errors import JobMismatchError, ManifestError, NoWorkerError, StorageError, UsageError
from tinysd_batch.job.dispatch import Dispatch
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.folder import open_job
from tinysd_batch.job.pool import BatchDone, ChunkDone, Event, InlinePool, WorkerLost
from tinysd_batch.job.worker import Worker, WorkerSetup
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "m.csv", [
        {"prompt": "red apple", "seed": 7, "n_samples": 3, "note": "a"},
        {"prompt": "cat", "seed": "", "n_samples": "", "note": "b"},
        {"prompt": "dog", "seed": "oops", "n_samples": 2, "note": "c"},
        {"prompt": "owl", "seed": 9, "n_samples": 2, "note": "d"},
    ])  # fmt: skip


def pixels(job: Path) -> dict[int, bytes]:
    return {row["index"]: Image.open(job / row["file_name"]).tobytes() for row in read_results(job) if row["index"]}


def test_a_job_makes_every_image_and_tells_of_bad_rows(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    summary, _ = draw(manifest, tmp_path / "job", tiny_model, seed=100)
    assert (summary.counts[Status.OK], summary.invalid_rows, summary.left, summary.stopped) == (6, 1, 0, False)
    rows = check_whole(tmp_path / "job", 6)
    assert [row["seed"] for row in rows if row["index"]] == [7, 8, 9, 103, 9, 10]
    assert [row["note"] for row in rows] == ["a", "a", "a", "b", "c", "d", "d"]
    (bad,) = (row for row in rows if row["status"] == "invalid")
    assert (bad["row"], bad["prompt"]) == (3, "dog")
    assert "column seed = 'oops'" in bad["error_message"]
    first = rows[0]
    assert first["n_tokens"] == 2
    assert first["precision"] == "float32"
    assert first["finished_at"] >= first["started_at"]


def test_the_results_have_every_unknown_key_of_a_jsonl(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"prompt": "cat", "z": [1]}\n{"Text": "dog", "a": 2, "status": "x"}\n{"prompt": "", "b": true}\n')
    draw(path, tmp_path / "job", tiny_model)
    rows = check_whole(tmp_path / "job", 2)
    assert [list(row.values())[-4:] for row in rows] == [
        ["[1]", None, None, None], [None, "2", "x", None], [None, None, None, "true"],
    ]  # fmt: skip
    assert list(rows[0])[-4:] == ["z", "a", "manifest_status", "b"]
    with pytest.raises(JobMismatchError, match="strict: False in the job, True now"):
        draw(path, tmp_path / "job", tiny_model, strict=True)


def test_the_same_bytes_in_another_format_are_another_job(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model, limit=1)
    with pytest.raises(JobMismatchError, match="this job belongs to the manifest"):
        draw(manifest.rename(tmp_path / "m.txt"), tmp_path / "job", tiny_model)


def test_too_many_different_keys_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"prompt": "cat", "key {number}": 1}}\n' for number in range(501)))
    with pytest.raises(ManifestError, match="over 500 different keys"):
        draw(path, tmp_path / "job", tiny_model)


def test_numbers_and_odd_types_of_a_parquet_file_reach_the_results(tmp_path: Path, tiny_model: Path) -> None:
    kinds = {
        "half": pa.array([1.5], pa.float16()),
        "tag": pa.array([3]).dictionary_encode(),
        "when": pa.array([1], pa.timestamp("ns")),
        "raw": pa.array([b"\xffa"]),
        "price": pa.array([Decimal("1.50")]),
        "nested": pa.array([{"a": [1, None]}]),
    }
    pq.write_table(pa.table({"prompt": ["cat"], **kinds}), tmp_path / "m.parquet")
    draw(tmp_path / "m.parquet", tmp_path / "job", tiny_model)
    (row,) = check_whole(tmp_path / "job", 1)
    assert [row[name] for name in kinds] == [
        1.5, 3, "1970-01-01 00:00:00.000000001", "\\xffa", "1.50", '{"a": [1, null]}',
    ]  # fmt: skip


def test_the_picture_carries_its_settings(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model)
    row = read_results(tmp_path / "job")[0]
    with Image.open(tmp_path / "job" / row["file_name"]) as image:
        text = image.text  # type: ignore[attr-defined]
    assert "Steps: 2, Sampler: PLMS, CFG scale: 2.0, Seed: 7, Size: 16x16" in text["parameters"]
    assert json.loads(text["tinysd"])["image_id"] == row["image_id"]


@pytest.mark.parametrize("stop_after", [1, 4])
def test_stopped_and_resumed_equals_uninterrupted(
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
    job = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model)))
    summary = run_job(job, lambda _: pytest.fail("a pool was opened"), Quiet(), lambda: False)
    assert (summary.left, summary.finished_before, summary.invalid_rows) == (0, 6, 1)
    check_whole(tmp_path / "job", 6)


def test_a_limit_makes_the_first_images_and_the_rest_follows(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    """The limit cuts through a batch of three, whose images must come out as if it had not."""
    draw(manifest, tmp_path / "whole", tiny_model, seed=5)
    summary, progress = draw(manifest, tmp_path / "job", tiny_model, limit=2, seed=5)
    assert (progress.made, summary.left, summary.stopped) == ([1, 2], 0, False)
    _, progress = draw(manifest, tmp_path / "job", tiny_model)
    assert progress.made == [3, 4, 5, 6]
    check_whole(tmp_path / "job", 6)
    assert pixels(tmp_path / "job") == pixels(tmp_path / "whole")


def test_files_without_rows_are_adopted_not_redrawn(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(manifest, tmp_path / "job", tiny_model)
    before = read_results(tmp_path / "job")
    (tmp_path / "job" / "results.parquet").unlink()
    monkeypatch.setattr(Worker, "try_to_make", lambda *_: pytest.fail("an image was drawn again"))
    draw(manifest, tmp_path / "job", tiny_model)
    kept = ("index", "sha256", "n_tokens", "precision", "denoise_s")
    assert [[row[name] for name in kept] for row in check_whole(tmp_path / "job", 6)] == [
        [row[name] for name in kept] for row in before
    ]


def test_a_foreign_or_torn_file_is_replaced(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model, seed=5)
    rows = read_results(tmp_path / "job")
    before = pixels(tmp_path / "job")
    (tmp_path / "job" / "results.parquet").unlink()
    torn, foreign = (tmp_path / "job" / rows[number]["file_name"] for number in (0, 1))
    torn.write_bytes(torn.read_bytes()[:200])
    Image.new("RGB", (16, 16)).save(foreign)
    draw(manifest, tmp_path / "job", tiny_model)
    check_whole(tmp_path / "job", 6)
    assert pixels(tmp_path / "job") == before


def test_an_image_that_fails_costs_only_itself(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Worker.try_to_make

    def poisoned(self: Worker, images: Any, wanted: Any) -> list[ImageResult]:
        if any(image.seed == 8 for image in images):
            raise RuntimeError("this seed is cursed\nand more")
        return original(self, images, wanted)

    monkeypatch.setattr(Worker, "try_to_make", poisoned)
    summary, _ = draw(manifest, tmp_path / "job", tiny_model)
    assert (summary.counts[Status.OK], summary.failed) == (5, 1)
    rows = {row["index"]: row for row in check_whole(tmp_path / "job", 6) if row["index"]}
    assert (rows[2]["status"], rows[2]["error_class"], rows[2]["error_message"]) == (
        "failed",
        "RuntimeError",
        "this seed is cursed",
    )
    assert rows[1]["degraded"] == ["batch_split"]


def test_a_full_disk_stops_the_job_and_keeps_what_is_done(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Worker.publish

    def full(self: Worker, request: ImageRequest, *rest: Any) -> ImageResult:
        if request.index == 5:
            raise StorageError("disk full")
        return original(self, request, *rest)

    with monkeypatch.context() as fault:
        fault.setattr(Worker, "publish", full)
        with pytest.raises(StorageError):
            draw(manifest, tmp_path / "job", tiny_model)
    assert sorted(row["index"] for row in read_results(tmp_path / "job") if row["index"]) == [1, 2, 3, 4]
    draw(manifest, tmp_path / "job", tiny_model)
    check_whole(tmp_path / "job", 6)


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


def test_job_folders_that_cannot_be_used(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "images").symlink_to(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "job.json").write_text("{")
    for name, message in (("file", "is a file"), ("linked", "symbolic link"), ("damaged", "damaged")):
        with pytest.raises(UsageError, match=message):
            draw(manifest, tmp_path / name, tiny_model)


class DyingPool:
    """A real worker behind a pool that loses it whenever it meets a deadly seed."""

    def __init__(self, setup: WorkerSetup, deadly_seeds: Container[int]) -> None:
        self.worker = Worker(setup, "w")
        self.deadly_seeds = deadly_seeds
        self.queue: list[Any] | None = None
        self.losses = 0

    def workers(self) -> list[str]:
        return ["w"]

    def retire(self, worker: str, reason: str) -> None:
        raise NoWorkerError(f"{worker} is retired: {reason}")

    def idle(self) -> list[str]:
        return ["w"] if self.queue is None else []

    def submit(self, worker: str, chunk: Any) -> None:
        self.queue = list(chunk)

    def events(self, timeout_s: float) -> list[Event]:
        if not self.queue:
            self.queue = None
            return [ChunkDone("w")]
        batch = self.queue.pop(0)
        alone = not batch.wanted
        if any(image.seed in self.deadly_seeds and (alone or image.index in batch.wanted) for image in batch.images):
            self.queue = None
            self.losses += 1
            return [WorkerLost("w", "killed")]
        return [BatchDone("w", self.worker.generate_batch(batch))]


def test_an_image_that_kills_three_workers_is_quarantined_and_no_other(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model)))
    pool = DyingPool(setup_for(job), deadly_seeds=[8])
    summary = run_job(job, lambda _: nullcontext(pool), Quiet(), lambda: False)  # type: ignore[arg-type]
    assert (summary.counts[Status.OK], summary.counts[Status.QUARANTINED], summary.left) == (5, 1, 0)
    rows = {row["index"]: row for row in check_whole(tmp_path / "job", 6) if row["index"]}
    assert (rows[2]["status"], rows[2]["attempts"], rows[2]["error_class"]) == ("quarantined", 3, "worker_died")
    assert rows[1]["attempts"] == 2


def test_a_card_on_which_everything_dies_is_retired_and_no_image_blamed(
    manifest: Path, tmp_path: Path, tiny_model: Path
) -> None:
    job = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model)))
    pool = DyingPool(setup_for(job), deadly_seeds=range(2**63))
    with pytest.raises(NoWorkerError, match="lost on good images too, the last time: killed"):
        run_job(job, lambda _: nullcontext(pool), Quiet(), lambda: False)  # type: ignore[arg-type]
    assert pool.losses == 4
    assert [row["status"] for row in read_results(tmp_path / "job")] == ["invalid"]
    draw(manifest, tmp_path / "job", tiny_model)
    assert all(row["status"] == "ok" for row in check_whole(tmp_path / "job", 6) if row["index"])


def test_a_manifest_that_changes_while_the_job_runs_stops_it(tmp_path: Path, tiny_model: Path) -> None:
    manifest = write_csv(tmp_path / "many.csv", [{"prompt": f"p{number}", "steps": 1} for number in range(70)])
    content = manifest.read_bytes()

    class Meddler(Quiet):
        def image(self, request: ImageRequest, result: ImageResult) -> None:
            manifest.write_bytes(content + b"fox,1\n")

    job = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model), sampler="ddim"))
    with pytest.raises(ManifestError, match="changed while the job ran"):
        run_job(job, lambda _: InlinePool(setup_for(job)), Meddler(), lambda: False)
    manifest.write_bytes(content)
    draw(manifest, tmp_path / "job", tiny_model, sampler="ddim")
    check_whole(tmp_path / "job", 70)


def test_a_job_that_another_run_started_meanwhile_is_refused(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    late = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model)))
    draw(manifest, tmp_path / "job", tiny_model, seed=2, limit=1)
    with pytest.raises(JobMismatchError, match="another run started this job meanwhile"):
        run_job(late, lambda _: InlinePool(setup_for(late)), Quiet(), lambda: False)


def test_results_without_their_job_are_refused(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model)
    (tmp_path / "job" / "job.json").unlink()
    with pytest.raises(JobMismatchError, match=r"holds results but no job\.json"):
        draw(manifest, tmp_path / "job", tiny_model)


def test_blank_negative_prompts_mean_the_jobs_own(tmp_path: Path, tiny_model: Path) -> None:
    path = write_csv(tmp_path / "blank.csv", [{"prompt": "cat", "negative_prompt": " "}])
    draw(path, tmp_path / "job", tiny_model, negative_prompt="worm")
    assert read_results(tmp_path / "job")[0]["negative_prompt"] == "worm"


def test_settings_that_contradict_each_other_start_no_job(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    for settings in ({"C": 3}, {"f": 16}, {"negative_prompt": "a:0 b:0"}, {"n_iter": 100_000, "n_samples": 2}):
        with pytest.raises(UsageError):
            draw(manifest, tmp_path / "job", tiny_model, **settings)
    assert not (tmp_path / "job").exists()


@pytest.mark.slow
def test_chunks_grow_with_speed_and_shrink_at_the_end(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path / "many.csv", [{"prompt": f"p{number}"} for number in range(40)])
    job = open_job(path, tmp_path / "many", Settings(model=str(tiny_model)))
    sizes: list[int] = []
    original = Dispatch.submit

    def counted(self: Dispatch, worker: str, chunk: Any) -> None:
        sizes.append(len(chunk))
        original(self, worker, chunk)

    monkeypatch.setattr(Dispatch, "submit", counted)
    run_job(job, lambda _: InlinePool(setup_for(job)), Quiet(), lambda: False)
    assert sizes[0] == 1
    assert max(sizes) > 4
    assert sizes[-1] == 1
    assert pq.read_metadata(tmp_path / "many" / "results.parquet").num_rows == 40


class Told(Quiet):
    def started(self, total: int, finished: int, invalid: list[InvalidRow]) -> None:
        self.invalid = [(row.number, row.reason) for row in invalid]


def test_a_resumed_job_tells_of_its_bad_rows_without_reading_the_manifest_twice(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[tuple[int, str]]] = []
    for limit in (2, 4, None):
        job = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model)))
        assert job.is_surveyed == bool(told)
        progress = Told()
        run_job(job, lambda _: InlinePool(setup_for(job)), progress, lambda: False, limit)  # noqa: B023 - called here
        told.append(progress.invalid)
    assert told[0] == told[1] == told[2]
    assert "column seed = 'oops'" in told[0][0][1]
    rows = check_whole(tmp_path / "job", 6)
    assert [row["row"] for row in rows if row["status"] == "invalid"] == [3]
    assert [row["note"] for row in rows] == ["a", "a", "a", "b", "c", "d", "d"]


def test_bad_rows_that_a_killed_run_did_not_write_down_are_found_again(
    manifest: Path, tmp_path: Path, tiny_model: Path
) -> None:
    draw(manifest, tmp_path / "job", tiny_model, limit=1, seed=100)
    (tmp_path / "job" / "results.parquet").unlink()
    draw(manifest, tmp_path / "job", tiny_model)
    rows = check_whole(tmp_path / "job", 6)
    assert [row["row"] for row in rows if row["status"] == "invalid"] == [3]


def test_strict_is_asked_again_when_a_job_goes_on(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model, limit=1)
    with pytest.raises(ManifestError, match="unknown column 'note'"):
        draw(manifest, tmp_path / "job", tiny_model, strict=True)
