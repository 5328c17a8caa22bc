"""What each kind of failure means, and what a worker makes of it."""

import errno
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from tests.support.files import write_csv
from tests.support.jobs import check_whole, draw, setup_for
from tinysd_batch.config import Settings
from tinysd_batch.errors import BrokenWorkerError, NotFiniteError, StorageError, UsageError
from tinysd_batch.job.plan.batches import cut_batches, plan_images
from tinysd_batch.job.ray_workers.slots import WorkerSlot
from tinysd_batch.job.ray_workers.worker_process import WorkerProcess
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.faults import (
    FAULT_POLICIES,
    CountsAgainst,
    FaultAction,
    FaultType,
    classify_error,
    classify_worker_loss,
    get_error_class,
)
from tinysd_batch.job.workers.oom_fallback import OOM_FALLBACKS, MemoryLimits, split_evenly
from tinysd_batch.model import pipeline
from tinysd_batch.model.nn import unet
from tinysd_batch.records import Status
from tinysd_batch.storage import atomic


def from_os(number: int) -> StorageError:
    try:
        raise StorageError("x") from OSError(number, os.strerror(number))
    except StorageError as error:
        return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), FaultType.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), FaultType.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), FaultType.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), FaultType.OUT_OF_MEMORY),
        (RuntimeError("GET was unable to find an engine to execute this computation"), FaultType.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `x`"), FaultType.OUT_OF_MEMORY),
        (MemoryError(), FaultType.OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), FaultType.DEVICE_BROKEN),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), FaultType.DEVICE_BROKEN),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), FaultType.DEVICE_BROKEN),
        (RuntimeError("CUDA error: unspecified launch failure"), FaultType.DEVICE_BROKEN),
        (NotFiniteError("the latents are not finite"), FaultType.NOT_FINITE),
        (UsageError("weights sum to zero"), FaultType.REFUSED),
        (from_os(errno.ENOSPC), FaultType.STORAGE),
        (from_os(errno.EROFS), FaultType.STORAGE),
        (from_os(errno.EIO), FaultType.TRANSIENT_IO),
        (from_os(errno.ESTALE), FaultType.TRANSIENT_IO),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), FaultType.ERROR),
        (ValueError("x"), FaultType.ERROR),
    ],
)  # fmt: skip
def test_what_an_exception_means(error: Exception, fault: FaultType) -> None:
    assert classify_error(error) is fault


def test_real_lack_of_memory_is_known_as_such() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**61, dtype=torch.uint8)
    assert get_error_class(caught.value) == "out_of_memory"
    assert get_error_class(RuntimeError("x")) == "RuntimeError"


@pytest.mark.parametrize(
    ("error", "node_is_dead", "fault"),
    [
        (ray.exceptions.ActorDiedError(), False, FaultType.WORKER_DIED),
        (ray.exceptions.ActorDiedError(), True, FaultType.NODE_LOST),
        (ray.exceptions.ActorUnavailableError("gone", b"0" * 16), False, FaultType.NODE_LOST),
        (ray.exceptions.NodeDiedError("gone"), False, FaultType.NODE_LOST),
        (ray.exceptions.OutOfMemoryError("memory monitor"), False, FaultType.HOST_OUT_OF_MEMORY),
        (ray.exceptions.RaySystemError(RuntimeError("x")), False, FaultType.WORKER_DIED),
    ],
)
def test_what_the_loss_of_a_worker_means(error: Exception, node_is_dead: bool, fault: FaultType) -> None:
    assert classify_worker_loss(error, node_is_dead) is fault


def test_every_fault_has_a_policy_and_only_suspects_and_failures_are_charged_to_images() -> None:
    assert set(FAULT_POLICIES) == set(FaultType)
    for policy in FAULT_POLICIES.values():
        assert (policy.counts_against is CountsAgainst.IMAGE) == (
            policy.action in (FaultAction.FAIL, FaultAction.SUSPECT)
        )


def test_pieces_are_as_equal_as_may_be() -> None:
    images: Any = list(range(7))
    assert [len(part) for part in split_evenly(images, 3)] == [2, 2, 3]
    assert [list(part) for part in split_evenly(images, None)] == [images]
    assert [image for part in split_evenly(images, 2) for image in part] == images


QUICK: dict[str, Any] = {"steps": 1, "sampler": "ddim"}  # one call of the UNet for an image


