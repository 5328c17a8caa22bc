"""Dequantize on CUDA with kernels that are compiled at run time for the GPU at hand.

They are compiled with NVRTC through torch, and so also run on old GPUs, which Triton no longer supports. They are used
only after they have dequantized test weights bit-identically to plain torch (`dequantize.py`).
"""

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

THREADS_PER_BLOCK = 256
BYTES_PER_STORE = 16  # the widest store of a thread

# float16 conversions as PTX, because CUDA's headers are not on every machine.
CUDA_CONVERSIONS = """
__device__ float of_half(unsigned short bits) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits)); return f; }
__device__ unsigned short to_half(float f) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}
__device__ unsigned int bits_of(float f) { return __float_as_uint(f); }
"""

KERNEL_SOURCE = """
__device__ unsigned short to_bfloat(float f) {
    unsigned int bits = bits_of(f);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
}

const int WIDE = 16 / sizeof(OUT);  // numbers in the widest store of a thread

template <int BYTES> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned int type; };
template <> struct Word<8> { typedef unsigned long long type; };

template <int COUNT> struct alignas(COUNT * sizeof(OUT)) Numbers { OUT at[COUNT]; };

// A thread's unit: one load of COUNT codes becomes one store of as many numbers.
template <int BITS, int COUNT, class Value>
__device__ void unpack(const unsigned char* codes, OUT* out, int unit, Value value) {
    typedef typename Word<COUNT * BITS / 8>::type Codes;
    Codes word = ((const Codes*)codes)[unit];
    Numbers<COUNT> numbers;
    for (int i = 0; i < COUNT; i++) numbers.at[i] = ROUND(value((int)(word >> BITS * i) & ((1 << BITS) - 1)));
    ((Numbers<COUNT>*)out)[unit] = numbers;
}

// Rows whose length is not a multiple of WIDE are unpacked byte by byte.
template <class Value>
__device__ void unpack(const unsigned char* codes, OUT* out, int unit, int bits, int wide, Value value) {
    if (wide) {
        if (bits == 2) unpack<2, WIDE>(codes, out, unit, value);
        else if (bits == 4) unpack<4, WIDE>(codes, out, unit, value);
        else unpack<8, WIDE>(codes, out, unit, value);
    } else {
        if (bits == 2) unpack<2, 4>(codes, out, unit, value);
        else if (bits == 4) unpack<4, 2>(codes, out, unit, value);
        else unpack<8, 1>(codes, out, unit, value);
    }
}

extern "C" __global__ void unpack_groups(
    const unsigned char* codes, const unsigned char* scales, const unsigned char* offsets, const unsigned short* meta,
    OUT* out, int units, int row_units, int bits, int wide, int group_units
) {
    int unit = blockIdx.x * blockDim.x + threadIdx.x;
    if (unit >= units) return;
    int group = unit / group_units;
    const unsigned short* m = meta + 4 * (unit / row_units);
    // Rounded after each step, as torch does; the compiler must not fuse them.
    float scale = of_half(to_half(__fadd_rn(of_half(m[0]), __fmul_rn(scales[group], of_half(m[1])))));
    float offset = of_half(to_half(__fadd_rn(of_half(m[2]), __fmul_rn(offsets[group], of_half(m[3])))));
    unpack(codes, out, unit, bits, wide, [=](int code) { return __fadd_rn(__fmul_rn(code, scale), offset); });
}

extern "C" __global__ void unpack_whole_rows(
    const unsigned char* codes, const unsigned short* affine, OUT* out, int units, int row_units, int bits, int wide
) {
    int unit = blockIdx.x * blockDim.x + threadIdx.x;
    if (unit >= units) return;
    const unsigned short* a = affine + 2 * (unit / row_units);
    float scale = of_half(a[0]), offset = of_half(a[1]);
    unpack(codes, out, unit, bits, wide, [=](int code) { return __fadd_rn(__fmul_rn(code, scale), offset); });
}

extern "C" __global__ void unpack_rows(
    const unsigned char* codes, const unsigned char* zeros, const float* deltas, OUT* out, int units, int row_units,
    int bits, int wide
) {
    int unit = blockIdx.x * blockDim.x + threadIdx.x;
    if (unit >= units) return;
    int zero = zeros[unit / row_units];
    float delta = deltas[unit / row_units];
    unpack(codes, out, unit, bits, wide, [=](int code) { return __fmul_rn(code - zero, delta); });
}
"""
OUTPUT_TYPES = {
    torch.float32: ("float", "(f)"),
    torch.float16: ("unsigned short", "to_half(f)"),
    torch.bfloat16: ("unsigned short", "to_bfloat(f)"),
}


def build_source(dtype: torch.dtype, conversions: str = CUDA_CONVERSIONS) -> str:
    """Return the source of the kernels that write `dtype`."""
    out, rounded = OUTPUT_TYPES[dtype]
    return f"#define OUT {out}\n#define ROUND(f) {rounded}\n{conversions}{KERNEL_SOURCE}"


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """A compiled kernel, launched through the driver: launching it through torch takes longer than a small layer."""

    compiled: Any  # torch's kernel object, which keeps the loaded module alive
    driver: ctypes.CDLL

    def launch(self, blocks: int, pointers: list[int], numbers: list[int]) -> None:
        """Launch on the current stream of the current GPU. Raises RuntimeError as torch does."""
        values = [*map(ctypes.c_void_p, pointers), *map(ctypes.c_int, numbers)]
        arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = self.compiled.func
        error = self.driver.cuLaunchKernel(function, blocks, 1, 1, THREADS_PER_BLOCK, 1, 1, 0, stream, arguments, None)
        if error:
            torch.cuda._utils._check_cuda(error)  # raises with the driver's message


@cache
def get_cuda_kernel(name: str, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    """Compile a kernel for the GPU. Raises what torch, NVRTC or the driver raise."""
    with torch.cuda.device(device), without_toolkit():
        return CudaKernel(torch.cuda._compile_kernel(build_source(dtype), name), ctypes.CDLL("libcuda.so.1"))


@contextlib.contextmanager
def without_toolkit() -> Iterator[None]:
    """Let torch compile without a CUDA toolkit: it looks for the toolkit's headers, which our source does not need."""
    before = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = before or "/nonexistent"
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


def launch_cuda_kernel(
    name: str, tensors: dict[str, Tensor], out: Tensor, bits: int, group_size: int | None = None
) -> None:
    """Dequantize the codes, the first of `tensors`, into `out` [O, K]. All tensors must be contiguous."""
    columns = out.shape[1]
    count, is_wide = codes_per_thread(columns, bits, out.dtype)
    numbers = [out.numel() // count, columns // count, bits, int(is_wide)]
    if group_size is not None:
        numbers.append(group_size // count)
    pointers = [tensor.data_ptr() for tensor in (*tensors.values(), out)]
    blocks = -(-out.numel() // count // THREADS_PER_BLOCK)
    with torch.cuda.device(out.device):
        get_cuda_kernel(name, out.dtype, out.device).launch(blocks, pointers, numbers)


def codes_per_thread(columns: int, bits: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Return how many codes of a row a thread takes, and whether they fill its widest store."""
    wide = BYTES_PER_STORE // dtype.itemsize
    return (wide, True) if columns % wide == 0 else (8 // bits, False)
