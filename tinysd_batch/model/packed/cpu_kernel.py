"""Unpacking on the processor: the library that was compiled of unpack.c when the package was built.

A build without a C compiler has none; then torch's operators unpack, at a multiple of the cost (benchmarks/ prints it).
"""

import contextlib
import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tinysd_batch.model.packed import cpu_build
from tinysd_batch.model.packed.format import AffineRowWeight, GroupWeight, PackedWeight

WEIGHTS_PER_TASK = 2**15  # weights, more or less, that a thread takes
MIN_PARALLEL_WEIGHTS = 2**16  # weights; for fewer no second thread is woken
OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # numbered as in the source
KIND_GROUPS, KIND_AFFINE_ROWS, KIND_ZERO_POINT_ROWS = range(3)


class KernelArguments(ctypes.Structure):
    """What the source calls `struct work`."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p * 3),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "row_lines", "columns", "next", "at_once")),
        *((name, ctypes.c_int32) for name in ("bits", "kind", "type")),
    )


def run_cpu_kernel(weight: PackedWeight, out: Tensor, function: ctypes.c_void_p | None = None) -> None:
    """Unpack into `out` [O, K], contiguous, by this processor's library or by another's `function`.

    Raises OSError where there is no library.
    """
    assert out.is_contiguous(), out.stride()
    codes, *parameters = (tensor.contiguous() for tensor in weight.tensors().values())
    rows, columns = out.shape
    lines, kind = 1, KIND_ZERO_POINT_ROWS
    if isinstance(weight, GroupWeight):
        lines, kind = columns // weight.group_size, KIND_GROUPS
    elif isinstance(weight, AffineRowWeight):
        kind = KIND_AFFINE_ROWS
    pointers = [one.data_ptr() for one in parameters] + [None] * (3 - len(parameters))
    work = KernelArguments(
        codes.data_ptr(), (ctypes.c_void_p * 3)(*pointers), out.data_ptr(), rows, lines, columns // lines,
        0, max(1, WEIGHTS_PER_TASK // columns), weight.bits, kind, OUTPUT_DTYPES.index(out.dtype),
    )  # fmt: skip
    run_on_threads(
        function or get_cpu_kernel(), work, 1 if out.numel() < MIN_PARALLEL_WEIGHTS else torch.get_num_threads()
    )


@cache
def get_cpu_kernel() -> ctypes.c_void_p:
    """The address of the source's `unpack`."""
    path = cpu_build.library_path(cpu_build.choose_target(torch.backends.cpu.get_cpu_capability()))
    return ctypes.cast(ctypes.CDLL(str(path)).unpack, ctypes.c_void_p)


def run_on_threads(function: ctypes.c_void_p, work: KernelArguments, threads: int) -> None:
    """Have so many threads call a function with the same work, this one among them."""
    openmp = find_openmp_library() if threads > 1 else None
    if openmp is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.value or 0)(ctypes.addressof(work))
    else:
        openmp.GOMP_parallel(function, ctypes.byref(work), threads, 0)


@cache
def find_openmp_library() -> ctypes.CDLL | None:
    """The OpenMP library whose threads torch works with: a second set of threads would fight them for the cores.

    `GOMP_parallel` is what compilers call at a parallel region; GNU's library, Intel's and LLVM's have it. None where
    no such library is found; then one thread unpacks.
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}
        found = [path for path in mapped if path.name.startswith(("libgomp", "libiomp", "libomp"))]
        for path in sorted(found, key=lambda path: "torch" not in path.parts):
            library = ctypes.CDLL(str(path))
            if hasattr(library, "GOMP_parallel"):
                return library
    return None
