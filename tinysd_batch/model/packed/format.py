"""Weights at 2, 4 and 8 bits: how they are stored, on disk and in memory alike. unpacking.py makes floats of them.

A weight is a matrix [O, K]; a convolution's K runs tap by tap (kernel row, kernel column, input channel), so that an
unpacked matrix is a channels-last kernel without a copy. There are three ways of storing one.

Ours, in G = K / g groups of g weights a row:

    weight = code * scale + offset            code 0..3, 0..15 or 0..255, scale and offset float16, a pair per group

`qweight` uint8 [O, K b/8] holds the codes of b bits (at 2 bits code j of a row is in byte j // 4, bits 2 (j % 4) and
up), `qscale` and `qoff` uint8 [O, G] with `qmeta` int16 [O, 4] the rest: the bits of four float16 numbers (scale_min,
scale_step, offset_min, offset_step) that turn the bytes into scales and offsets.

Ours with one group a row, which takes fewest bytes: `qweight` as above, `qaffine` int16 [O, 2] the bits of the row's
float16 scale and offset.

The origin's, a row at a time, at 2 or 8 bits, which keeps every number of its checkpoint:

    weight = (code - zero) * delta            zero a whole number, delta float32, one pair per row

`qweight` uint8 [O, K/4] or [O, K], `qzero` uint8 [O], `qdelta` int32 [O]: the bits of float32 numbers. All tensors are
integers, because loaders cast floating ones.

So packed weights stay what the file holds, in memory too, and several processes can share the file's pages.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.text import excerpt

SUPPORTED_BITS = (2, 4, 8)
ZERO_POINT_BITS = (2, 8)  # of the origin
ZERO_POINT_ROW_KIND, AFFINE_ROW_KIND = "row", "affine_row"  # in `config.json`
GROUP_SIZES = (256, 128, 64, 32, 16)
MAX_DEFAULT_GROUP_SIZE = 64  # at most, unless a file is to be as small as it can
WHOLE_ROW = 0  # as a group's size: the whole row


@dataclass(frozen=True, slots=True)
class Layout:
    """How a matrix is stored: in groups, in one group a row (ROW), or as the origin does (None)."""

    bits: int
    group_size: int | None

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each tensor that stores a matrix [rows, columns]. Raises ModelError for odd columns."""
        if columns * self.bits % 8 or columns % (self.group_size or 1):
            raise ModelError(f"a row of {columns} weights cannot be stored in {self}")
        codes = (torch.uint8, (rows, columns * self.bits // 8))
        if self.group_size is None:
            return {"qweight": codes, "qzero": (torch.uint8, (rows,)), "qdelta": (torch.int32, (rows,))}
        if self.group_size == WHOLE_ROW:
            return {"qweight": codes, "qaffine": (torch.int16, (rows, 2))}
        groups = (torch.uint8, (rows, columns // self.group_size))
        return {"qweight": codes, "qscale": groups, "qoff": groups, "qmeta": (torch.int16, (rows, 4))}

    def weight(self, tensors: Mapping[str, Tensor]) -> "PackedWeight":
        """The weight that tensors of these names store."""
        if self.group_size is None:
            return ZeroPointRowWeight(**tensors, bits=self.bits)
        if self.group_size == WHOLE_ROW:
            return AffineRowWeight(**tensors, bits=self.bits)
        return GroupWeight(**tensors, bits=self.bits)

    def group_size_in(self, columns: int) -> int:
        """How many weights of a row of so many share a scale; not for the origin's layouts."""
        assert self.group_size is not None, self
        return columns if self.group_size == WHOLE_ROW else self.group_size

    def nbytes(self, rows: int, columns: int) -> int:
        """What a matrix takes."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors(rows, columns).values())

    def __str__(self) -> str:
        how = {None: "rows of the origin", WHOLE_ROW: "whole rows"}.get(self.group_size, f"groups of {self.group_size}")
        return f"{self.bits} bits in {how}"

    def to_config_entry(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """What `config.json` says of a layer."""
        kinds: dict[int | None, dict[str, Any]] = {
            None: {"kind": ZERO_POINT_ROW_KIND},
            WHOLE_ROW: {"kind": AFFINE_ROW_KIND},
        }
        how = kinds.get(self.group_size, {"group_size": self.group_size})
        return {"bits": self.bits, **how, "shape": list(shape)}

    @classmethod
    def from_config_entry(cls, entry: Mapping[str, Any]) -> Self:
        """Raises ModelError for an entry that is none."""
        bits, kind, size = entry.get("bits"), entry.get("kind"), entry.get("group_size")
        if kind == ZERO_POINT_ROW_KIND and isinstance(bits, int) and bits in ZERO_POINT_BITS:
            return cls(bits, None)
        if isinstance(bits, int) and bits in SUPPORTED_BITS:
            if kind == AFFINE_ROW_KIND:
                return cls(bits, WHOLE_ROW)
            if isinstance(size, int) and size in GROUP_SIZES:
                return cls(bits, size)
        raise ModelError(
            f"{excerpt(dict(entry))}: a layer at 2, 4 or 8 bits in groups of 16, 32, 64, 128 or 256 was expected"
        )


@dataclass(frozen=True, slots=True)
class PackedWeightBase(ABC):
    """What all ways of storing a matrix share; fields but `bits` are tensors, with a line for each row."""

    qweight: Tensor  # uint8 [O, K b/8]
    bits: int = field(default=2, kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        """[O, K]"""
        return self.qweight.shape[0], self.qweight.shape[1] * 8 // self.bits

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file, after the layer's."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "bits"}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""
        return type(self)(**{name: change(one) for name, one in self.tensors().items()}, bits=self.bits)

    def codes(self) -> Tensor:
        """A line for each pair of scale and offset: uint8 [N, g b/8]."""
        return self.qweight

    @abstractmethod
    def parameters(self) -> Tensor:
        """These scales and offsets, float16 [N, 2]."""

    def cut(self, rows: slice) -> Self:
        """Some rows."""
        return self.map_tensors(lambda one: one[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return self.map_tensors(lambda one: one.to(device))


@dataclass(frozen=True, slots=True)
class GroupWeight(PackedWeightBase):
    """A matrix in groups."""

    qscale: Tensor  # uint8 [O, G]
    qoff: Tensor  # uint8 [O, G]
    qmeta: Tensor  # int16 [O, 4], float16 bits

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.qscale.shape[1]

    @property
    def layout(self) -> Layout:
        return Layout(self.bits, self.group_size)

    def convert_to(self, layout: Layout) -> "GroupWeight | AffineRowWeight":
        """The same as a layout of these groups stores it: for ROW without the bytes that one group does not need."""
        assert layout.bits == self.bits, (layout, self.layout)
        assert layout.group_size_in(self.shape[1]) == self.group_size, (layout, self.layout)
        if layout.group_size != WHOLE_ROW:
            return self
        return AffineRowWeight(self.qweight, self.parameters().view(torch.int16), bits=self.bits)

    def codes(self) -> Tensor:
        """uint8 [O * G, g b/8]"""
        return self.qweight.view(-1, self.group_size * self.bits // 8)

    def parameters(self) -> Tensor:
        """float16 [O * G, 2]"""
        meta = self.qmeta.view(torch.float16).float()  # [O, 4]
        found = torch.empty(*self.qscale.shape, 2, dtype=torch.float16, device=meta.device)
        for place, numbers in enumerate((self.qscale, self.qoff)):
            least, step = meta[:, 2 * place, None], meta[:, 2 * place + 1, None]
            found[:, :, place] = numbers.float().mul_(step).add_(least)  # in place: fresh memory is dear
        return found.view(-1, 2)


@dataclass(frozen=True, slots=True)
class AffineRowWeight(PackedWeightBase):
    """A matrix with one group a row."""

    qaffine: Tensor  # int16 [O, 2], float16 bits of scale and offset

    @property
    def layout(self) -> Layout:
        return Layout(self.bits, WHOLE_ROW)

    def parameters(self) -> Tensor:
        return self.qaffine.view(torch.float16)


@dataclass(frozen=True, slots=True)
class ZeroPointRowWeight(PackedWeightBase):
    """A matrix as the origin stores it, at 2 or 8 bits with one delta and zero a row."""

    qzero: Tensor  # uint8 [O]
    qdelta: Tensor  # int32 [O], float32 bits

    @property
    def layout(self) -> Layout:
        return Layout(self.bits, None)

    def parameters(self) -> Tensor:
        """Of codes less their zero: delta is no float16."""
        zero = self.qzero.half()
        return torch.stack([torch.ones_like(zero), -zero], dim=1)


PackedWeight = GroupWeight | AffineRowWeight | ZeroPointRowWeight


def choose_group_size(columns: int) -> int | None:
    """The largest usual group that divides a row of so many weights; None where the matrix is too narrow to pack."""
    return next(
        (size for size in GROUP_SIZES if size <= MAX_DEFAULT_GROUP_SIZE and columns % size == 0 and columns >= size),
        None,
    )


def to_matrix(weight: Tensor) -> Tensor:
    """A linear [O, K] or convolution [O, I, kh, kw] weight as a matrix [O, K], tap-major."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes 0..2^b - 1 [..., K] to uint8 [..., K b/8], the first code in the lowest bits."""
    assert codes.dtype == torch.uint8, codes.dtype
    assert codes.shape[-1] * bits % 8 == 0, codes.shape
    fields = codes.view(*codes.shape[:-1], -1, 8 // bits)
    packed = fields[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= fields[..., place] << bits * place
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [..., K b/8] to uint8 [..., K]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def get_scales_and_offsets(weight: GroupWeight) -> tuple[Tensor, Tensor]:
    """Scale and offset of every group, float16 [O, G] each."""
    scale, offset = weight.parameters().view(*weight.qscale.shape, 2).unbind(dim=2)
    return scale, offset


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_matrix`."""
    if len(shape) == 2:
        return matrix
    return matrix.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2).contiguous()
