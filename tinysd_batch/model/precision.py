"""Which number format to compute in."""

import re

import torch

from tinysd_batch.errors import UsageError

TENSOR_CORES = (7, 0)  # below this compute capability float16 is finite but slow


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`full` is float32, `autocast` float16 on GPUs; None is float16 where it is fast and known to work."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "full", "autocast"):
        raise UsageError(f"dtype {dtype!r}: a torch dtype, full or autocast was expected")
    if dtype == "full" or device.type != "cuda":
        return torch.float32
    return torch.float16 if dtype == "autocast" or is_good_at_half(device) else torch.float32


def is_good_at_half(device: torch.device) -> bool:
    """GTX 16xx cards compute float16 convolutions wrongly; older cards compute them slowly."""
    broken = re.search(r"GTX 16\d\d", torch.cuda.get_device_name(device)) is not None
    return torch.cuda.get_device_capability(device) >= TENSOR_CORES and not broken
