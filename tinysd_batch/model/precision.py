"""Which number format to compute in: half precision where it comes out right and is fast, by measurement."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysd_batch.errors import UsageError
from tinysd_batch.model.devices import allocating_at_most

WORTH_IT = 1.3  # times as fast as float32, at least
TRIES = 5
IN_A_ROW = 5
PROBE_BYTES = 192 * 2**20  # on a card; its tensors take half of that
TOLERANCE = 0.05  # of the largest value: bfloat16 has 8 bits


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device, *, is_small: bool = False) -> torch.dtype:
    """`full` is float32, `autocast` float16 on GPUs; None is half precision where the device is good at it.

    That is float16 on GPUs, and bfloat16 on processors unless the model is small.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "full", "autocast"):
        raise UsageError(f"dtype {dtype!r}: a torch dtype, full or autocast was expected")
    if dtype == "full" or (device.type != "cuda" and (dtype == "autocast" or is_small)):
        return torch.float32
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    return half if dtype == "autocast" or is_good_at(half, device) else torch.float32


def is_good_at(half: torch.dtype, device: torch.device) -> bool:
    """GTX 16xx cards are known to fail on some float16 convolutions, whatever a probe says; others are measured."""
    if device.type == "cuda" and re.search(r"GTX 16\d\d", torch.cuda.get_device_name(device)):
        return False
    found = probe(device, half)
    return found.is_right and found.speedup >= WORTH_IT


@dataclass(frozen=True, slots=True)
class Probe:
    """What a layer like the UNet's said of a number format on a device."""

    is_right: bool  # finite, and what float32 gives
    speedup: float  # times as fast as float32


@cache
def probe(device: torch.device, half: torch.dtype) -> Probe:
    """A 3x3 convolution in float32 and in `half`.

    On cards one that takes longer than to send for it; on processors a small one: what is emulated takes for ever.
    """
    if device.type == "cuda":  # before any budget is known: libraries must not take what they would like
        most = torch.cuda.memory_reserved(device) + PROBE_BYTES
        with allocating_at_most(most, device):
            found = compare(device, half, 320, 128)
        torch.cuda.empty_cache()
        return found
    return compare(device, half, 128, 16)


def compare(device: torch.device, half: torch.dtype, channels: int, side: int) -> Probe:
    """The convolution, on a map of so many channels and pixels a side."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=generator).to(device)
    # Divided so that the result spreads as x does.
    weight = (torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5).to(device)
    expected, full_s = timed(lambda: F.conv2d(x, weight, padding=1), device)
    x, weight = x.to(half), weight.to(half)
    found, half_s = timed(lambda: F.conv2d(x, weight, padding=1), device)
    error = (found.float() - expected).abs().max() / expected.abs().max()
    return Probe(bool(error < TOLERANCE), full_s / half_s)  # NaN is not below anything


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What it gives, and the median of its seconds, the first, in which libraries choose their ways, not counted.

    On cards the seconds of several in a row, none waited for.
    """
    result, seconds = work(), []
    for _ in range(TRIES):
        wait_for(device)
        started = time.perf_counter()
        for _ in range(IN_A_ROW if device.type == "cuda" else 1):
            work()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
