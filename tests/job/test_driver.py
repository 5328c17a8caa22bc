"""Whole jobs, in this process, on a real (tiny) model."""

import json
import os
from collections.abc import Container
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.files import write_csv
from tests.support.jobs import Quiet, check_whole, draw, read_results, setup_for
from tinysd_batch.errors import JobMismatchError, ManifestError, NoWorkerError, StorageError, UsageError
from tinysd_batch.job.dispatch.dispatcher import Dispatcher
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.pool import BatchDone, ChunkDone, WorkerEvent, WorkerLost
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.model.sampling.batch import ImageOutput
from tinysd_batch.records import ImageRequest, ImageResult, Status


def test_a_job_generates_every_image_and_records_invalid_rows(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    summary, _ = draw(manifest, tmp_path / "job", tiny_model, seed=100)
    assert (summary.counts[Status.OK], summary.invalid_rows, summary.left, summary.stopped) == (6, 1, 0, False)
    rows = check_whole(tmp_path / "job", 6)
    assert [row["seed"] for row in rows if row["index"]] == [7, 8, 9, 103, 9, 10]
    assert [row["note"] for row in rows] == ["a", "a", "a", "b", "c", "d", "d"]
    (invalid,) = (row for row in rows if row["status"] == "invalid")
    assert (invalid["row"], invalid["prompt"]) == (3, "dog")
    assert "column seed = 'oops'" in invalid["error_message"]
    first = rows[0]
    assert first["n_tokens"] == 2
    assert first["precision"] == "float32"
    assert first["finished_at"] >= first["started_at"]


def test_the_results_have_every_unknown_key_of_a_jsonl_manifest(tmp_path: Path, tiny_model: Path) -> None:
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


def test_too_many_different_keys_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"prompt": "cat", "key {number}": 1}}\n' for number in range(501)))
    with pytest.raises(ManifestError, match="over 500 different keys"):
        draw(path, tmp_path / "job", tiny_model)


def test_the_results_keep_numbers_and_unusual_types_of_a_parquet_manifest(tmp_path: Path, tiny_model: Path) -> None:
    typed_columns = {
        "half": pa.array([1.5], pa.float16()),
        "tag": pa.array([3]).dictionary_encode(),
        "when": pa.array([1], pa.timestamp("us")),
        "raw": pa.array([b"\xffa"]),
        "price": pa.array([Decimal("1.50")]),
        "nested": pa.array([{"a": [1, None]}]),
    }
    pq.write_table(pa.table({"prompt": ["cat"], **typed_columns}), tmp_path / "m.parquet")
    draw(tmp_path / "m.parquet", tmp_path / "job", tiny_model)
    (row,) = check_whole(tmp_path / "job", 1)
    assert [row[name] for name in typed_columns] == [
        1.5, 3, "1970-01-01 00:00:00.000001", "\\xffa", Decimal("1.50"), {"a": [1, None]},
    ]  # fmt: skip
    types = pq.read_schema(tmp_path / "job" / "results.parquet")
    assert types.field("when").type == pa.timestamp("us")
    assert types.field("nested").type == typed_columns["nested"].type


