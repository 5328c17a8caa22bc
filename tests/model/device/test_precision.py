"""Choose the dtype: by instruction set on CPUs, by measurement on GPUs."""

import logging
import platform
import time
from pathlib import Path

import pytest
import torch

from tinysd_batch.errors import UsageError
from tinysd_batch.model.device import precision
from tinysd_batch.model.device.precision import (
    PrecisionChoice,
    ProbeResult,
    can_use_dtype,
    choose_precision,
    measure_best_times,
    read_cpu_flags,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def dtype_of(requested: precision.Precision, device: torch.device, *, is_small: bool = False) -> torch.dtype:
    return choose_precision(requested, device, is_small=is_small).dtype


def test_probe_measures_this_cpu() -> None:
    result = precision.probe_half_precision(CPU, torch.bfloat16)
    assert result.is_accurate
    assert result.speedup > 0


@pytest.mark.parametrize(
    ("name", "result", "expected"),
    [
        ("NVIDIA GeForce RTX 3060", ProbeResult(True, 2.1), torch.float16),
        ("NVIDIA GeForce GTX 1060 6GB", ProbeResult(True, 0.1), torch.float32),  # accurate, but slow
        ("NVIDIA GeForce GTX 1650", ProbeResult(True, 1.9), torch.float32),  # known to fail elsewhere
        ("a GPU with broken convolutions", ProbeResult(False, 2.0), torch.float32),
    ],
)
def test_gpus_use_half_precision_only_if_it_is_accurate_and_fast(
    monkeypatch: pytest.MonkeyPatch, name: str, result: ProbeResult, expected: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "probe_half_precision", lambda *_: result)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert dtype_of(None, GPU) is expected
    assert dtype_of("autocast", GPU) is torch.float16
    assert dtype_of("full", GPU) is torch.float32


@pytest.mark.parametrize(
    ("machine", "flags", "expected", "reason"),
    [
        ("x86_64", "avx2 avx512f avx512_bf16 amx_tile amx_bf16", torch.bfloat16, "the CPU has AMX-BF16"),
        ("x86_64", "avx2 avx512f avx512_bf16", torch.bfloat16, "the CPU has AVX512-BF16"),
        ("AMD64", "avx2 avx512f avx512_bf16", torch.bfloat16, "the CPU has AVX512-BF16"),
        ("x86_64", "avx2 avx512f avx512_vnni", torch.float32, "has no AMX-BF16 or AVX512-BF16"),
        ("x86_64", "avx2 fma", torch.float32, "would emulate bfloat16"),
        ("aarch64", "fp asimd sve bf16", torch.bfloat16, "the bfloat16 instructions"),
        ("aarch64", "fp asimd", torch.float32, "would emulate"),
    ],
)
def test_instruction_set_decides_on_a_cpu_without_a_measurement(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, expected: torch.dtype, reason: str
) -> None:
    """On a busy machine a measurement chose float32 on CPUs with AMX."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(precision, "read_cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(precision, "probe_half_precision", lambda *_: pytest.fail("was measured"))
    choice = choose_precision(None, CPU)
    assert choice.dtype is expected
    assert reason in choice.reason
    assert dtype_of(None, CPU, is_small=True) is torch.float32
    assert dtype_of("full", CPU) is torch.float32
    assert dtype_of("autocast", CPU) is torch.float32


def test_all_cores_must_have_the_instructions(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nflags\t\t: avx2 avx512_bf16\n\nprocessor\t: 1\nflags\t\t: avx2\nvmx flags\t: ept\n"
    )
    assert read_cpu_flags(info) == {"avx2"}
    assert read_cpu_flags(tmp_path / "none") == frozenset()


@pytest.mark.parametrize(("speedup", "expected"), [(3.0, torch.bfloat16), (0.2, torch.float32)])
@pytest.mark.parametrize(
    ("machine", "flags", "limit"),
    [("arm64", "", ""), ("x86_64", "", ""), ("ppc64le", "altivec", ""), ("x86_64", "avx512_bf16", "AVX2")],
)
def test_unknown_instruction_sets_are_measured(
    monkeypatch: pytest.MonkeyPatch, speedup: float, expected: torch.dtype, machine: str, flags: str, limit: str
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(precision, "read_cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(precision, "probe_half_precision", lambda *_: ProbeResult(True, speedup))
    assert dtype_of(None, CPU) is expected
    assert f"{speedup} times as fast" in choose_precision(None, CPU).reason


def test_best_time_decides_on_a_busy_machine() -> None:
    """A function that is slowed down in all trials but one is judged by that one."""
    calls = 0

    def disturbed() -> torch.Tensor:
        nonlocal calls
        calls += 1
        time.sleep(0.001 if calls == precision.TRIALS else 0.01)
        return torch.zeros(())

    def steady() -> torch.Tensor:
        time.sleep(0.004)
        return torch.zeros(())

    slow, fast = measure_best_times((steady, disturbed), CPU)
    assert slow > fast


def test_choice_and_reason_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tinysd_batch"):
        choose_precision("full", CPU)
    assert "computing in float32 on cpu: precision full was given" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "flags", "expected"),
    [
        (torch.float32, "avx2", True),
        (torch.bfloat16, "avx512_bf16", True),
        (torch.bfloat16, "avx2", False),  # another machine of the same name
        (torch.bfloat16, "", True),
        (torch.float16, "avx512_bf16", False),
    ],
)
def test_earlier_choice_is_kept_if_this_device_supports_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, flags: str, expected: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(precision, "read_cpu_flags", lambda: frozenset(flags.split()))
    assert can_use_dtype(dtype, CPU) is expected


def test_choice_or_dtype_is_used_as_it_is() -> None:
    choice = PrecisionChoice(torch.bfloat16, "as before")
    assert choose_precision(choice, CPU, is_small=True) == choice
    assert dtype_of(torch.float16, CPU) is torch.float16


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="int4"):
        choose_precision("int4", CPU)
