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

ASSUMED_CUDA_CONTEXT_BYTES = 350 * 10**6  # reported: 150 to 350 MB, by GPU and driver; measured where possible
CUBLAS_WORKSPACE_BYTES = 8519680  # torch's default up to Ampere; on Hopper it is four times as large
LAZY_KERNEL_BYTES = 16 * 2**20  # kernels that CUDA loads at their first use
MAX_CUDA_CONTEXT_BYTES = 750 * 10**6  # the most that CUDA and its libraries were seen to need on any GPU
MEASURED_WORKSPACES: dict[torch.device, int] = {}  # per GPU: what the first use of the libraries allocated


@dataclass(frozen=True, slots=True)
class CudaOverhead:
    """GPU memory that a process takes in addition to its own tensors."""

    context_bytes: int  # the CUDA context and the libraries' kernels
    workspace_bytes: int  # the libraries' workspaces, allocated through torch


@cache
def measure_cuda_overhead(device: torch.device, dtype: torch.dtype) -> CudaOverhead:
    """Measure the overhead after running every type of operation that the model uses.

    Without a GPU at hand, return an assumption. `device` must have an index, as `choose_device` returns it.
    """
    if device.type != "cuda":
        return CudaOverhead(0, 0)
    if not torch.cuda.is_available():
        return CudaOverhead(ASSUMED_CUDA_CONTEXT_BYTES, CUBLAS_WORKSPACE_BYTES)
    assert device.index is not None, "cuda and cuda:0 would get two streams, each with its own workspace"
    before = torch.cuda.memory_allocated(device)
    with on_compute_stream(device):
        warm_up_libraries(device, dtype)
    torch.cuda.synchronize(device)
    workspace = MEASURED_WORKSPACES.setdefault(device, torch.cuda.memory_allocated(device) - before)
    context = measure_process_gpu_bytes(device) - torch.cuda.memory_reserved(device) + LAZY_KERNEL_BYTES
    return CudaOverhead(context, workspace)


def warm_up_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Run a convolution, norms, a matrix product and attention, so that the libraries load what these need."""
    x = torch.zeros(1, 64, 32, 32, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = F.conv2d(F.silu(F.group_norm(x, 32)), torch.zeros(64, 64, 3, 3, device=device, dtype=dtype), padding=1)
    tokens = F.layer_norm(x.flatten(2).transpose(1, 2), [64])  # [1, 1024, 64]
    tokens = F.linear(tokens, torch.zeros(64, 64, device=device, dtype=dtype), tokens[0, 0])
    heads = tokens.view(1, 1024, 8, 8).transpose(1, 2)
    F.scaled_dot_product_attention(heads, heads, heads)


def measure_process_gpu_bytes(device: torch.device) -> int:
    """Return the GPU memory that this process uses, as the driver reports it.

    In containers the driver lists no processes. Then return all memory in use on the GPU, limited to what this process
    can plausibly have taken.
    """
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["nvidia-smi", "-i", f"GPU-{uuid}", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603
        if match := re.search(rf"^{os.getpid()}, (\d+)$", output, re.MULTILINE):
            return int(match[1]) * 2**20
    free, total = torch.cuda.mem_get_info(device)
    return min(total - free, torch.cuda.memory_reserved(device) + MAX_CUDA_CONTEXT_BYTES)


@contextlib.contextmanager
def limit_torch_memory(nbytes: int, device: torch.device) -> Iterator[None]:
    """Limit what torch may allocate on a GPU. Libraries that find no room for a workspace choose other algorithms."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total_memory_bytes(device)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
