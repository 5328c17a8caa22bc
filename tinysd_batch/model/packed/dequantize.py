"""Dequantize packed weights: with a kernel of our own if it works on the device, otherwise with torch's operators.

A kernel, on CUDA or the CPU, is used only after it has dequantized test weights bit-identically to plain torch.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from tinysd_batch.model.chunking import get_chunk_bytes, items_per_chunk
from tinysd_batch.model.packed import cpu_kernel, cuda_kernel
from tinysd_batch.model.packed.fbgemm import RowDecoder, dequantize_by_rows, dequantize_rows_torch
from tinysd_batch.model.packed.format import (
    SUPPORTED_BITS,
    ZERO_POINT_BITS,
    AffineRowWeight,
    GroupWeight,
    PackedWeight,
    ZeroPointRowWeight,
)

logger = logging.getLogger(__name__)

ESTIMATED_DEVICE: ContextVar[torch.device | None] = ContextVar("estimated_device", default=None)
CPU = torch.device("cpu")
ONEDNN_BLOCK_ROWS = 64  # chunks are multiples of it, because oneDNN pads blocks of output channels


def dequantize(weight: PackedWeight, out: Tensor, decode: RowDecoder | None = None) -> Tensor:
    """Dequantize a weight into `out` [O, K], with `decode` if given, else in the fastest way on its device.

    Computed in float32 and rounded once, to the dtype of `out`.
    """
    if decode is None and has_working_kernels((ESTIMATED_DEVICE.get() or CPU) if out.is_meta else out.device):
        return out if out.is_meta else dequantize_with_kernel(weight, out)
    return dequantize_by_rows(weight, out, decode)


@contextlib.contextmanager
def estimate_for_device(device: torch.device) -> Iterator[None]:
    """Let operations on the meta device stand for operations on this device."""
    has_working_kernels(device)  # test the kernels now, before memory is counted
    token = ESTIMATED_DEVICE.set(device)
    try:
        yield
    finally:
        ESTIMATED_DEVICE.reset(token)


def dequantize_with_kernel(weight: PackedWeight, out: Tensor) -> Tensor:
    """Dequantize a weight into `out` [O, K] on CUDA or the CPU, bit-identically to plain torch."""
    if out.device.type == "cpu":
        cpu_kernel.run_cpu_kernel(weight, out)
    elif isinstance(weight, GroupWeight):
        cuda_kernel.launch_cuda_kernel("unpack_groups", weight.tensors(), out, weight.bits, weight.group_size)
    elif isinstance(weight, AffineRowWeight):
        cuda_kernel.launch_cuda_kernel("unpack_whole_rows", weight.tensors(), out, weight.bits)
    else:
        cuda_kernel.launch_cuda_kernel("unpack_rows", weight.tensors(), out, weight.bits)
    return out


@cache
def has_working_kernels(device: torch.device) -> bool:
    """Whether there are kernels for this device that dequantize test weights as plain torch does.

    Warns once if a GPU has none, because steps then take several times as long.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        return False
    try:
        return all(
            is_kernel_exact(weight, dtype, device)
            for weight in make_test_weights(device)
            for dtype in cuda_kernel.OUTPUT_TYPES
        )
    except Exception as error:  # noqa: BLE001 - NVRTC, a compiler or a library can fail in any way
        report_without_kernel(device, error)
        return False


def is_kernel_exact(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel's result is bit-identical to plain torch's."""
    result, expected = (torch.empty(weight.shape, dtype=dtype, device=device) for _ in range(2))
    dequantize_with_kernel(weight, result)
    return torch.equal(result, dequantize_by_rows(weight, expected, dequantize_rows_torch))


def report_without_kernel(device: torch.device, error: Exception) -> None:
    """Warn on a GPU. On the CPU only log it: a package that was built without a compiler has no kernel."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if device.type == "cpu":
        logger.info("cpu: weights are dequantized by torch's operators, without a kernel: %s", reason)
        return
    warnings.warn(f"{device}: weights are dequantized without a kernel, which is slow: {reason}", stacklevel=3)


def make_test_weights(device: torch.device) -> list[PackedWeight]:
    """Return one weight of every format, in rows of 256 codes or more and in short rows."""
    generator = torch.Generator().manual_seed(0)
    # Created on the CPU whatever the default device is: the planner calls this within the meta device.
    floats = torch.rand(2, 4, generator=generator, device="cpu").to(device)
    meta, delta = floats.half().view(torch.int16), floats[:, 0].contiguous().view(torch.int32)
    weights: list[PackedWeight] = []
    for width, groups in ((64, 4), (9, 1)):  # bytes of codes per row; 9 bytes do not allow wide stores
        codes, bytes_ = (
            torch.randint(0, 256, (2, count), dtype=torch.uint8, generator=generator, device="cpu").to(device)
            for count in (width, groups)
        )
        weights += [GroupWeight(codes, bytes_, bytes_.flip(0), meta, bits=bits) for bits in SUPPORTED_BITS]
        weights += [AffineRowWeight(codes, meta[:, :2].contiguous(), bits=bits) for bits in SUPPORTED_BITS]
        weights += [
            ZeroPointRowWeight(codes, bytes_[:, 0] & ((1 << bits) - 1), delta, bits=bits) for bits in ZERO_POINT_BITS
        ]
    return weights


class ScratchBuffers(threading.local):
    """One buffer per thread and device, in which layers dequantize one after the other: allocating each is slow."""

    def __init__(self) -> None:
        self.buffers: dict[torch.device, Tensor] = {}

    def get_matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized matrix [rows, columns]; the next call may return the same memory."""
        nbytes = rows * columns * dtype.itemsize
        if device not in self.buffers or self.buffers[device].numel() < nbytes:
            self.buffers.pop(device, None)
            with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
                self.buffers[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self.buffers[device][:nbytes].view(dtype).view(rows, columns)

    def release(self, device: torch.device) -> None:
        """Free the buffers of all devices of this type: "cuda" stands for every GPU."""
        self.buffers = {key: buffer for key, buffer in self.buffers.items() if key.type != device.type}


SCRATCH = ScratchBuffers()


def rows_per_chunk(rows: int, columns: int, dtype: torch.dtype, max_bytes: int | None = None) -> int:
    """Return how many rows of a matrix are dequantized at once: chunks within the current limit and `max_bytes`."""
    limit = min(max_bytes or get_chunk_bytes(), get_chunk_bytes())
    count = items_per_chunk(rows, columns * dtype.itemsize, limit)
    if count == rows or count < ONEDNN_BLOCK_ROWS:
        return count
    return count // ONEDNN_BLOCK_ROWS * ONEDNN_BLOCK_ROWS
