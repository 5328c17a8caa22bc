"""How packed weights become floats: by a kernel of ours where one works, else by what torch has.

A kernel, on CUDA or the processor, may work once it has unpacked known weights to the bit as plain torch does.
"""

import contextlib
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

ESTIMATED_DEVICE: ContextVar[torch.device | None] = ContextVar("foretold", default=None)
CPU = torch.device("cpu")
ONEDNN_BLOCK_ROWS = 64  # parts are multiples of it: oneDNN fills up blocks of output channels


def dequantize(weight: PackedWeight, out: Tensor, decode: RowDecoder | None = None) -> Tensor:
    """A weight as [O, K], written to `out`, by the fastest way there is on its device, or by `decode`.

    Computed in float32 and rounded once, to the type of `out`.
    """
    if decode is None and has_working_kernels((ESTIMATED_DEVICE.get() or CPU) if out.is_meta else out.device):
        return out if out.is_meta else dequantize_with_kernel(weight, out)
    return dequantize_by_rows(weight, out, decode)


@contextlib.contextmanager
def estimate_for_device(device: torch.device) -> Iterator[None]:
    """Work on the meta device stands for work on this one."""
    has_working_kernels(device)  # asked before anything is counted
    before = ESTIMATED_DEVICE.set(device)
    try:
        yield
    finally:
        ESTIMATED_DEVICE.reset(before)


def dequantize_with_kernel(weight: PackedWeight, out: Tensor) -> Tensor:
    """A weight as [O, K] in `out`, on CUDA or the CPU; equal to the bit to what plain torch makes of it."""
    if out.device.type == "cpu":
        cpu_kernel.run_cpu_kernel(weight, out)
    elif isinstance(weight, GroupWeight):
        cuda_kernel.launch("unpack_groups", weight.tensors(), out, weight.bits, weight.group_size)
    elif isinstance(weight, AffineRowWeight):
        cuda_kernel.launch("unpack_whole_rows", weight.tensors(), out, weight.bits)
    else:
        cuda_kernel.launch("unpack_rows", weight.tensors(), out, weight.bits)
    return out


@cache
def has_working_kernels(device: torch.device) -> bool:
    """Whether there are kernels for this device that unpack known weights as plain torch does.

    Warns of a card for which there are none: steps take several times as long then.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        return False
    try:
        return all(
            torch.equal(
                dequantize_with_kernel(weight, torch.empty(weight.shape, dtype=dtype, device=device)),
                dequantize_by_rows(
                    weight, torch.empty(weight.shape, dtype=dtype, device=device), dequantize_rows_torch
                ),
            )
            for weight in make_test_weights(device)
            for dtype in cuda_kernel.OUTPUT_TYPES
        )
    except Exception as error:  # noqa: BLE001 - neither torch's door to NVRTC nor what a compiler made is beyond doubt
        if device.type == "cuda":
            told = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"{device}: weights are unpacked without a kernel, which is slow: {told}", stacklevel=2)
        return False


def make_test_weights(device: torch.device) -> list[PackedWeight]:
    """One of every way of storing, in rows of 256 weights and of very few."""
    generator = torch.Generator().manual_seed(0)
    floats = torch.rand(2, 4, generator=generator, device="cpu").to(
        device
    )  # whatever the default device: see memory.py
    meta, delta = floats.half().view(torch.int16), floats[:, 0].contiguous().view(torch.int32)
    known: list[PackedWeight] = []
    for width, groups in ((64, 4), (9, 1)):  # bytes of codes in a row; of 9 no thread can take many at once
        codes, bytes_ = (
            torch.randint(0, 256, (2, n), dtype=torch.uint8, generator=generator, device="cpu").to(device)
            for n in (width, groups)
        )
        known += [GroupWeight(codes, bytes_, bytes_.flip(0), meta, bits=bits) for bits in SUPPORTED_BITS]
        known += [AffineRowWeight(codes, meta[:, :2].contiguous(), bits=bits) for bits in SUPPORTED_BITS]
        known += [
            ZeroPointRowWeight(codes, bytes_[:, 0] & ((1 << bits) - 1), delta, bits=bits) for bits in ZERO_POINT_BITS
        ]
    return known


class ScratchBuffers(threading.local):
    """A buffer per thread and device in which layers unpack in turn: fresh memory for each would be dear."""

    def __init__(self) -> None:
        self.buffers: dict[torch.device, Tensor] = {}

    def get_matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for a matrix [rows, columns]; the next call may hand out the same memory."""
        needed = rows * columns * dtype.itemsize
        if device not in self.buffers or self.buffers[device].numel() < needed:
            self.buffers.pop(device, None)
            with torch.inference_mode(False):  # else nobody outside the inference mode could write to it later
                self.buffers[device] = torch.empty(needed, dtype=torch.uint8, device=device)
        return self.buffers[device][:needed].view(dtype).view(rows, columns)

    def release(self, device: torch.device) -> None:
        """Give the memory back; "cuda" stands for any of its cards."""
        self.buffers = {place: buffer for place, buffer in self.buffers.items() if place.type != device.type}


SCRATCH = ScratchBuffers()


def rows_per_chunk(rows: int, columns: int, dtype: torch.dtype, most_bytes: int | None = None) -> int:
    """How many rows of a matrix are unpacked at once, in parts of at most so many bytes, too."""
    found = items_per_chunk(rows, columns * dtype.itemsize, min(most_bytes or get_chunk_bytes(), get_chunk_bytes()))
    return found if found in (rows, found % ONEDNN_BLOCK_ROWS) else found // ONEDNN_BLOCK_ROWS * ONEDNN_BLOCK_ROWS
