"""Which workers the driver accepts."""

from pathlib import Path
from typing import Any

import pytest

import tinysd_batch
from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job.ray_workers import handshake


def describe_worker(**change: Any) -> dict[str, Any]:
    description = {"node": "rig", "version": tinysd_batch.__version__, "model_digest": "ab", "shares_storage": True}
    return description | change


def test_a_worker_with_the_same_storage_model_and_version_is_accepted(tmp_path: Path) -> None:
    token = handshake.write_driver_file(tmp_path)
    assert handshake.answer_driver_file(tmp_path, token, "gpu-0")
    handshake.check_worker(describe_worker(), tmp_path, token, "gpu-0", "ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0"}, "rig runs tinysd-batch 0.0, and this machine"),
        ({"model_digest": "cd"}, "the model on rig has other weights"),
        ({"shares_storage": False}, "rig does not see the job's folder"),
    ],
)
def test_a_different_worker_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    token = handshake.write_driver_file(tmp_path)
    handshake.answer_driver_file(tmp_path, token, "gpu-0")
    with pytest.raises(NoWorkerError, match=message):
        handshake.check_worker(describe_worker(**change), tmp_path, token, "gpu-0", "ab")


def test_a_path_that_is_local_to_each_machine_is_detected(tmp_path: Path) -> None:
    """The worker sees another folder under the same path, which is empty or of an earlier run, or cannot write."""
    driver_scratch, worker_scratch = tmp_path / "driver", tmp_path / "worker"
    token = handshake.write_driver_file(driver_scratch)
    handshake.write_driver_file(worker_scratch)
    assert not handshake.answer_driver_file(worker_scratch, token, "gpu-0")
    assert not handshake.answer_driver_file(tmp_path / "nowhere", token, "gpu-0")
    with pytest.raises(NoWorkerError, match="put the job on storage that all machines share"):
        handshake.check_worker(describe_worker(), driver_scratch, token, "gpu-0", "ab")
