"""OOM fallbacks: in which order they are applied, what is remembered, and that they change no image."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.files import write_csv
from tests.support.jobs import check_whole, draw, setup_for
from tinysd_batch.job.plan.batches import cut_batches, plan_images
from tinysd_batch.job.ray_workers.worker_process import WorkerProcess
from tinysd_batch.job.ray_workers.worker_slots import WorkerSlot
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.oom_fallback import OOM_FALLBACKS, MemoryLimits, split_evenly
from tinysd_batch.model.nn import unet
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.records import Status


def test_batches_are_split_evenly() -> None:
    images: Any = list(range(7))
    assert [len(batch) for batch in split_evenly(images, 3)] == [2, 2, 3]
    assert [list(batch) for batch in split_evenly(images, None)] == [images]
    assert [image for batch in split_evenly(images, 2) for image in batch] == images


QUICK: dict[str, Any] = {"steps": 1, "sampler": "ddim"}  # one call of the UNet per image


def limit_unet_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Raise out-of-memory for UNet calls with more rows. Return a list to which the refused sizes are appended."""
    refused: list[int] = []
    original = unet.encode_half

    def encode_half(model: Any, sample: torch.Tensor, *rest: Any) -> Any:
        if len(sample) > rows:
            refused.append(len(sample))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, sample, *rest)

    monkeypatch.setattr(unet, "encode_half", encode_half)
    return refused


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 4}, {"prompt": "dog", "n_samples": 4}])


@pytest.mark.parametrize(
    ("rows", "refused", "degraded"),
    [
        (4, [8], [["batch_halved"]] * 8),
        (1, [8, 4, 2, 2], [["smaller_parts", "unet_rows_one_by_one", "batch_halved"]] * 8),
    ],
)
def test_fallbacks_are_found_once_for_each_shape(
    manifest: Path,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    refused: list[int],
    degraded: list[list[str]],
) -> None:
    draw(manifest, tmp_path / "large", tiny_model, seed=1, **QUICK)
    with monkeypatch.context() as small_device:
        sizes = limit_unet_rows(rows, small_device)
        summary, _ = draw(manifest, tmp_path / "small", tiny_model, seed=1, **QUICK)
    assert summary.counts[Status.OK] == 8
    assert sizes == refused  # the second batch starts with the limits of the first
    small = check_whole(tmp_path / "small", 8)
    assert [row["degraded"] for row in small] == degraded
    for small_row, large_row in zip(small, check_whole(tmp_path / "large", 8), strict=True):
        pixels = [
            np.asarray(Image.open(tmp_path / job / row["file_name"])).astype(int)
            for job, row in (("small", small_row), ("large", large_row))
        ]
        assert abs(pixels[0] - pixels[1]).max() <= 1


def test_an_image_that_no_fallback_makes_fit_fails_alone(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = unet.encode_half

    def encode_half(model: Any, sample: torch.Tensor, *rest: Any) -> Any:
        if sample.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, sample, *rest)

    monkeypatch.setattr(unet, "encode_half", encode_half)
    path = write_csv(tmp_path / "m.csv", [{"prompt": "a", "width": 16}, {"prompt": "b", "width": 32}])
    draw(path, tmp_path / "job", tiny_model, **QUICK)
    good, large = check_whole(tmp_path / "job", 2)
    assert (good["status"], good["degraded"]) == ("ok", [])
    assert (large["status"], large["error_class"]) == ("failed", "out_of_memory")


def test_every_fallback_applies_to_the_model_and_changes_no_image(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu")

    def pixels() -> Any:
        return np.asarray(model.generate("fox", seed=1).images[0]).astype(int)

    expected = pixels()
    for fallback in OOM_FALLBACKS:
        assert fallback.is_applicable(model)
        with MemoryLimits(fallbacks=[fallback]).apply(model):
            assert not fallback.is_applicable(model)
            assert abs(pixels() - expected).max() <= 1
        assert fallback.is_applicable(model)


def test_a_model_without_the_attributes_has_no_fallbacks() -> None:
    limits = MemoryLimits()
    assert limits.next_fallback(2, object())
    assert not limits.next_fallback(1, object())
    assert (limits.max_batch, limits.fallback_names()) == (1, [])


def test_memory_limits_are_passed_to_the_next_actor(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver keeps them in the worker's slot."""
    sizes = limit_unet_rows(4, monkeypatch)
    job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model), "seed": 1})
    first, second = (list(cut_batches(plan_images([row], job.shared_settings()), ())) for row in job.read_rows())
    slot = WorkerSlot("gpu-0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as a worker process sets it
    for batches, refused in ((first, [8]), (second, [8])):
        process = WorkerProcess(setup_for(job), slot.name)
        process.memory_limits.update(pickle.loads(pickle.dumps(slot.memory_limits)))
        (result_batch,) = process.run_chunk(batches)
        slot.record_results(pickle.loads(pickle.dumps(result_batch)).memory_limits)
        assert sizes == refused
        results = [result for batch in result_batch.micro_batches for result in batch.results]
        assert all(result.degraded == ["batch_halved"] for result in results)
