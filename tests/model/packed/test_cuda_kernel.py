"""The arithmetic and launch of the CUDA kernels: compiled for the CPU, and on a real GPU."""

import pytest
import torch
from torch.utils import cpp_extension

from tests.support.fake_cuda.device import FakeCudaDevice
from tinysd_batch.model.packed import cuda_kernel, dequantize, fbgemm
from tinysd_batch.model.packed.format import WHOLE_ROW, Layout, PackedWeight


def random_weight(layout: Layout, columns: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randint(0, 256 if dtype == torch.uint8 else 2**14, shape, generator=generator).to(dtype)
        for name, (dtype, shape) in layout.tensors(37, columns).items()
    }
    if layout.group_size is None:
        tensors["qdelta"] = torch.rand(37, generator=generator).view(torch.int32)
    return layout.weight(tensors)


IN_GROUPS = [Layout(2, 64), Layout(2, 16), Layout(4, 64), Layout(8, 32), Layout(2, 256)]
IN_ROWS = [Layout(2, WHOLE_ROW), Layout(4, WHOLE_ROW), Layout(8, WHOLE_ROW), Layout(2, None), Layout(8, None)]
CASES = [*((layout, 768) for layout in IN_GROUPS + IN_ROWS), *((layout, 36) for layout in IN_ROWS)]


@pytest.mark.parametrize("dtype", cuda_kernel.OUTPUT_TYPES, ids=str)
@pytest.mark.parametrize(("layout", "columns"), CASES, ids=str)
def test_kernels_are_bit_identical_to_plain_torch(
    cuda_device: FakeCudaDevice | None, layout: Layout, columns: int, dtype: torch.dtype
) -> None:
    device = torch.device("cuda", 0)
    weight = random_weight(layout, columns)
    out = torch.zeros(weight.shape, dtype=dtype, device=device)
    dequantize.dequantize_with_kernel(weight.map_tensors(lambda tensor: tensor.to(device)), out)
    expected = dequantize.dequantize(weight, torch.empty(weight.shape, dtype=dtype), fbgemm.dequantize_rows_torch)
    assert torch.equal(out.cpu(), expected)
    assert cuda_device is None or cuda_device.counts["launched"] == 1


def test_torch_compiles_without_a_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch looks for the toolkit's headers before it compiles anything, although our source includes none."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(OSError, match="CUDA_HOME"):
        cpp_extension.include_paths("cuda")
    with cuda_kernel.without_toolkit():
        assert cpp_extension.include_paths("cuda")
    assert cpp_extension.CUDA_HOME is None