def too_large_above(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the card hold so many rows in the UNet at once. Returns the sizes that were too large, as they come."""
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
def test_a_small_card_goes_down_the_ladder_once_for_each_shape(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, rows: int, refused: list[int],
    degraded: list[list[str]],
) -> None:  # fmt: skip
    draw(manifest, tmp_path / "large", tiny_model, seed=1, **QUICK)
    with monkeypatch.context() as card:
        found = too_large_above(rows, card)
        summary, _ = draw(manifest, tmp_path / "small", tiny_model, seed=1, **QUICK)
    assert summary.counts[Status.OK] == 8
    assert found == refused  # the second row's batch knows the limit of the first's
    small = check_whole(tmp_path / "small", 8)
    assert [row["degraded"] for row in small] == degraded
    for one, other in zip(small, check_whole(tmp_path / "large", 8), strict=True):
        pixels = [
            np.asarray(Image.open(tmp_path / job / row["file_name"])).astype(int)
            for job, row in (("small", one), ("large", other))
        ]
        assert abs(pixels[0] - pixels[1]).max() <= 1


def test_what_no_saving_helps_is_named_and_costs_itself(
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


def test_a_broken_device_fails_no_image(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process nobody takes over: the job stops and goes on later."""

    original = unet.encode_half

    def assertion(*inputs: Any) -> Any:
        if inputs[1].is_meta:  # the model learns the order of its layers
            return original(*inputs)
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore")

    with monkeypatch.context() as card:
        card.setattr(unet, "encode_half", assertion)
        with pytest.raises(BrokenWorkerError, match="device-side assert triggered"):
            draw(manifest, tmp_path / "job", tiny_model)
    draw(manifest, tmp_path / "job", tiny_model)
    assert all(row["status"] == "ok" for row in check_whole(tmp_path / "job", 8))


@pytest.mark.parametrize(("faults", "raises"), [(3, False), (99, True)])
def test_what_may_pass_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: int, raises: bool
) -> None:
    waited: list[float] = []
    left = iter(range(faults))
    original: Callable[[int], None] = os.fsync

    def fsync(handle: int) -> None:
        if next(left, None) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(handle)

    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(os, "fsync", fsync)
    if raises:
        with pytest.raises(StorageError, match="Input/output error"):
            atomic.publish(b"x", tmp_path / "x", tmp_path / "tmp", lambda _: False)
        assert len(waited) == 5
    else:
        atomic.publish(b"x", tmp_path / "x", tmp_path / "tmp", lambda _: False)
        assert (tmp_path / "x").read_bytes() == b"x"
        assert len(waited) == 3
    assert not list((tmp_path / "tmp").iterdir())


def test_a_full_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        atomic.publish(b"x", tmp_path / "x", tmp_path / "tmp", lambda _: False)


def test_every_saving_is_known_to_the_model_and_changes_no_picture(tiny_model: Path) -> None:
    model = pipeline.TinySD.from_pretrained(tiny_model, device="cpu")

    def pixels() -> Any:
        return np.asarray(model.generate("fox", seed=1).images[0]).astype(int)

    plain = pixels()
    for saving in OOM_FALLBACKS:
        assert saving.is_applicable(model)
        with MemoryLimits(fallbacks=[saving]).apply(model):
            assert not saving.is_applicable(model)
            assert abs(pixels() - plain).max() <= 1
        assert saving.is_applicable(model)


def test_a_model_that_knows_no_saving_is_left_as_it_is() -> None:
    limit = MemoryLimits()
    assert limit.next_fallback(2, object())
    assert not limit.next_fallback(1, object())
    assert (limit.max_batch, limit.fallback_names()) == (1, [])


def test_what_a_card_cannot_hold_is_known_to_the_process_that_follows(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the driver, which keeps it for the card."""
    found = too_large_above(4, monkeypatch)
    job = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model), seed=1))
    first, second = (list(cut_batches(plan_images([row], job.shared_settings()), ())) for row in job.read_rows())
    slot = WorkerSlot("gpu-0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which a process of a worker sets for itself
    for batches, refused in ((first, [8]), (second, [8])):
        process = WorkerProcess(setup_for(job), slot.name)
        process.memory_limits.update(pickle.loads(pickle.dumps(slot.memory_limits)))
        (parcel,) = process.run_chunk(batches)
        slot.record_results(pickle.loads(pickle.dumps(parcel)).memory_limits)
        assert found == refused
        assert all(result.degraded == ["batch_halved"] for made in parcel.micro_batches for result in made.results)
