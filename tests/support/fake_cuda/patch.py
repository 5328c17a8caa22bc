"""Have torch say that there is a card, and have it do what is asked of it."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.fake_cuda.device import Card, Event, Stream
from tests.support.fake_cuda.driver import Driver, Runtime, check, compile_kernel
from tests.support.fake_cuda.graphs import Graph
from tests.support.fake_cuda.race_detector import Race
from tests.support.fake_cuda.tensors import CardMode, CardTensor
from tinysd_batch.model.device import cuda_overhead, precision, streams
from tinysd_batch.model.offload.planner import WORKSPACE_CONFIG
from tinysd_batch.model.packed import cuda_kernel, dequantize

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
REMEMBERED = (
    cuda_overhead.overhead, streams.working_stream, cuda_kernel.kernel, precision.probe, streams.copying_stream,
    dequantize.has_kernels,
)  # fmt: skip


@contextlib.contextmanager
def pretended(card: Card) -> Iterator[Card]:
    """Within this there is `card`, and torch can use it; what is remembered of it is forgotten in the end."""
    with pytest.MonkeyPatch.context() as patch:
        CardTensor.card = card
        Race.met.clear()
        patch.setattr(cuda_kernel, "ctypes", driver_in_place_of_cuda(card))
        for name, answer in answers(card).items():
            patch.setattr(torch.cuda, name, answer)
        for name in ("can_use_flash_attention", "can_use_efficient_attention"):
            patch.setattr(torch.backends.cuda, name, lambda _: True)
        patch.setattr(torch.cuda._utils, "_check_cuda", check)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: card.allocator.end(pool), raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: card.allocator.let_go(pool), raising=False)
        patch.setenv(WORKSPACE_CONFIG, "")  # so that it is as before in the end
        patch.delenv(WORKSPACE_CONFIG)
        forget()
        try:
            with guarding_nothing(), CardMode(card):
                yield card
        finally:
            forget()
            card.finish()


@contextlib.contextmanager
def guarding_nothing() -> Iterator[None]:
    """Let operations on the card pass where torch would set the current device, and a CPU build has nothing to set."""
    torch._C._ensureCUDADeviceGuardSet()  # in a CUDA build
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, GUARDS)  # of the processor and of CUDA
    before = guards[1]
    guards[1] = before or guards[0]
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # what is made of Python's numbers comes to the card by way of the host
    try:
        yield
    finally:
        guards[1] = before
        torch._C._set_only_lift_cpu_tensors(lifted)


def forget() -> None:
    for function in REMEMBERED:
        function.cache_clear()
    cuda_overhead.WORKSPACES.clear()
    dequantize.SCRATCH.release(torch.device("cuda"))


def driver_in_place_of_cuda(card: Card) -> SimpleNamespace:
    """The module ctypes, of which libcuda is the card's driver."""

    def library(name: str) -> Any:
        return Driver(card.launched) if name == "libcuda.so.1" else ctypes.CDLL(name)

    return SimpleNamespace(**{**vars(ctypes), "CDLL": library})


def answers(card: Card) -> dict[str, Any]:
    """What stands for the functions of `torch.cuda` that the engine calls."""
    allocator = card.allocator

    @contextlib.contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        before, card.current = card.current, stream.timeline
        try:
            yield
        finally:
            card.current = before

    def limit(fraction: float, _: object = None) -> None:
        allocator.limit = int(fraction * allocator.total)

    def reset_peaks(_: object = None) -> None:
        allocator.most_allocated, allocator.most_reserved = allocator.allocated, allocator.reserved

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda _: contextlib.nullcontext(),
        "get_device_name": lambda _=None: "a pretended card",
        "get_device_capability": lambda _=None: (8, 6),
        "get_arch_list": lambda: ["sm_86"],
        "get_device_properties": lambda _=None: SimpleNamespace(total_memory=allocator.total, uuid="pretended"),
        "mem_get_info": lambda _=None: (allocator.total - allocator.others - allocator.reserved, allocator.total),
        "device_memory_used": lambda _=None: allocator.others + allocator.reserved,
        "memory_allocated": lambda _=None: allocator.allocated,
        "memory_reserved": lambda _=None: allocator.reserved,
        "max_memory_allocated": lambda _=None: allocator.most_allocated,
        "max_memory_reserved": lambda _=None: allocator.most_reserved,
        "reset_peak_memory_stats": reset_peaks,
        "set_per_process_memory_fraction": limit,
        "empty_cache": card.empty_cache,
        "synchronize": lambda _=None: card.wait(*card.timelines),
        "current_stream": lambda _=None: Stream(card, card.current),
        "stream": on_stream,
        "Stream": lambda _=None: Stream(card, next(card.next_stream)),
        "Event": functools.partial(Event, card),
        "CUDAGraph": functools.partial(Graph, card),
        "graph_pool_handle": lambda: (0, next(card.next_pool)),
        "_sleep": lambda _: None,
        "cudart": functools.partial(Runtime, card),
        "_compile_kernel": compile_kernel,
    }
