"""Choose the dtype to compute in: half precision where it is accurate and fast.

On a CPU the instruction set decides, because a measurement on a busy machine says little. On GPUs, and where the
instruction set is not known, float32 and half precision are timed alternately and their best times are compared.
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
PROBE_MEMORY_LIMIT_BYTES = 192 * 2**20  # on a GPU; the tensors take half of it
TOLERANCE = 0.05  # relative to the largest value: bfloat16 has 8 bits of precision
CPU_INFO = Path("/proc/cpuinfo")
# Flags of /proc/cpuinfo, by architecture: a CPU with one of them multiplies bfloat16 natively, else oneDNN emulates it.
BFLOAT16_FLAGS = {
    "x86_64": {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16"},
    "aarch64": {"bf16": "the bfloat16 instructions of ARMv8.6"},
}
ONEDNN_ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # limit the instructions that oneDNN uses

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """A dtype and the reason for choosing it."""

    dtype: torch.dtype
    reason: str
    replaces: str | None = None  # dtype of an earlier choice that this device cannot use

    @property
    def name(self) -> str:
        return dtype_name(self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


Precision = str | torch.dtype | PrecisionChoice | None


def choose_precision(requested: Precision, device: torch.device, *, is_small: bool = False) -> PrecisionChoice:
    """Choose the dtype for a model on a device, and log the choice with its reason.

    Args:
        requested: "full" is float32; "autocast" is float16 on GPUs and float32 on CPUs; a dtype or an earlier choice is
            used as it is; None is half precision where the device is good at it (float16 on GPUs, bfloat16 on CPUs).
        device: the device to compute on.
        is_small: the model is too small to gain from half precision on a CPU.

    Raises:
        UsageError: `requested` is none of these.
    """
    choice = resolve_precision(requested, device, is_small)
    logger.info("computing in %s on %s: %s", choice.name, device, choice.reason)
    return choice


def resolve_precision(requested: Precision, device: torch.device, is_small: bool) -> PrecisionChoice:
    if isinstance(requested, PrecisionChoice):
        return requested
    if isinstance(requested, torch.dtype):
        return PrecisionChoice(requested, "given as the dtype")
    if requested not in (None, "full", "autocast"):
        raise UsageError(f"dtype {requested!r}: expected a torch dtype, full or autocast")
    if requested == "full":
        return PrecisionChoice(torch.float32, "precision full was given")
    if device.type == "cuda":
        return PrecisionChoice(torch.float16, "precision autocast was given") if requested else choose_for_gpu(device)
    if requested == "autocast":
        return PrecisionChoice(torch.float32, "precision autocast was given, and only GPUs have it")
    if is_small:
        return PrecisionChoice(torch.float32, "the model is too small to gain from half precision on a CPU")
    return choose_for_cpu(device)


def choose_for_cpu(device: torch.device) -> PrecisionChoice:
    """Choose bfloat16 if the CPU computes it natively, by its instruction set; measure if that is not known."""
    return choose_by_cpu_flags(platform.machine(), read_cpu_flags()) or choose_by_measurement(device, torch.bfloat16)


def choose_by_cpu_flags(machine: str, flags: frozenset[str]) -> PrecisionChoice | None:
    """Choose for a CPU with these flags; None if they do not decide what oneDNN can use."""
    names = BFLOAT16_FLAGS.get(machine.lower().replace("amd64", "x86_64"))
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[no-untyped-call]
    if names is None or not flags or not has_onednn or any(os.environ.get(limit) for limit in ONEDNN_ISA_VARIABLES):
        return None
    extension = next((name for flag, name in names.items() if flag in flags), None)
    if extension is not None:
        return PrecisionChoice(torch.bfloat16, f"the CPU has {extension}")
    return PrecisionChoice(torch.float32, f"the CPU has no {' or '.join(names.values())}, and would emulate bfloat16")


@cache
def read_cpu_flags(path: Path = CPU_INFO) -> frozenset[str]:
    """Read the instruction set flags that all cores have from Linux; empty if there are none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return frozenset()
    cores = [set(line.split()) for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)]
    return frozenset(set.intersection(*cores)) if cores else frozenset()


