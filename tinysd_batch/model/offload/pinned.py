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

CUDA_HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all GPUs of the process
TensorKeys = tuple[tuple[tuple[int, torch.dtype], ...], ...]  # per group: identity and dtype of each tensor


@dataclass(frozen=True, slots=True)
class PinnedWeights:
    """A copy of weight groups in page-locked host memory, one after the other, laid out as the device needs them."""

    memory: Tensor
    starts: tuple[int, ...]
    keys: TensorKeys

    @classmethod
    def copy_of(cls, groups: Sequence[WeightGroup], device: torch.device | None = None) -> "PinnedWeights":
        """Copy groups into memory that is page-locked for a GPU, or without `device` into ordinary memory."""
        nbytes = sum(group.nbytes for group in groups)
        memory = allocate_pinned(nbytes, device) if device else torch.empty(nbytes, dtype=torch.uint8)
        starts, end = [], 0
        for group in groups:
            starts.append(end)
            for tensor, view in group.views(memory[end:]):
                view.copy_(tensor.value)
            end += group.nbytes
        return cls(memory, tuple(starts), get_tensor_keys(groups))

    def is_copy_of(self, groups: Sequence[WeightGroup]) -> bool:
        """Whether it holds exactly these tensors. Sizes do not suffice: other groups may be equally large."""
        return self.keys == get_tensor_keys(groups)

    def group_bytes(self, number: int, nbytes: int) -> Tensor:
        return self.memory[self.starts[number] :][:nbytes]


def get_tensor_keys(groups: Sequence[WeightGroup]) -> TensorKeys:
    return tuple(tuple((id(tensor), tensor.dtype) for tensor in group.tensors) for group in groups)


def allocate_pinned(nbytes: int, device: torch.device) -> Tensor:
    """Allocate page-locked memory, uint8 [nbytes]. Torch's own allocator would round up to a power of two."""
    memory = mmap.mmap(-1, nbytes)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    wait = functools.partial(torch.cuda.synchronize, device)
    if int(runtime.cudaHostRegister(tensor.data_ptr(), nbytes, CUDA_HOST_REGISTER_PORTABLE)):
        clear_cuda_error()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def unlock(address: int, _: mmap.mmap) -> None:
        with contextlib.suppress(RuntimeError):
            wait()  # the copy that was fetched ahead may still be running, and nothing else waits for it
        runtime.cudaHostUnregister(address)

    # Not at exit: the end of the process unlocks it anyway.
    weakref.finalize(tensor, unlock, tensor.data_ptr(), memory).atexit = False
    return tensor


def clear_cuda_error() -> None:
    """Clear a CUDA error that was handled. Otherwise CUDA would report it at the next launch."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
