"""Page-locked host memory, from which copies to the GPU run asynchronously."""

import contextlib
import functools
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysd_batch.model.offload.components import WeightGroup

CUDA_HOST_REGISTER_PORTABLE = 1  # page-locked for all cards of the process: cudaHostRegisterPortable


@dataclass(frozen=True, slots=True)
class PinnedWeights:
    """All pieces in page-locked host memory, one after the other, as the device wants them."""

    memory: Tensor
    starts: tuple[int, ...]
    contents: "TensorKeys"

    @classmethod
    def copy_of(cls, pieces: Sequence[WeightGroup], device: torch.device | None = None) -> "PinnedWeights":
        """Page-locked for a card, or as any other memory."""
        nbytes = sum(piece.nbytes for piece in pieces)
        memory = allocate_pinned(nbytes, device) if device else torch.empty(nbytes, dtype=torch.uint8)
        starts, end = [], 0
        for piece in pieces:
            starts.append(end)
            for tensor, place in piece.views(memory[end:]):
                place.copy_(tensor.value)
            end += piece.nbytes
        return cls(memory, tuple(starts), get_tensor_keys(pieces))

    def is_copy_of(self, pieces: Sequence[WeightGroup]) -> bool:
        """Whether it holds just these tensors; others may be as large."""
        return self.contents == get_tensor_keys(pieces)

    def group_bytes(self, number: int, nbytes: int) -> Tensor:
        return self.memory[self.starts[number] :][:nbytes]


TensorKeys = tuple[tuple[tuple[int, torch.dtype], ...], ...]  # of each piece the tensors, by their identity


def get_tensor_keys(pieces: Sequence[WeightGroup]) -> TensorKeys:
    return tuple(tuple((id(tensor), tensor.dtype) for tensor in piece.tensors) for piece in pieces)


def allocate_pinned(nbytes: int, device: torch.device) -> Tensor:
    """Bytes that a card can copy by itself. Torch's own door to such memory hands out powers of two."""
    memory = mmap.mmap(-1, nbytes)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    runtime, wait = torch.cuda.cudart(), functools.partial(torch.cuda.synchronize, device)  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(tensor.data_ptr(), nbytes, CUDA_HOST_REGISTER_PORTABLE)):
        clear_cuda_error()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def unlock(address: int, _: mmap.mmap) -> None:
        with contextlib.suppress(RuntimeError):
            wait()  # the piece after the last is sent for, too, and else nobody waits for it
        runtime.cudaHostUnregister(address)

    weakref.finalize(tensor, unlock, tensor.data_ptr(), memory).atexit = False  # the process's end unlocks it, too
    return tensor


def clear_cuda_error() -> None:
    """What went wrong and is dealt with: CUDA would tell of it at the next launch, which is innocent."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