def choose_for_gpu(device: torch.device) -> PrecisionChoice:
    """Measure, except on GTX 16xx GPUs, which fail on some float16 convolutions even where the probe succeeds."""
    if re.search(r"GTX 16\d\d", torch.cuda.get_device_name(device)):
        return PrecisionChoice(torch.float32, "GTX 16xx GPUs compute some float16 convolutions wrongly")
    return choose_by_measurement(device, torch.float16)


def choose_by_measurement(device: torch.device, half: torch.dtype) -> PrecisionChoice:
    result = probe_half_precision(device, half)
    if not result.is_accurate:
        return PrecisionChoice(torch.float32, f"{dtype_name(half)} gives wrong results on a convolution here")
    reason = f"{dtype_name(half)} is {result.speedup:.1f} times as fast as float32 on a convolution"
    return PrecisionChoice(torch.float32 if result.speedup < MIN_SPEEDUP else half, reason)


def can_use_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this device computes an earlier chosen dtype at a useful speed."""
    if dtype is torch.float32:
        return True
    if device.type == "cuda":
        return dtype is torch.float16
    choice = choose_by_cpu_flags(platform.machine(), read_cpu_flags())
    return dtype is torch.bfloat16 and (choice is None or choice.dtype is dtype)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Accuracy and speed of a dtype on a layer like the UNet's."""

    is_accurate: bool  # finite and close to float32's result
    speedup: float  # over float32


@cache
def probe_half_precision(device: torch.device, half: torch.dtype) -> ProbeResult:
    """Compare a 3x3 convolution in float32 and in `half`.

    Large on GPUs, so that the launch time is negligible; small on CPUs, because emulation is very slow.
    """
    if device.type == "cuda":  # the memory budget is not known yet, so limit the libraries' workspaces
        limit_bytes = torch.cuda.memory_reserved(device) + PROBE_MEMORY_LIMIT_BYTES
        with limit_torch_memory(limit_bytes, device):
            result = probe_convolution(device, half, 320, 128)
        torch.cuda.empty_cache()
        return result
    return probe_convolution(device, half, 128, 16)


def probe_convolution(device: torch.device, half: torch.dtype, channels: int, side: int) -> ProbeResult:
    """Compare the convolution in both dtypes on a feature map [1, channels, side, side]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=generator).to(device)
    # Scaled so that the output has the variance of x.
    weight = (torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5).to(device)
    half_x, half_weight = x.to(half), weight.to(half)
    compute_full: TensorFunction = lambda: F.conv2d(x, weight, padding=1)  # noqa: E731
    compute_half: TensorFunction = lambda: F.conv2d(half_x, half_weight, padding=1)  # noqa: E731
    expected, output = compute_full(), compute_half()  # untimed: libraries choose their algorithms in the first call
    error = (output.float() - expected).abs().max() / expected.abs().max()
    full_s, half_s = measure_best_times((compute_full, compute_half), device)
    return ProbeResult(bool(error < TOLERANCE), full_s / half_s)  # also false for NaN


TensorFunction = Callable[[], Tensor]


def measure_best_times(functions: tuple[TensorFunction, ...], device: torch.device) -> list[float]:
    """Return each function's shortest time in alternating trials: other programs can only lengthen some of them."""
    trials = [[measure_call_s(function, device) for function in functions] for _ in range(TRIALS)]
    return [min(times) for times in zip(*trials, strict=True)]


def measure_call_s(function: TensorFunction, device: torch.device) -> float:
    """Return the seconds of one call; on GPUs, of several calls in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(GPU_CALLS_PER_TRIAL if device.type == "cuda" else 1):
        function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
