import json
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.safetensors_mmap import SAFETENSORS_DTYPES, MappedTensors, write_safetensors

STATUS = Path("/proc/self/status")


def resident_mb() -> float:
    """Return the resident memory of mapped files of this process."""
    return int(STATUS.read_text().partition("RssFile:")[2].split()[0]) / 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{number}": torch.randn(1_000_001, generator=generator) for number in range(8)}  # 4 MB each
    save_file({**tensors, "scalar": torch.tensor(3.0), "none": torch.empty(0, 4)}, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def test_tensors_equal_those_of_the_library(path: Path) -> None:
    expected, mapped = load_file(path), MappedTensors.read(path)
    assert expected.keys() == mapped.keys()
    assert all(torch.equal(value, mapped[name]) for name, value in expected.items())


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux reports the resident memory of files")
@pytest.mark.parametrize("by_name", [True, False])
def test_released_pages_leave_memory_and_can_be_read_again(path: Path, by_name: bool) -> None:
    tensors = MappedTensors.read(path)
    before = resident_mb()
    sums = {name: value.sum() for name, value in tensors.items()}
    assert resident_mb() > before + 25
    tensors.release(list(tensors.values())[:6] if by_name else None)
    assert resident_mb() < before + 10
    assert {name: value.sum() for name, value in tensors.items()} == sums


def test_renaming_to_none_removes_tensors(path: Path) -> None:
    tensors = MappedTensors.read(path)
    third = tensors["layer.3"]
    tensors.rename(lambda name: "third" if name == "layer.3" else None)
    assert tensors.keys() == {"third"}
    assert tensors["third"] is third


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    wide_dtypes = [dtype for dtype in SAFETENSORS_DTYPES.values() if dtype.itemsize > 1]
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in wide_dtypes}
    tensors["transposed"] = torch.arange(6.0).view(2, 3).T
    dtypes = {name: value.dtype for name, value in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", tensors, dtypes, tensors.__getitem__)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(value, loaded[name]) for name, value in tensors.items())


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing"):
        MappedTensors.read(tmp_path / "no.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        MappedTensors.read(tmp_path / "cut.safetensors")


def test_far_too_many_tensors_are_refused_quickly(tmp_path: Path) -> None:
    """Regression: the time to convert such a file was once quadratic in the number of tensors."""
    names = [f"model.diffusion_model.input_blocks.{number}.0.weight" for number in range(200_000)]
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    start = time.process_time()
    with pytest.raises(ModelError, match="200,000 tensors; at most 50,000 are read"):
        MappedTensors.read(path)
    assert time.process_time() - start < 1
