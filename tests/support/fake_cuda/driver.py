"""The driver of the pretended card: launches the engine's kernels, compiled for the processor, and locks pages."""

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
# The card's instructions spelt in C. A float is widened to double for products and sums: exact there, and rounded once
# on the way back, as on the card.
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
    """A kernel. Of its parameters those that point to memory come first; what it writes to is not const."""

    name: str
    run: Callable[..., None]
    writes: tuple[bool, ...]  # of each pointer
    numbers: int


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What `torch.cuda._compile_kernel` gives, as far as the engine looks."""

    func: KernelFunction


@dataclass(frozen=True, slots=True)
class FakeDriver:
    """libcuda.so.1. `launched` is told of a launch: the work, its stream, the addresses, which of them it writes to."""

    launched: Callable[[Callable[[], None], int, Sequence[int], Sequence[bool]], None]

    def cuLaunchKernel(  # noqa: N802 - as the driver calls it
        self, function: KernelFunction, *sizes_and_stream: Any
    ) -> int:
        (x, y, z, threads, ty, tz, shared, stream, arguments, extra) = sizes_and_stream
        if (y, z, ty, tz, shared, extra) != (1, 1, 1, 1, 0, None) or not 0 < threads <= 1024 or x < 1:
            return INVALID_VALUE
        count = len(function.writes)
        if len(arguments) != count + function.numbers:
            return INVALID_VALUE
        pointers = [ctypes.c_void_p.from_address(at).value or 0 for at in arguments[:count]]
        numbers = [ctypes.c_int.from_address(at).value for at in arguments[count:]]

        def work() -> None:
            function.run(x, threads, *map(ctypes.c_void_p, pointers), *numbers)

        self.launched(work, stream.value or 0, pointers, function.writes)
        return NO_ERROR


def compile_kernel(source: str, name: str) -> CompiledKernel:
    """Stands for torch's door to NVRTC."""
    parameters = dict(KERNEL_SIGNATURE.findall(source))[name].split(",")
    pointers = [one for one in parameters if "*" in one]
    writes = tuple("const" not in one for one in pointers)
    return CompiledKernel(
        KernelFunction(name, compile_for_cpu(source)[f"all_{name}"], writes, len(parameters) - len(pointers))
    )


@functools.cache
def compile_for_cpu(source: str) -> ctypes.CDLL:
    """The kernels of a source; `all_NAME` does the work of all threads of a launch in turn."""
    assert COMPILER is not None, "no g++ here to compile kernels with"
    launches = []
    for name, parameters in KERNEL_SIGNATURE.findall(source):
        names = ", ".join(one.split()[-1].strip("*") for one in parameters.split(","))
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
    """What the engine asks of `torch.cuda.cudart()`."""

    card: "FakeCudaDevice"

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - as CUDA calls it
        if self.card.lock(address, nbytes):
            return NO_ERROR
        self.card.set_pending_error("invalid argument")
        return INVALID_VALUE

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.card.unlock(address)
        return NO_ERROR


def check_cuda_error(error: int) -> None:
    """Stands for `torch.cuda._utils._check_cuda`."""
    if error != NO_ERROR:
        raise RuntimeError(f"CUDA error: {error}")
