"""The driver of the fake GPU: launches our CUDA kernels, compiled for the CPU, and page-locks host memory."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinysd_batch.model.packed.cuda_kernel import CUDA_CONVERSIONS

if TYPE_CHECKING:
    from tests.support.fake_cuda.device import FakeCudaDevice

COMPILER = shutil.which("g++")
# CUDA's instructions in C. Products and sums are computed in double, where they are exact, and rounded once to float,
# as on the GPU.
CPU_CONVERSIONS = """
#include <cstring>
#define __device__ static
#define __global__
struct Three { int x; };
static Three blockIdx, blockDim, threadIdx;
static float __fmul_rn(float a, float b) { return (float)((double)a * b); }
static float __fadd_rn(float a, float b) { return (float)((double)a + b); }
static float of_half(unsigned short bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
static unsigned short to_half(float f) { _Float16 h = (_Float16)f; unsigned short b; memcpy(&b, &h, 2); return b; }
static unsigned int bits_of(float f) { unsigned int b; memcpy(&b, &f, 4); return b; }
"""
KERNEL_SIGNATURE = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
NO_ERROR, INVALID_VALUE = 0, 1


@dataclass(frozen=True, slots=True)
class KernelFunction:
    """A kernel. Its pointer parameters come first; those that it writes to are not const."""

    name: str
    run: Callable[..., None]
    writes: tuple[bool, ...]  # of each pointer
    scalar_count: int


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What our code uses of the result of `torch.cuda._compile_kernel`."""

    func: KernelFunction


@dataclass(frozen=True, slots=True)
class FakeDriver:
    """libcuda.so.1. `on_launch` gets the kernel as a function, its stream, the addresses, and which it writes to."""

    on_launch: Callable[[Callable[[], None], int, Sequence[int], Sequence[bool]], None]

    def cuLaunchKernel(  # noqa: N802 - the driver's name
        self, function: KernelFunction, *sizes_and_stream: Any
    ) -> int:
        (x, y, z, threads, ty, tz, shared, stream, arguments, extra) = sizes_and_stream
        if (y, z, ty, tz, shared, extra) != (1, 1, 1, 1, 0, None) or not 0 < threads <= 1024 or x < 1:
            return INVALID_VALUE
        count = len(function.writes)
        if len(arguments) != count + function.scalar_count:
            return INVALID_VALUE
        pointers = [ctypes.c_void_p.from_address(address).value or 0 for address in arguments[:count]]
        scalars = [ctypes.c_int.from_address(address).value for address in arguments[count:]]

        def run_kernel() -> None:
            function.run(x, threads, *map(ctypes.c_void_p, pointers), *scalars)

        self.on_launch(run_kernel, stream.value or 0, pointers, function.writes)
        return NO_ERROR


def compile_kernel(source: str, name: str) -> CompiledKernel:
    """Replaces `torch.cuda._compile_kernel`, which calls NVRTC."""
    parameters = dict(KERNEL_SIGNATURE.findall(source))[name].split(",")
    pointers = [parameter for parameter in parameters if "*" in parameter]
    writes = tuple("const" not in pointer for pointer in pointers)
    run = compile_for_cpu(source)[f"all_{name}"]
    return CompiledKernel(KernelFunction(name, run, writes, len(parameters) - len(pointers)))


@functools.cache
def compile_for_cpu(source: str) -> ctypes.CDLL:
    """Compile the kernels of a source; `all_NAME` runs all threads of a launch one after the other."""
    assert COMPILER is not None, "no g++ here to compile kernels with"
    launches = []
    for name, parameters in KERNEL_SIGNATURE.findall(source):
        names = ", ".join(parameter.split()[-1].strip("*") for parameter in parameters.split(","))
        launches.append(
            f'extern "C" void all_{name}(int blocks, int threads, {parameters}) {{\n'
            f"    blockDim.x = threads;\n"
            f"    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)\n"
            f"        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) {name}({names});\n}}\n"
        )
    assert CUDA_CONVERSIONS in source
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cpp"
        file.write_text(source.replace(CUDA_CONVERSIONS, CPU_CONVERSIONS) + "".join(launches))
        subprocess.run([COMPILER, "-O2", "-shared", "-fPIC", "-o", file.with_suffix(".so"), file], check=True)
        return ctypes.CDLL(str(file.with_suffix(".so")))


@dataclass(frozen=True, slots=True)
class FakeCudaRuntime:
    """What our code uses of `torch.cuda.cudart()`."""

    gpu: "FakeCudaDevice"

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        if self.gpu.lock(address, nbytes):
            return NO_ERROR
        self.gpu.set_pending_error("invalid argument")
        return INVALID_VALUE

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.gpu.unlock(address)
        return NO_ERROR


def check_cuda_error(error: int) -> None:
    """Replaces `torch.cuda._utils._check_cuda`."""
    if error != NO_ERROR:
        raise RuntimeError(f"CUDA error: {error}")
