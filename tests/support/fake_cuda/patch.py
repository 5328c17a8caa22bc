"""Let torch report a GPU and use the fake one."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.fake_cuda.device import FakeCudaDevice, FakeEvent, FakeStream
from tests.support.fake_cuda.driver import FakeCudaRuntime, FakeDriver, check_cuda_error, compile_kernel
from tests.support.fake_cuda.graphs import FakeCudaGraph
from tests.support.fake_cuda.race_detector import DataRaceError
from tests.support.fake_cuda.tensors import FakeCudaMode, FakeCudaTensor
from tinysd_batch.model.device import cuda_overhead, precision, streams
from tinysd_batch.model.offload.planner import CUBLAS_WORKSPACE_VARIABLE
from tinysd_batch.model.packed import cuda_kernel, dequantize

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
CACHED_FUNCTIONS = (
    cuda_kernel.get_cuda_kernel,
    cuda_overhead.measure_cuda_overhead,
    dequantize.has_working_kernels,
    precision.probe_half_precision,
    streams.get_compute_stream,
    streams.get_copy_stream,
)


@contextlib.contextmanager
def use_fake_cuda(gpu: FakeCudaDevice) -> Iterator[FakeCudaDevice]:
    """Make `gpu` available to torch. What our code caches about it is cleared at the end."""
    with pytest.MonkeyPatch.context() as patch:
        FakeCudaTensor.gpu = gpu
        DataRaceError.raised.clear()
        patch.setattr(cuda_kernel, "ctypes", fake_ctypes(gpu))
        for name, function in fake_torch_functions(gpu).items():
            patch.setattr(torch.cuda, name, function)
        for name in ("can_use_flash_attention", "can_use_efficient_attention"):
            patch.setattr(torch.backends.cuda, name, lambda _: True)
        patch.setattr(torch.cuda._utils, "_check_cuda", check_cuda_error)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: gpu.allocator.end(pool), raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: gpu.allocator.release_pool(pool), raising=False)
        patch.setenv(CUBLAS_WORKSPACE_VARIABLE, "")  # so that it is restored at the end
        patch.delenv(CUBLAS_WORKSPACE_VARIABLE)
        clear_caches()
        try:
            with without_device_guards(), FakeCudaMode(gpu):
                yield gpu
        finally:
            clear_caches()
            gpu.synchronize_all()


@contextlib.contextmanager
def without_device_guards() -> Iterator[None]:
    """Let operations on the GPU run where torch would set the current CUDA device, which a CPU build cannot do."""
    torch._C._ensureCUDADeviceGuardSet()  # in a CUDA build
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, GUARDS)  # of CPU and CUDA
    before = guards[1]
    guards[1] = before or guards[0]
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # tensors from Python numbers are created on the CPU, then copied
    try:
        yield
    finally:
        guards[1] = before
        torch._C._set_only_lift_cpu_tensors(lifted)


def clear_caches() -> None:
    for function in CACHED_FUNCTIONS:
        function.cache_clear()
    cuda_overhead.MEASURED_WORKSPACES.clear()
    dequantize.SCRATCH.release(torch.device("cuda"))


def fake_ctypes(gpu: FakeCudaDevice) -> SimpleNamespace:
    """Return a copy of the ctypes module that loads the fake driver as libcuda."""

    def library(name: str) -> Any:
        return FakeDriver(gpu.launch_kernel) if name == "libcuda.so.1" else ctypes.CDLL(name)

    return SimpleNamespace(**{**vars(ctypes), "CDLL": library})


def fake_torch_functions(gpu: FakeCudaDevice) -> dict[str, Any]:
    """Return replacements for the functions of `torch.cuda` that our code calls."""
    allocator = gpu.allocator

    @contextlib.contextmanager
    def on_stream(stream: FakeStream) -> Iterator[None]:
        outer, gpu.current = gpu.current, stream.timeline
        try:
            yield
        finally:
            gpu.current = outer

    def limit(fraction: float, _: object = None) -> None:
        allocator.limit = int(fraction * allocator.total)

    def reset_peaks(_: object = None) -> None:
        allocator.max_allocated, allocator.max_reserved = allocator.allocated, allocator.reserved

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda _: contextlib.nullcontext(),
        "get_device_name": lambda _=None: "fake CUDA device",
        "get_device_capability": lambda _=None: (8, 6),
        "get_arch_list": lambda: ["sm_86"],
        "get_device_properties": lambda _=None: SimpleNamespace(total_memory=allocator.total, uuid="fake"),
        "mem_get_info": lambda _=None: (
            allocator.total - allocator.non_torch_bytes - allocator.reserved,
            allocator.total,
        ),
        "device_memory_used": lambda _=None: allocator.non_torch_bytes + allocator.reserved,
        "memory_allocated": lambda _=None: allocator.allocated,
        "memory_reserved": lambda _=None: allocator.reserved,
        "max_memory_allocated": lambda _=None: allocator.max_allocated,
        "max_memory_reserved": lambda _=None: allocator.max_reserved,
        "reset_peak_memory_stats": reset_peaks,
        "set_per_process_memory_fraction": limit,
        "empty_cache": gpu.empty_cache,
        "synchronize": lambda _=None: gpu.wait(*gpu.timelines),
        "current_stream": lambda _=None: FakeStream(gpu, gpu.current),
        "stream": on_stream,
        "Stream": lambda _=None: FakeStream(gpu, next(gpu.next_stream)),
        "Event": functools.partial(FakeEvent, gpu),
        "CUDAGraph": functools.partial(FakeCudaGraph, gpu),
        "graph_pool_handle": lambda: (0, next(gpu.next_pool)),
        "_sleep": lambda _: None,
        "cudart": functools.partial(FakeCudaRuntime, gpu),
        "_compile_kernel": compile_kernel,
    }
