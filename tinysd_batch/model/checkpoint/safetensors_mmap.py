"""Read safetensors files by mapping them into memory; write them one tensor at a time.

Mapped pages are read on first use, shared by all processes, and given back to the system on request.
"""

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.storage.atomic import check_regular_file

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
SAFETENSORS_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
LENGTH_FIELD_BYTES = 8  # the header's length, at the start of the file; the header is padded to a multiple of it, too
# Each tensor costs time and memory. A full SD v1 checkpoint with EMA copies and optimizer states has about 4,000.
MAX_TENSORS = 50_000


class MappedTensors(dict[str, Tensor]):
    """The tensors of a file by name. They must not be written to.

    They are views into one private mapping. Pages that were read take memory that is shared with other processes;
    `release` gives them back, and reading them again takes them from the system's page cache.
    """

    mapping: mmap.mmap
    byte_ranges: dict[int, tuple[int, int]]  # address of a tensor -> offset in the file, length

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map a file after checking it. Raises ModelError for a file that is missing or damaged."""
        try:
            check_regular_file(path)
            check_max_tensors(path)
            with safe_open(path, framework="pt"):  # checks the header: sizes, offsets, no unused bytes
                pass
            return cls.map(path)
        except FileNotFoundError:
            raise ModelError(f"{path}: missing; the model folder is not complete") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a readable safetensors file: {error}") from None

    @classmethod
    def map(cls, path: Path) -> Self:
        """Map a file whose header was checked. Raises ModelError for an unknown dtype or too many tensors."""
        tensors = cls()
        with path.open("rb") as file:
            tensors.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(tensors.mapping[:LENGTH_FIELD_BYTES], "little")
        entries = json.loads(tensors.mapping[LENGTH_FIELD_BYTES : LENGTH_FIELD_BYTES + length])
        if len(entries) > MAX_TENSORS:
            raise too_many_tensors_error(path, len(entries))
        tensors.byte_ranges = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise ModelError(f"{path}: tensor {name} is of type {entry['dtype']}, which this program does not read")
            start, end = (LENGTH_FIELD_BYTES + length + offset for offset in entry["data_offsets"])
            tensors[name] = value = view_tensor(
                tensors.mapping, start, SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
            )
            tensors.byte_ranges[value.data_ptr()] = start, end - start
        return tensors

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Rename tensors; those whose new name is None are removed."""
        entries = [(new_name(name), value) for name, value in self.items()]
        self.clear()
        self.update({name: value for name, value in entries if name is not None})

    def release(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Remove the pages of these tensors, or of all, from this process's memory."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        if tensors is None:
            self.mapping.madvise(mmap.MADV_DONTNEED)
            return
        for tensor in tensors:
            start, length = self.byte_ranges.get(tensor.data_ptr(), (0, 0))
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: the rest belongs to neighbours too
            whole = (start + length - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if whole > 0:
                self.mapping.madvise(mmap.MADV_DONTNEED, first, whole)


def check_max_tensors(path: Path) -> None:
    """Raise ModelError for far too many tensors, before the header is parsed."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_FIELD_BYTES), "little")
        if length > path.stat().st_size:
            return  # damaged, which safe_open reports
        count = file.read(length).count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise too_many_tensors_error(path, count)


def too_many_tensors_error(path: Path, count: int) -> ModelError:
    return ModelError(f"{path}: {count:,} tensors; at most {MAX_TENSORS:,} are read")


def view_tensor(mapping: mmap.mmap, start: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Return a tensor that views the mapping from byte `start` on; a copy if it is not aligned."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if start % dtype.itemsize:  # the format does not ask for alignment
        data = bytearray(mapping[start : start + count * dtype.itemsize])
        return torch.frombuffer(data, dtype=dtype).view(shape)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start).view(shape)


# Writing


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], load_tensor: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file with one tensor in memory at a time; the library would need all of them.

    Args:
        path: the file to write.
        tensors: name -> tensor of the right shape; its values are not used.
        dtypes: name -> dtype in the file.
        load_tensor: returns a tensor by name, of that shape and dtype.
    """
    order = sort_names_for_file(dtypes)
    with path.open("wb") as file:
        file.write(encode_header(tensors, dtypes, order))
        for name in order:
            file.write(load_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().data)


def compute_file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of a file of these tensors, which may be meta tensors."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    header = encode_header(tensors, dtypes, sort_names_for_file(dtypes))
    return len(header) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def sort_names_for_file(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Return the names in the library's order: widest dtype first, then by name."""
    return sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))


def encode_header(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], order: list[str]) -> bytes:
    """Return the header's length and the header: JSON, padded to a multiple of eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        end = start + tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": SAFETENSORS_DTYPE_NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_FIELD_BYTES)
    return struct.pack("<Q", len(text)) + text
