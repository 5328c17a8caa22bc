"""The precision of a job does not change in the middle, and is one on all workers of a machine and device."""

import json
import logging
import platform
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.files import write_csv
from tests.support.program import run_here
from tinysd_batch.job.dispatch.dispatcher import Dispatcher
from tinysd_batch.job.state.precision_record import (
    choose_recorded_precision,
    machine_device_key,
    read_precision_record,
    update_precision_record,
)
from tinysd_batch.job.workers.faults import FaultType
from tinysd_batch.job.workers.pool import WorkerEvent, WorkerLost, WorkerReady
from tinysd_batch.model.checkpoint import info
from tinysd_batch.model.device import precision

CPU = torch.device("cpu")


@pytest.fixture
def large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the small model of the tests for a large one."""
    monkeypatch.setattr(info, "SMALL_UNET_BYTES", 0)


def cpu_with(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(precision, "read_cpu_flags", lambda: frozenset(flags.split()))


def precisions(job: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [row["precision"] for row in pq.read_table(job / "results.parquet").to_pylist()]


def submit(where: Path, model: Path, rows: int) -> None:
    write_csv(where / "m.csv", [{"prompt": f"cat {row}"} for row in range(rows)])
    done = run_here("submit", "m.csv", "-o", "job", "--inline", "--model", model, cwd=where)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("found", ["as it was", "missing", "damaged"])  # missing: begun by 0.1.0
def test_a_resumed_job_keeps_its_precision(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, large_models: None, found: str
) -> None:
    cpu_with(monkeypatch, "avx2")
    submit(tmp_path, tiny_model, 1)
    record = tmp_path / "job" / "_tinysd" / "precision.json"
    assert json.loads(record.read_text())[machine_device_key(CPU)]["dtype"] == "float32"
    if found == "missing":
        record.unlink()
    elif found == "damaged":
        record.write_text('{"')
    cpu_with(monkeypatch, "avx2 avx512_bf16")  # a measurement beside another program would have changed, too
    submit(tmp_path, tiny_model, 2)
    assert precisions(tmp_path / "job") == ["float32", "float32"]
    if found != "as it was":
        return
    planned = run_here("plan", "m.csv", "-o", "job", "--model", tiny_model, cwd=tmp_path).stdout
    assert "Precision      float32: as before in this job: the CPU has no AMX-BF16" in planned
    planned = run_here("plan", "m.csv", "-o", "new", "--model", tiny_model, cwd=tmp_path).stdout
    assert "Precision      bfloat16: the CPU has AVX512-BF16" in planned


def test_another_machine_of_the_same_name_decides_anew(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, large_models: None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cpu_with(monkeypatch, "avx512_bf16")
    submit(tmp_path, tiny_model, 1)
    cpu_with(monkeypatch, "avx2")
    with caplog.at_level(logging.WARNING, "tinysd_batch"):
        submit(tmp_path, tiny_model, 2)
    assert precisions(tmp_path / "job") == ["bfloat16", "float32"]
    assert "the job started with bfloat16, which this device does not support well; continuing with float32" in caplog.text
    assert (
        read_precision_record(tmp_path / "job" / "_tinysd" / "precision.json")[machine_device_key(CPU)]["dtype"]
        == "float32"
    )


def test_a_precision_that_was_asked_for_is_not_recorded(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "m.csv").write_text("prompt\ncat\n")
    run_here("submit", "m.csv", "-o", "job", "--inline", "--precision", "full", "--model", tiny_model, cwd=tmp_path)
    assert precisions(tmp_path / "job") == ["float32"]
    assert not (tmp_path / "job" / "_tinysd" / "precision.json").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b'{"a": 1}', b'{"KEY": {}}', b'{"KEY": {"dtype": 7, "reason": ""}}',
     b'{"KEY": {"dtype": "load", "reason": ""}}', b'{"KEY": {"dtype": "float64", "reason": "\\ud800"}}'],
)  # fmt: skip
def test_a_damaged_record_is_as_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "precision.json"
    file.write_bytes(content.replace(b"KEY", machine_device_key(CPU).encode()))
    choice = choose_recorded_precision(file, CPU, is_small=True)
    assert choice.dtype is torch.float32
    description = {"precision": "float32", "precision_reason": choice.reason, "precision_replaces": choice.replaces}
    assert update_precision_record(file, {**description, "precision_key": machine_device_key(CPU)}) is None
    assert read_precision_record(file)[machine_device_key(CPU)]["dtype"] == "float32"


class TwoWorkers:
    """A pool whose workers measured at once, and differently."""

    def __init__(self) -> None:
        self.killed: list[str] = []

    def kill(self, worker: str, reason: str, fault: FaultType) -> WorkerEvent:
        self.killed.append(f"{worker}: {reason}")
        return WorkerLost(worker, reason, fault)


def test_workers_of_one_machine_compute_alike(tmp_path: Path) -> None:
    pool = TwoWorkers()
    job: Any = SimpleNamespace(
        settings=SimpleNamespace(precision="auto"), precision_file=tmp_path / "precision.json", folder=tmp_path
    )
    quiet: Any = SimpleNamespace(worker=lambda _: None)
    writer: Any = SimpleNamespace(guard=nullcontext)
    batches: Iterator[Any] = iter(())
    dispatch = Dispatcher(job, pool, writer, quiet, SimpleNamespace(), batches)  # type: ignore[arg-type]
    for worker, chosen in (("gpu-0", "float16"), ("gpu-1", "float32"), ("gpu-2", "float16")):
        description = {"precision": chosen, "precision_reason": "measured", "precision_replaces": None}
        dispatch.handle_events([WorkerReady(worker, {**description, "precision_key": "box/GPU"})])
    assert pool.killed == ["gpu-1: chose float32, but the job uses float16 on box/GPU"]
