"""The CUDA kernels' arithmetic, compiled for the processor: the same source with the card's instructions spelt in C.

What only a card can tell is in test_gpu.py.
"""

import ctypes
import shutil
import subprocess

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from tinysd_batch.model import fbgemm, kernels, unpacking
from tinysd_batch.model.packing import ROW, Layout, PackedWeight, Weight, WholeRowWeight

COMPILER = shutil.which("g++")

# A float is widened to double for products and sums: exact there, and rounded once on the way back, as on the card.
PROCESSOR = """
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
LOOPS = """
extern "C" void all_groups(void* codes, void* scales, void* offsets, void* meta, void* out, int n, int row, int bits,
                           int wide, int group) {
    blockDim.x = 1;
    for (blockIdx.x = 0; blockIdx.x < n + 3; blockIdx.x++)
        unpack_groups((unsigned char*)codes, (unsigned char*)scales, (unsigned char*)offsets,
                      (unsigned short*)meta, (OUT*)out, n, row, bits, wide, group);
}
extern "C" void all_whole_rows(void* codes, void* affine, void* out, int n, int row, int bits, int wide) {
    blockDim.x = 1;
    for (blockIdx.x = 0; blockIdx.x < n + 3; blockIdx.x++)
        unpack_whole_rows((unsigned char*)codes, (unsigned short*)affine, (OUT*)out, n, row, bits, wide);
}
extern "C" void all_rows(void* codes, void* zeros, void* deltas, void* out, int n, int row, int bits, int wide) {
    blockDim.x = 1;
    for (blockIdx.x = 0; blockIdx.x < n + 3; blockIdx.x++)
        unpack_rows((unsigned char*)codes, (unsigned char*)zeros, (float*)deltas, (OUT*)out, n, row, bits, wide);
}
"""


@pytest.fixture(scope="module", params=kernels.OUTS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module")
def library(dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels that write `dtype`, compiled."""
    if COMPILER is None:
        pytest.skip("no g++ here to compile the kernels with")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cpp").write_text(kernels.source(dtype, PROCESSOR) + LOOPS)
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", folder / "k.so", folder / "kernels.cpp"], check=True)
    return ctypes.CDLL(str(folder / "k.so"))


def random_weight(layout: Layout, columns: int) -> Weight:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randint(0, 256 if kind == torch.uint8 else 2**14, shape, generator=generator).to(kind)
        for name, (kind, shape) in layout.tensors(37, columns).items()
    }
    if layout.group_size is None:
        tensors["qdelta"] = torch.rand(37, generator=generator).view(torch.int32)
    return layout.weight(tensors)


IN_GROUPS = [Layout(2, 64), Layout(2, 16), Layout(4, 64), Layout(8, 32), Layout(2, 256)]
IN_ROWS = [Layout(2, ROW), Layout(4, ROW), Layout(8, ROW), Layout(2, None), Layout(8, None)]
CASES = [*((layout, 768) for layout in IN_GROUPS + IN_ROWS), *((layout, 36) for layout in IN_ROWS)]


@pytest.mark.parametrize(("layout", "columns"), CASES, ids=str)
def test_kernels_unpack_to_the_bit_as_plain_torch_does(
    library: ctypes.CDLL, layout: Layout, columns: int, dtype: torch.dtype
) -> None:
    weight = random_weight(layout, columns)
    found = torch.zeros(weight.shape, dtype=dtype)
    tensors: list[Tensor] = [*weight.tensors().values(), found]
    count, wide = kernels.codes_at_once(columns, weight.bits, dtype)
    sizes = [found.numel() // count, columns // count, weight.bits, int(wide)]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    if isinstance(weight, PackedWeight):
        library.all_groups(*pointers, *sizes, weight.group_size // count)
    elif isinstance(weight, WholeRowWeight):
        library.all_whole_rows(*pointers, *sizes)
    else:
        library.all_rows(*pointers, *sizes)
    expected = unpacking.unpack(weight, torch.empty(weight.shape, dtype=dtype), fbgemm.unpack_rows_torch)
    assert torch.equal(found, expected)


def test_torch_compiles_without_a_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for the toolkit's headers before it compiles anything, though our source includes none."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(OSError, match="CUDA_HOME"):
        cpp_extension.include_paths("cuda")
    with kernels.without_toolkit():
        assert cpp_extension.include_paths("cuda")
    assert cpp_extension.CUDA_HOME is None
