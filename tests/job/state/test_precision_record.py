"""A job keeps its precision when it is resumed, and all workers on one machine and device use the same one."""

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
    """Treat the small test model as a large one, for which the precision is chosen by the CPU's instructions."""
    monkeypatch.setattr(info, "SMALL_UNET_BYTES", 0)


def set_cpu_flags(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(precision, "read_cpu_flags", lambda: frozenset(flags.split()))


def read_precisions(job: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [row["precision"] for row in pq.read_table(job / "results.parquet").to_pylist()]


def submit(folder: Path, model: Path, rows: int) -> None:
    write_csv(folder / "m.csv", [{"prompt": f"cat {row}"} for row in range(rows)])
    done = run_here("submit", "m.csv", "-o", "job", "--inline", "--model", model, cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("record_state", ["unchanged", "missing", "damaged"])  # missing: 0.1.0 wrote none
def test_a_resumed_job_keeps_its_precision(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, large_models: None, record_state: str
) -> None:
    set_cpu_flags(monkeypatch, "avx2")
    submit(tmp_path, tiny_model, 1)
    record = tmp_path / "job" / "_tinysd" / "precision.json"
    assert json.loads(record.read_text())[machine_device_key(CPU)]["dtype"] == "float32"
    if record_state == "missing":
        record.unlink()
    elif record_state == "damaged":
        record.write_text('{"')
    set_cpu_flags(monkeypatch, "avx2 avx512_bf16")  # stands for a measurement with a different outcome
    submit(tmp_path, tiny_model, 2)
    assert read_precisions(tmp_path / "job") == ["float32", "float32"]
    if record_state != "unchanged":
        return
    planned = run_here("plan", "m.csv", "-o", "job", "--model", tiny_model, cwd=tmp_path).stdout
    assert "Precision      float32: as before in this job: the CPU has no AMX-BF16" in planned
    planned = run_here("plan", "m.csv", "-o", "new", "--model", tiny_model, cwd=tmp_path).stdout
    assert "Precision      bfloat16: the CPU has AVX512-BF16" in planned


def test_another_machine_with_the_same_name_chooses_its_own_precision(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, large_models: None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    set_cpu_flags(monkeypatch, "avx512_bf16")
    submit(tmp_path, tiny_model, 1)
    set_cpu_flags(monkeypatch, "avx2")
    with caplog.at_level(logging.WARNING, "tinysd_batch"):
        submit(tmp_path, tiny_model, 2)
    assert read_precisions(tmp_path / "job") == ["bfloat16", "float32"]
    assert (
        "the job started with bfloat16, which this device does not support well; continuing with float32" in caplog.text
    )
    assert (
        read_precision_record(tmp_path / "job" / "_tinysd" / "precision.json")[machine_device_key(CPU)]["dtype"]
        == "float32"
    )


def test_a_precision_that_the_user_sets_is_not_recorded(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "m.csv").write_text("prompt\ncat\n")
    run_here("submit", "m.csv", "-o", "job", "--inline", "--precision", "full", "--model", tiny_model, cwd=tmp_path)
    assert read_precisions(tmp_path / "job") == ["float32"]
    assert not (tmp_path / "job" / "_tinysd" / "precision.json").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b'{"a": 1}', b'{"KEY": {}}', b'{"KEY": {"dtype": 7, "reason": ""}}',
     b'{"KEY": {"dtype": "load", "reason": ""}}', b'{"KEY": {"dtype": "float64", "reason": "\\ud800"}}'],
)  # fmt: skip
def test_a_damaged_record_is_ignored(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "precision.json"
    file.write_bytes(content.replace(b"KEY", machine_device_key(CPU).encode()))
    choice = choose_recorded_precision(file, CPU, is_small=True)
    assert choice.dtype is torch.float32
    description = {"precision": "float32", "precision_reason": choice.reason, "precision_replaces": choice.replaces}
    assert update_precision_record(file, {**description, "precision_key": machine_device_key(CPU)}) is None
    assert read_precision_record(file)[machine_device_key(CPU)]["dtype"] == "float32"


class KillRecordingPool:
    """A pool whose workers started at the same time and measured differently."""

    def __init__(self) -> None:
        self.killed: list[str] = []

    def kill(self, worker: str, reason: str, fault: FaultType) -> WorkerEvent:
        self.killed.append(f"{worker}: {reason}")
        return WorkerLost(worker, reason, fault)


def test_workers_on_one_machine_use_the_same_precision(tmp_path: Path) -> None:
    pool = KillRecordingPool()
    job: Any = SimpleNamespace(
        settings=SimpleNamespace(precision="auto"), precision_file=tmp_path / "precision.json", folder=tmp_path
    )
    progress: Any = SimpleNamespace(report_worker=lambda _: None)
    writer: Any = SimpleNamespace(guard=nullcontext)
    batches: Iterator[Any] = iter(())
    dispatcher = Dispatcher(job, pool, writer, progress, SimpleNamespace(), batches)  # type: ignore[arg-type]
    for worker, dtype in (("gpu-0", "float16"), ("gpu-1", "float32"), ("gpu-2", "float16")):
        description = {"precision": dtype, "precision_reason": "measured", "precision_replaces": None}
        dispatcher.handle_events([WorkerReady(worker, {**description, "precision_key": "box/GPU"})])
    assert pool.killed == ["gpu-1: chose float32, but the job uses float16 on box/GPU"]
