"""The formats of packed weights at 2, 4 and 8 bits, on disk and in memory alike.

A weight is a matrix [O, K]; a convolution's K runs tap by tap (kernel row, kernel column, input channel), so that an
dequantized matrix is a channels-last kernel without a copy. There are three formats.

Groups (`GroupWeight`), G = K / g groups of g weights per row:

    weight = code * scale + offset            code 0..3, 0..15 or 0..255, scale and offset float16, one pair per group

`qweight` uint8 [O, K b/8] holds the codes of b bits (at 2 bits code j of a row is in byte j // 4, bits 2 (j % 4) and
up). `qscale` and `qoff` uint8 [O, G] hold scales and offsets as bytes, `qmeta` int16 [O, 4] the bits of four float16
numbers (scale_min, scale_step, offset_min, offset_step) that turn these bytes into numbers.

Whole rows (`AffineRowWeight`), the smallest format: `qweight` as above, `qaffine` int16 [O, 2] holds the bits of the
row's float16 scale and offset.

Rows with a zero point (`ZeroPointRowWeight`), the format of tiny-stable-diffusion at 2 or 8 bits, which keeps all
numbers of its checkpoint exactly:

    weight = (code - zero) * delta            zero an integer, delta float32, one pair per row

`qweight` uint8 [O, K/4] or [O, K], `qzero` uint8 [O], `qdelta` int32 [O] the bits of float32 numbers.

All tensors are integers, because loaders cast floating-point tensors. So packed weights are the file's own bytes in
memory, too, and several processes can share the file's pages.
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
ZERO_POINT_BITS = (2, 8)  # of tiny-stable-diffusion
ZERO_POINT_ROW_KIND, AFFINE_ROW_KIND = "row", "affine_row"  # in `config.json`
GROUP_SIZES = (256, 128, 64, 32, 16)
MAX_DEFAULT_GROUP_SIZE = 64  # larger groups are used only to make a file as small as possible
WHOLE_ROW = 0  # as a group size: one group per row


@dataclass(frozen=True, slots=True)
class Layout:
    """How a matrix is stored: in groups, in whole rows (WHOLE_ROW), or in rows with a zero point (None)."""

    bits: int
    group_size: int | None

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each tensor that stores a matrix [rows, columns].

        Raises ModelError if rows of so many columns cannot be stored.
        """
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
        """Return the weight that these tensors store, by name."""
        if self.group_size is None:
            return ZeroPointRowWeight(**tensors, bits=self.bits)
        if self.group_size == WHOLE_ROW:
            return AffineRowWeight(**tensors, bits=self.bits)
        return GroupWeight(**tensors, bits=self.bits)

    def group_size_in(self, columns: int) -> int:
        """Return how many weights of a row share a scale. Not for rows with a zero point."""
        assert self.group_size is not None, self
        return columns if self.group_size == WHOLE_ROW else self.group_size

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the size of a stored matrix."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors(rows, columns).values())

    def __str__(self) -> str:
        names = {None: "rows with a zero point", WHOLE_ROW: "whole rows"}
        return f"{self.bits} bits in {names.get(self.group_size, f'groups of {self.group_size}')}"

    def to_config_entry(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return a layer's entry in `config.json`."""
        kinds: dict[int | None, dict[str, Any]] = {
            None: {"kind": ZERO_POINT_ROW_KIND},
            WHOLE_ROW: {"kind": AFFINE_ROW_KIND},
        }
        grouping = kinds.get(self.group_size, {"group_size": self.group_size})
        return {"bits": self.bits, **grouping, "shape": list(shape)}

    @classmethod
    def from_config_entry(cls, entry: Mapping[str, Any]) -> Self:
        """Read a layer's entry in `config.json`. Raises ModelError if it is not valid."""
        bits, kind, size = entry.get("bits"), entry.get("kind"), entry.get("group_size")
        if kind == ZERO_POINT_ROW_KIND and isinstance(bits, int) and bits in ZERO_POINT_BITS:
            return cls(bits, None)
        if isinstance(bits, int) and bits in SUPPORTED_BITS:
            if kind == AFFINE_ROW_KIND:
                return cls(bits, WHOLE_ROW)
            if isinstance(size, int) and size in GROUP_SIZES:
                return cls(bits, size)
        raise ModelError(
            f"{excerpt(dict(entry))}: expected a layer at 2, 4 or 8 bits in groups of 16, 32, 64, 128 or 256"
        )


@dataclass(frozen=True, slots=True)
class PackedWeightBase(ABC):
    """Base of all formats. All fields except `bits` are tensors with one row for each row of the matrix."""

    qweight: Tensor  # uint8 [O, K b/8]
    bits: int = field(default=2, kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        """[O, K]"""
        return self.qweight.shape[0], self.qweight.shape[1] * 8 // self.bits

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the last part of their names in the file."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "bits"}

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with a function applied to every tensor."""
        return type(self)(**{name: function(tensor) for name, tensor in self.tensors().items()}, bits=self.bits)

    def codes(self) -> Tensor:
        """Return one row of codes for each pair of scale and offset, uint8 [N, g b/8]."""
        return self.qweight

    @abstractmethod
    def parameters(self) -> Tensor:
        """Return the scale and offset of each row of `codes`, float16 [N, 2]."""

    def select_rows(self, rows: slice) -> Self:
        return self.map_tensors(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        return self.map_tensors(lambda tensor: tensor.to(device))


@dataclass(frozen=True, slots=True)
class GroupWeight(PackedWeightBase):
    """A matrix in groups, each with its own scale and offset."""

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
        """Store the same groups in this layout: one group per row needs less as WHOLE_ROW."""
        assert layout.bits == self.bits, (layout, self.layout)
        assert layout.group_size_in(self.shape[1]) == self.group_size, (layout, self.layout)
        if layout.group_size != WHOLE_ROW:
            return self
        return AffineRowWeight(self.qweight, self.parameters().view(torch.int16), bits=self.bits)

    def codes(self) -> Tensor:
        """Return the codes of each group, uint8 [O * G, g b/8]."""
        return self.qweight.view(-1, self.group_size * self.bits // 8)

    def parameters(self) -> Tensor:
        """Return the scale and offset of each group, float16 [O * G, 2]."""
        meta = self.qmeta.view(torch.float16).float()  # [O, 4]
        parameters = torch.empty(*self.qscale.shape, 2, dtype=torch.float16, device=meta.device)
        for index, bytes_ in enumerate((self.qscale, self.qoff)):
            minimum, step = meta[:, 2 * index, None], meta[:, 2 * index + 1, None]
            parameters[:, :, index] = bytes_.float().mul_(step).add_(minimum)  # in place: allocating memory is slow
        return parameters.view(-1, 2)


@dataclass(frozen=True, slots=True)
class AffineRowWeight(PackedWeightBase):
    """A matrix with one scale and offset per row."""

    qaffine: Tensor  # int16 [O, 2], float16 bits of scale and offset

    @property
    def layout(self) -> Layout:
        return Layout(self.bits, WHOLE_ROW)

    def parameters(self) -> Tensor:
        return self.qaffine.view(torch.float16)


@dataclass(frozen=True, slots=True)
class ZeroPointRowWeight(PackedWeightBase):
    """A matrix as tiny-stable-diffusion stores it, at 2 or 8 bits with one delta and zero point per row."""

    qzero: Tensor  # uint8 [O]
    qdelta: Tensor  # int32 [O], float32 bits

    @property
    def layout(self) -> Layout:
        return Layout(self.bits, None)

    def parameters(self) -> Tensor:
        """Return scale 1 and offset -zero, float16 [O, 2]. `qdelta` is applied separately, since it is not float16."""
        zero = self.qzero.half()
        return torch.stack([torch.ones_like(zero), -zero], dim=1)


PackedWeight = GroupWeight | AffineRowWeight | ZeroPointRowWeight


def choose_group_size(columns: int) -> int | None:
    """Return the largest default group size that divides a row; None if the matrix is too narrow to pack."""
    sizes = (size for size in GROUP_SIZES if size <= MAX_DEFAULT_GROUP_SIZE)
    return next((size for size in sizes if columns % size == 0 and columns >= size), None)


def to_matrix(weight: Tensor) -> Tensor:
    """Convert a linear [O, K] or convolution [O, I, kh, kw] weight to a matrix [O, K], tap-major."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes 0..2^b - 1 [..., K] to uint8 [..., K b/8], the first code in the lowest bits."""
    assert codes.dtype == torch.uint8, codes.dtype
    assert codes.shape[-1] * bits % 8 == 0, codes.shape
    fields = codes.view(*codes.shape[:-1], -1, 8 // bits)
    packed = fields[..., 0].clone()
    for index in range(1, 8 // bits):
        packed |= fields[..., index] << bits * index
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Unpack uint8 [..., K b/8] to codes, uint8 [..., K]; the inverse of `pack_codes`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def get_scales_and_offsets(weight: GroupWeight) -> tuple[Tensor, Tensor]:
    """Return the scale and offset of every group, float16 [O, G] each."""
    scale, offset = weight.parameters().view(*weight.qscale.shape, 2).unbind(dim=2)
    return scale, offset


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Convert a matrix [O, K] to a weight of this shape; the inverse of `to_matrix`."""
    if len(shape) == 2:
        return matrix
    return matrix.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2).contiguous()
