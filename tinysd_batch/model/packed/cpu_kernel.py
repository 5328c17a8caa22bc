"""Dequantize on the CPU with the library that was compiled from unpack.c when the package was built.

A build without a C compiler has no library. Then torch's operators dequantize, several times slower (benchmarks/
measures it).
"""

import contextlib
import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tinysd_batch.model.packed import cpu_build
from tinysd_batch.model.packed.format import AffineRowWeight, GroupWeight, PackedWeight

WEIGHTS_PER_TASK = 2**15  # roughly what a thread takes at a time
MIN_PARALLEL_WEIGHTS = 2**16  # fewer weights are dequantized by one thread
OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of the C source's enum
KIND_GROUPS, KIND_AFFINE_ROWS, KIND_ZERO_POINT_ROWS = range(3)


class KernelArguments(ctypes.Structure):
    """`struct work` of the C source."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p * 3),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "row_lines", "columns", "next", "at_once")),
        *((name, ctypes.c_int32) for name in ("bits", "kind", "type")),
    )


def run_cpu_kernel(weight: PackedWeight, out: Tensor, function: ctypes.c_void_p | None = None) -> None:
    """Dequantize into `out` [O, K], which must be contiguous, with this CPU's library or with `function` of another.

    Raises OSError if there is no library.
    """
    assert out.is_contiguous(), out.stride()
    codes, *parameters = (tensor.contiguous() for tensor in weight.tensors().values())
    rows, columns = out.shape
    lines_per_row, layout_kind = 1, KIND_ZERO_POINT_ROWS
    if isinstance(weight, GroupWeight):
        lines_per_row, layout_kind = columns // weight.group_size, KIND_GROUPS
    elif isinstance(weight, AffineRowWeight):
        layout_kind = KIND_AFFINE_ROWS
    pointers = [tensor.data_ptr() for tensor in parameters] + [None] * (3 - len(parameters))
    arguments = KernelArguments(
        codes=codes.data_ptr(),
        parameters=(ctypes.c_void_p * 3)(*pointers),
        out=out.data_ptr(),
        rows=rows,
        row_lines=lines_per_row,
        columns=columns // lines_per_row,
        next=0,
        at_once=max(1, WEIGHTS_PER_TASK // columns),
        bits=weight.bits,
        kind=layout_kind,
        type=OUTPUT_DTYPES.index(out.dtype),
    )
    threads = 1 if out.numel() < MIN_PARALLEL_WEIGHTS else torch.get_num_threads()
    run_on_threads(function or get_cpu_kernel(), arguments, threads)


@cache
def get_cpu_kernel() -> ctypes.c_void_p:
    """Return the address of the C function `unpack` for this CPU. Raises OSError if there is no library."""
    path = cpu_build.library_path(cpu_build.choose_target(torch.backends.cpu.get_cpu_capability()))
    return ctypes.cast(ctypes.CDLL(str(path)).unpack, ctypes.c_void_p)


def run_on_threads(function: ctypes.c_void_p, arguments: KernelArguments, threads: int) -> None:
    """Call a C function with the same arguments on so many threads, including this one."""
    openmp = find_openmp_library() if threads > 1 else None
    if openmp is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.value or 0)(ctypes.addressof(arguments))
    else:
        openmp.GOMP_parallel(function, ctypes.byref(arguments), threads, 0)


@cache
def find_openmp_library() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch uses: a second set of threads would compete with torch's for the cores.

    `GOMP_parallel` is what compilers call at a parallel region. The libraries of GNU, Intel and LLVM have it. Without
    such a library return None; then one thread dequantizes.
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped_files = {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}
        candidates = [path for path in mapped_files if path.name.startswith(("libgomp", "libiomp", "libomp"))]
        for path in sorted(candidates, key=lambda path: "torch" not in path.parts):
            library = ctypes.CDLL(str(path))
            if hasattr(library, "GOMP_parallel"):
                return library
    return None