def test_an_image_file_contains_its_settings(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    draw(manifest, tmp_path / "job", tiny_model)
    row = read_results(tmp_path / "job")[0]
    with Image.open(tmp_path / "job" / row["file_name"]) as image:
        text = image.text  # type: ignore[attr-defined]
    assert "Steps: 2, Sampler: PLMS, CFG scale: 2.0, Seed: 7, Size: 16x16" in text["parameters"]
    assert json.loads(text["tinysd"])["image_id"] == row["image_id"]


def test_an_image_that_fails_does_not_affect_others(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Worker.generate_and_publish

    def fail_for_one_seed(self: Worker, images: Any, wanted: Any) -> list[ImageResult]:
        if any(image.seed == 8 for image in images):
            raise RuntimeError("this seed fails\nand more")
        return original(self, images, wanted)

    monkeypatch.setattr(Worker, "generate_and_publish", fail_for_one_seed)
    summary, _ = draw(manifest, tmp_path / "job", tiny_model)
    assert (summary.counts[Status.OK], summary.failed) == (5, 1)
    rows = {row["index"]: row for row in check_whole(tmp_path / "job", 6) if row["index"]}
    assert (rows[2]["status"], rows[2]["error_class"], rows[2]["error_message"]) == (
        "failed",
        "RuntimeError",
        "this seed fails",
    )
    assert rows[1]["degraded"] == ["batch_split"]


def test_a_full_disk_stops_the_job_and_keeps_finished_images(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Worker.publish

    def full(self: Worker, output: ImageOutput, *rest: Any) -> ImageResult:
        if output.request.index == 5:
            raise StorageError("disk full")
        return original(self, output, *rest)

    with monkeypatch.context() as fault:
        fault.setattr(Worker, "publish", full)
        with pytest.raises(StorageError):
            draw(manifest, tmp_path / "job", tiny_model)
    assert sorted(row["index"] for row in read_results(tmp_path / "job") if row["index"]) == [1, 2, 3, 4]
    draw(manifest, tmp_path / "job", tiny_model)
    check_whole(tmp_path / "job", 6)


def test_unusable_job_folders_are_refused(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "images").symlink_to(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "job.json").write_text("{")
    for name, message in (("file", "is a file"), ("linked", "symbolic link"), ("damaged", "damaged")):
        with pytest.raises(UsageError, match=message):
            draw(manifest, tmp_path / name, tiny_model)


class DyingPool:
    """A pool with a real worker, which it reports as lost whenever a batch has a deadly seed."""

    def __init__(self, setup: WorkerSetup, deadly_seeds: Container[int]) -> None:
        self.worker = Worker(setup, "w")
        self.deadly_seeds = deadly_seeds
        self.queue: list[Any] | None = None
        self.losses = 0

    def workers(self) -> list[str]:
        return ["w"]

    def retire(self, worker: str, reason: str) -> None:
        raise NoWorkerError(f"{worker} is retired: {reason}")

    def idle_workers(self) -> list[str]:
        return ["w"] if self.queue is None else []

    def submit(self, worker: str, chunk: Any) -> None:
        self.queue = list(chunk)

    def wait_for_events(self, timeout_s: float) -> list[WorkerEvent]:
        if not self.queue:
            self.queue = None
            return [ChunkDone("w")]
        batch = self.queue.pop(0)
        is_probe = not batch.wanted
        if any(image.seed in self.deadly_seeds and (is_probe or image.index in batch.wanted) for image in batch.images):
            self.queue = None
            self.losses += 1
            return [WorkerLost("w", "killed")]
        return [BatchDone("w", self.worker.generate_batch(batch))]


def test_only_an_image_that_kills_three_workers_is_quarantined(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model)})
    pool = DyingPool(setup_for(job), deadly_seeds=[8])
    summary = run_job(job, lambda _: nullcontext(pool), Quiet(), lambda: False)  # type: ignore[arg-type]
    assert (summary.counts[Status.OK], summary.counts[Status.QUARANTINED], summary.left) == (5, 1, 0)
    rows = {row["index"]: row for row in check_whole(tmp_path / "job", 6) if row["index"]}
    assert (rows[2]["status"], rows[2]["attempts"], rows[2]["error_class"]) == ("quarantined", 3, "worker_died")
    assert rows[1]["attempts"] == 2


def test_a_gpu_that_kills_every_worker_is_retired_and_no_image_quarantined(
    manifest: Path, tmp_path: Path, tiny_model: Path
) -> None:
    job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model)})
    pool = DyingPool(setup_for(job), deadly_seeds=range(2**63))
    with pytest.raises(NoWorkerError, match="images known to be good; last time: killed"):
        run_job(job, lambda _: nullcontext(pool), Quiet(), lambda: False)  # type: ignore[arg-type]
    assert pool.losses == 4
    assert [row["status"] for row in read_results(tmp_path / "job")] == ["invalid"]
    draw(manifest, tmp_path / "job", tiny_model)
    assert all(row["status"] == "ok" for row in check_whole(tmp_path / "job", 6) if row["index"])


def test_changing_the_manifest_does_not_affect_a_run(tmp_path: Path, tiny_model: Path) -> None:
    """A run reads rows from the snapshot of the job; the next run finds those that were appended."""
    manifest = write_csv(tmp_path / "many.csv", [{"prompt": f"p{number}", "steps": 1} for number in range(70)])
    content = manifest.read_bytes()

    class ManifestChanger(Quiet):
        def report_image(self, request: ImageRequest, result: ImageResult) -> None:
            manifest.write_bytes(content + b"fox,1\n")

    job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model), "sampler": "ddim"})
    run_job(job, lambda _: InlinePool(setup_for(job)), ManifestChanger(), lambda: False)
    check_whole(tmp_path / "job", 70)
    _, progress = draw(manifest, tmp_path / "job", tiny_model, sampler="ddim")
    assert progress.made == [71]
    check_whole(tmp_path / "job", 71)


def test_generating_in_this_process_does_not_change_its_environment(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "m.csv").write_text("prompt\nfox\n")
    before = dict(os.environ)
    draw(tmp_path / "m.csv", tmp_path / "job", tiny_model, device="cpu")
    assert dict(os.environ) == before


def test_a_blank_negative_prompt_stands_for_that_of_the_job(tmp_path: Path, tiny_model: Path) -> None:
    path = write_csv(tmp_path / "blank.csv", [{"prompt": "cat", "negative_prompt": " "}])
    draw(path, tmp_path / "job", tiny_model, negative_prompt="worm")
    assert read_results(tmp_path / "job")[0]["negative_prompt"] == "worm"


def test_contradicting_settings_leave_no_folder(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    for settings in ({"C": 3}, {"f": 16}, {"negative_prompt": "a:0 b:0"}, {"n_iter": 100_000, "n_samples": 2}):
        with pytest.raises(UsageError):
            draw(manifest, tmp_path / "job", tiny_model, **settings)
    assert not (tmp_path / "job").exists()


@pytest.mark.alone
@pytest.mark.slow
def test_chunks_grow_with_measured_speed_and_shrink_at_the_end(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path / "many.csv", [{"prompt": f"p{number}"} for number in range(40)])
    job = open_job(path, tmp_path / "many", {"model": str(tiny_model)})
    sizes: list[int] = []
    original = Dispatcher.submit_chunk

    def record_chunk_size(self: Dispatcher, worker: str, chunk: Any) -> None:
        sizes.append(len(chunk))
        original(self, worker, chunk)

    monkeypatch.setattr(Dispatcher, "submit_chunk", record_chunk_size)
    run_job(job, lambda _: InlinePool(setup_for(job)), Quiet(), lambda: False)
    assert sizes[0] == 1
    assert max(sizes) > 4
    assert sizes[-1] == 1
    assert pq.read_metadata(tmp_path / "many" / "results.parquet").num_rows == 40
