"""Memory that CUDA itself takes: its context, and the workspaces of cuBLAS and cuDNN."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from tinysd_batch.model.device.select import total_memory_bytes
from tinysd_batch.model.device.streams import on_compute_stream

ASSUMED_CUDA_CONTEXT_BYTES = (
    350 * 10**6
)  # 150 to 350 MB are reported, by card and driver; where it can be, it is measured

CUBLAS_WORKSPACE_BYTES = 8519680  # of cuBLAS, as torch has it up to Ampere; on Hopper it would be four times as much

LAZY_KERNEL_BYTES = 16 * 2**20  # kernels that are loaded when they are first needed

MAX_CUDA_CONTEXT_BYTES = 750 * 10**6  # that any card was seen to need for CUDA and libraries

MEASURED_WORKSPACES: dict[torch.device, int] = {}  # of cards at work: what the first work of all made libraries take


@dataclass(frozen=True, slots=True)
class CudaOverhead:
    """What a process takes of a card besides the tensors that it makes, in bytes."""

    context_bytes: int  # CUDA's own, and the libraries' kernels
    workspace_bytes: int  # of the libraries, from torch's memory


@cache
def measure_cuda_overhead(device: torch.device, dtype: torch.dtype) -> CudaOverhead:
    """Measured, after work of every sort that the model does; a guess where the card is not at hand.

    `device` names a card by its number, as `choose_device` does.
    """
    if device.type != "cuda":
        return CudaOverhead(0, 0)
    if not torch.cuda.is_available():
        return CudaOverhead(ASSUMED_CUDA_CONTEXT_BYTES, CUBLAS_WORKSPACE_BYTES)
    assert device.index is not None, "two names of a card would be two streams, each with a workspace"
    before = torch.cuda.memory_allocated(device)
    with on_compute_stream(device):
        warm_up_libraries(device, dtype)
    torch.cuda.synchronize(device)
    workspace = MEASURED_WORKSPACES.setdefault(device, torch.cuda.memory_allocated(device) - before)
    return CudaOverhead(
        measure_process_gpu_bytes(device) - torch.cuda.memory_reserved(device) + LAZY_KERNEL_BYTES, workspace
    )


def warm_up_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """A convolution, norms, a product and attention, so that libraries load what they need for them."""
    x = torch.zeros(1, 64, 32, 32, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = F.conv2d(F.silu(F.group_norm(x, 32)), torch.zeros(64, 64, 3, 3, device=device, dtype=dtype), padding=1)
    tokens = F.layer_norm(x.flatten(2).transpose(1, 2), [64])  # [1, 1024, 64]
    tokens = F.linear(tokens, torch.zeros(64, 64, device=device, dtype=dtype), tokens[0, 0])
    heads = tokens.view(1, 1024, 8, 8).transpose(1, 2)
    F.scaled_dot_product_attention(heads, heads, heads)


def measure_process_gpu_bytes(device: torch.device) -> int:
    """Of a card's memory by this process, by the driver's word.

    Where that names no processes, as in containers, all that is in use, but no more than this process may well take.
    """
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["nvidia-smi", "-i", f"GPU-{uuid}", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603
        if own := re.search(rf"^{os.getpid()}, (\d+)$", said, re.MULTILINE):
            return int(own[1]) * 2**20
    free, total = torch.cuda.mem_get_info(device)
    return min(total - free, torch.cuda.memory_reserved(device) + MAX_CUDA_CONTEXT_BYTES)


@contextlib.contextmanager
def limit_torch_memory(nbytes: int, device: torch.device) -> Iterator[None]:
    """Torch takes no more of a card than that; libraries that find no workspace choose other ways of work."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total_memory_bytes(device)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
