"""How failures are classified, and what a worker does about them."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.support.files import write_csv
from tests.support.jobs import check_whole, draw
from tinysd_batch.errors import BrokenWorkerError, NotFiniteError, StorageError, UsageError
from tinysd_batch.job.workers.faults import (
    FAULT_POLICIES,
    CountsAgainst,
    FaultAction,
    FaultType,
    classify_error,
    classify_worker_loss,
    get_error_class,
)
from tinysd_batch.model.nn import unet
from tinysd_batch.storage import atomic


def make_storage_error(number: int) -> StorageError:
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
        (make_storage_error(errno.ENOSPC), FaultType.STORAGE),
        (make_storage_error(errno.EROFS), FaultType.STORAGE),
        (make_storage_error(errno.EIO), FaultType.TRANSIENT_IO),
        (make_storage_error(errno.ESTALE), FaultType.TRANSIENT_IO),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), FaultType.ERROR),
        (ValueError("x"), FaultType.ERROR),
    ],
)  # fmt: skip
def test_errors_are_classified(error: Exception, fault: FaultType) -> None:
    assert classify_error(error) is fault


def test_real_out_of_memory_is_recognized() -> None:
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
def test_losses_of_workers_are_classified(error: Exception, node_is_dead: bool, fault: FaultType) -> None:
    assert classify_worker_loss(error, node_is_dead) is fault


def test_every_fault_has_a_policy_and_failures_and_suspects_count_against_images() -> None:
    assert set(FAULT_POLICIES) == set(FaultType)
    for policy in FAULT_POLICIES.values():
        assert (policy.counts_against is CountsAgainst.IMAGE) == (
            policy.action in (FaultAction.FAIL, FaultAction.SUSPECT)
        )


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 4}, {"prompt": "dog", "n_samples": 4}])


def test_a_broken_device_fails_no_image(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inline worker has no replacement: the job stops, and can be resumed."""
    original = unet.encode_half

    def raise_assertion(*inputs: Any) -> Any:
        if inputs[1].is_meta:  # a dry run, in which the model records the order of its layers
            return original(*inputs)
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore")

    with monkeypatch.context() as broken_device:
        broken_device.setattr(unet, "encode_half", raise_assertion)
        with pytest.raises(BrokenWorkerError, match="device-side assert triggered"):
            draw(manifest, tmp_path / "job", tiny_model)
    draw(manifest, tmp_path / "job", tiny_model)
    assert all(row["status"] == "ok" for row in check_whole(tmp_path / "job", 8))


@pytest.mark.parametrize(("errors", "raises"), [(3, False), (99, True)])
def test_transient_errors_are_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: int, raises: bool
) -> None:
    delays: list[float] = []
    remaining = iter(range(errors))
    original: Callable[[int], None] = os.fsync

    def fsync(handle: int) -> None:
        if next(remaining, None) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(handle)

    monkeypatch.setattr(time, "sleep", delays.append)
    monkeypatch.setattr(os, "fsync", fsync)
    if raises:
        with pytest.raises(StorageError, match="Input/output error"):
            atomic.publish(b"x", tmp_path / "x", tmp_path / "tmp", lambda _: False)
        assert len(delays) == 5
    else:
        atomic.publish(b"x", tmp_path / "x", tmp_path / "tmp", lambda _: False)
        assert (tmp_path / "x").read_bytes() == b"x"
        assert len(delays) == 3
    assert not list((tmp_path / "tmp").iterdir())


def test_a_full_disk_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_disk_full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("retried"))
    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(StorageError):
        atomic.publish(b"x", tmp_path / "x", tmp_path / "tmp", lambda _: False)
