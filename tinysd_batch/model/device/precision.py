"""Which number format to compute in: half precision where it comes out right and is fast.

On a CPU the instruction set decides, since a measurement beside other busy programs says little. Where that is not
known, and on GPUs, float32 and half precision are measured in turn, and the best times of both are compared.
"""

import logging
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysd_batch.errors import UsageError
from tinysd_batch.model.device.cuda_overhead import limit_torch_memory

MIN_SPEEDUP = 1.3  # over float32
TRIALS = 7
GPU_CALLS_PER_TRIAL = 5
PROBE_MEMORY_LIMIT_BYTES = 192 * 2**20  # on a card; its tensors take half of that
TOLERANCE = 0.05  # of the largest value: bfloat16 has 8 bits
CPU_INFO = Path("/proc/cpuinfo")
# Flags of /proc/cpuinfo, by architecture: with one of them a CPU multiplies bfloat16 itself, else oneDNN emulates it.
BFLOAT16_FLAGS = {
    "x86_64": {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16"},
    "aarch64": {"bf16": "the bfloat16 instructions of ARMv8.6"},
}
ONEDNN_ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # keep oneDNN from instructions that the CPU has

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """A number format, and why it was chosen."""

    dtype: torch.dtype
    reason: str
    replaces: str | None = None  # an earlier choice that cannot be computed here

    @property
    def name(self) -> str:
        return dtype_name(self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


Precision = str | torch.dtype | PrecisionChoice | None


def choose_precision(asked: Precision, device: torch.device, *, is_small: bool = False) -> PrecisionChoice:
    """Choose the number format for a model on a device, and log the choice with its reason.

    Args:
        asked: "full" is float32; "autocast" is float16 on GPUs and float32 on CPUs; a type or an earlier choice is
            taken as it is; None is half precision where the device is good at it (float16 on GPUs, bfloat16 on CPUs).
        is_small: the model is too small to gain from half precision on a CPU.

    Raises:
        UsageError: `asked` is none of these.
    """
    choice = resolve_precision(asked, device, is_small)
    logger.info("computing in %s on %s: %s", choice.name, device, choice.reason)
    return choice


def resolve_precision(asked: Precision, device: torch.device, is_small: bool) -> PrecisionChoice:
    if isinstance(asked, PrecisionChoice):
        return asked
    if isinstance(asked, torch.dtype):
        return PrecisionChoice(asked, "given as the dtype")
    if asked not in (None, "full", "autocast"):
        raise UsageError(f"dtype {asked!r}: a torch dtype, full or autocast was expected")
    if asked == "full":
        return PrecisionChoice(torch.float32, "precision full was given")
    if device.type == "cuda":
        return PrecisionChoice(torch.float16, "precision autocast was given") if asked else choose_for_gpu(device)
    if asked == "autocast":
        return PrecisionChoice(torch.float32, "precision autocast was given, and only GPUs have it")
    if is_small:
        return PrecisionChoice(torch.float32, "the model is too small to gain from half precision on a CPU")
    return choose_for_cpu(device)


def choose_for_cpu(device: torch.device) -> PrecisionChoice:
    """bfloat16 where the CPU computes it itself, by its instruction set; by measurement where that is not known."""
    return choose_by_cpu_flags(platform.machine(), read_cpu_flags()) or choose_by_measurement(device, torch.bfloat16)


def choose_by_cpu_flags(machine: str, flags: frozenset[str]) -> PrecisionChoice | None:
    """The choice for a CPU with these flags; None where they do not tell what oneDNN can use."""
    known = BFLOAT16_FLAGS.get(machine.lower().replace("amd64", "x86_64"))
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[no-untyped-call]
    if known is None or not flags or not has_onednn or any(os.environ.get(limit) for limit in ONEDNN_ISA_VARIABLES):
        return None
    found = next((name for flag, name in known.items() if flag in flags), None)
    if found is not None:
        return PrecisionChoice(torch.bfloat16, f"the CPU has {found}")
    return PrecisionChoice(torch.float32, f"the CPU has no {' or '.join(known.values())}, and would emulate bfloat16")


@cache
def read_cpu_flags(path: Path = CPU_INFO) -> frozenset[str]:
    """The instruction sets that Linux names, those that all cores have; empty where it names none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return frozenset()
    cores = [set(line.split()) for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)]
    return frozenset(set.intersection(*cores)) if cores else frozenset()


def choose_for_gpu(device: torch.device) -> PrecisionChoice:
    """GTX 16xx cards are known to fail on some float16 convolutions, whatever a probe says; others are measured."""
    if re.search(r"GTX 16\d\d", torch.cuda.get_device_name(device)):
        return PrecisionChoice(torch.float32, "GTX 16xx GPUs compute some float16 convolutions wrongly")
    return choose_by_measurement(device, torch.float16)


def choose_by_measurement(device: torch.device, half: torch.dtype) -> PrecisionChoice:
    found = probe_half_precision(device, half)
    if not found.is_accurate:
        return PrecisionChoice(torch.float32, f"{dtype_name(half)} gives wrong results on a convolution here")
    how = f"{dtype_name(half)} is {found.speedup:.1f} times as fast as float32 on a convolution"
    if found.speedup < MIN_SPEEDUP:
        return PrecisionChoice(torch.float32, how)
    return PrecisionChoice(half, how)


def can_use_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a format that was chosen earlier can be used on this device, at a useful speed."""
    if dtype is torch.float32:
        return True
    if device.type == "cuda":
        return dtype is torch.float16
    now = choose_by_cpu_flags(platform.machine(), read_cpu_flags())
    return dtype is torch.bfloat16 and (now is None or now.dtype is dtype)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How a number format did on a layer like the UNet's."""

    is_accurate: bool  # finite, and close to float32's result
    speedup: float  # over float32


@cache
def probe_half_precision(device: torch.device, half: torch.dtype) -> ProbeResult:
    """Compute a 3x3 convolution in float32 and in `half`.

    On GPUs a large one, so that launching it does not count; on CPUs a small one, since emulation takes very long.
    """
    if device.type == "cuda":  # before any budget is known: libraries must not take what they would like
        most = torch.cuda.memory_reserved(device) + PROBE_MEMORY_LIMIT_BYTES
        with limit_torch_memory(most, device):
            found = probe_convolution(device, half, 320, 128)
        torch.cuda.empty_cache()
        return found
    return probe_convolution(device, half, 128, 16)


def probe_convolution(device: torch.device, half: torch.dtype, channels: int, side: int) -> ProbeResult:
    """Compare the convolution in both formats, on a map of so many channels and pixels a side."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=generator).to(device)
    # Divided so that the result spreads as x does.
    weight = (torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5).to(device)
    half_x, half_weight = x.to(half), weight.to(half)
    in_full: TensorFunction = lambda: F.conv2d(x, weight, padding=1)  # noqa: E731
    in_half: TensorFunction = lambda: F.conv2d(half_x, half_weight, padding=1)  # noqa: E731
    expected, found = in_full(), in_half()  # the first calls, in which libraries choose their algorithms, do not count
    error = (found.float() - expected).abs().max() / expected.abs().max()
    full_s, half_s = measure_best_times((in_full, in_half), device)
    return ProbeResult(bool(error < TOLERANCE), full_s / half_s)  # NaN is not below anything


TensorFunction = Callable[[], Tensor]


def measure_best_times(works: tuple[TensorFunction, ...], device: torch.device) -> list[float]:
    """The shortest time of each, in trials that alternate: other programs can only lengthen some of them."""
    trials = [[measure_call_s(work, device) for work in works] for _ in range(TRIALS)]
    return [min(times) for times in zip(*trials, strict=True)]


def measure_call_s(work: TensorFunction, device: torch.device) -> float:
    """Seconds; on GPUs of several calls in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(GPU_CALLS_PER_TRIAL if device.type == "cuda" else 1):
        work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
