"""Unpacking on CUDA: kernels compiled at run time for the very card, old ones too, which Triton no longer serves.

They go through torch's own door to NVRTC. A card may use them once they have unpacked known weights to the bit as plain
torch does; whatever goes wrong before that, plain torch unpacks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

THREADS = 256  # in a block; each unpacks the codes of a byte

# The types of the hardware, without CUDA's headers, which are not on every machine.
CONVERSIONS = """
__device__ float of_half(unsigned short bits) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits)); return f; }
__device__ unsigned short to_half(float f) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}
__device__ unsigned int bits_of(float f) { return __float_as_uint(f); }
"""

KERNELS = """
__device__ unsigned short to_bfloat(float f) {
    unsigned int bits = bits_of(f);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
}

__device__ void write(OUT* out, int at, float f) { out[at] = ROUND(f); }

extern "C" __global__ void unpack_groups(
    const unsigned char* codes, const unsigned char* scales, const unsigned char* offsets, const unsigned short* meta,
    OUT* out, int bytes, int row_bytes, int bits, int group_bytes
) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= bytes) return;
    int row = at / row_bytes, group = at / group_bytes;
    const unsigned short* m = meta + 4 * row;
    // Rounded after each step, as torch does; the compiler must not fuse them.
    float scale = of_half(to_half(__fadd_rn(of_half(m[0]), __fmul_rn(scales[group], of_half(m[1])))));
    float offset = of_half(to_half(__fadd_rn(of_half(m[2]), __fmul_rn(offsets[group], of_half(m[3])))));
    int count = 8 / bits, mask = (1 << bits) - 1;
    for (int i = 0; i < count; i++)
        write(out, count * at + i, __fadd_rn(__fmul_rn((codes[at] >> bits * i) & mask, scale), offset));
}

extern "C" __global__ void unpack_rows(
    const unsigned char* codes, const unsigned char* zeros, const float* deltas, OUT* out, int bytes, int row_bytes,
    int bits
) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= bytes) return;
    int row = at / row_bytes;
    int count = 8 / bits, mask = (1 << bits) - 1;
    for (int i = 0; i < count; i++)
        write(out, count * at + i, __fmul_rn(((codes[at] >> bits * i) & mask) - zeros[row], deltas[row]));
}
"""
OUTS = {
    torch.float32: ("float", "(f)"),
    torch.float16: ("unsigned short", "to_half(f)"),
    torch.bfloat16: ("unsigned short", "to_bfloat(f)"),
}


def source(dtype: torch.dtype, conversions: str = CONVERSIONS) -> str:
    """The kernels that write `dtype`."""
    out, rounded = OUTS[dtype]
    return f"#define OUT {out}\n#define ROUND(f) {rounded}\n{conversions}{KERNELS}"


@cache
def kernel(name: str, dtype: torch.dtype, device: torch.device) -> Callable[..., None]:
    """Compiled for the card; raises whatever torch, NVRTC or the driver raise."""
    with torch.cuda.device(device):
        compiled: Callable[..., None] = torch.cuda._compile_kernel(source(dtype), name)
    return compiled


def launch(name: str, tensors: dict[str, Tensor], out: Tensor, *sizes: int) -> None:
    """Unpack the codes of `tensors`, its first, into `out` [O, K], both contiguous."""
    codes, *others = (tensor.contiguous() for tensor in tensors.values())
    arguments: list[Any] = [codes, *others, out, codes.numel(), codes.shape[1], *sizes]
    blocks = -(-codes.numel() // THREADS)
    with torch.cuda.device(out.device):
        kernel(name, out.dtype, out.device)(grid=(blocks, 1, 1), block=(THREADS, 1, 1), args=arguments)
