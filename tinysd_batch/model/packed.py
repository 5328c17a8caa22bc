"""Weights at 2 bits: how they are stored, how they become floats again, and the layers that compute with them.

A weight is a matrix [O, K]; a convolution's K runs tap by tap (kernel row, kernel column, input channel), so that an
unpacked matrix is a channels-last kernel without a copy. Each row is cut into G = K / g groups of g weights, and

    weight = code * scale + offset            code 0..3, scale and offset float16, one pair per group

On disk a layer is `qweight` uint8 [O, K/4] (code j of a row in byte j // 4, bits 2 (j % 4) and up), `qscale` and `qoff`
uint8 [O, G], and `qmeta` int16 [O, 4]: the bits of four float16 numbers (scale_min, scale_step, offset_min,
offset_step) that turn the bytes into scales and offsets. All integers, because loaders cast floating tensors.

In memory a layer is FBGEMM's row format, one row per group: uint8 [O * G, g/4 + 4], codes then scale then offset.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (64, 32, 16)
UNPACK_ROWS = 2048  # groups unpacked at a time by FBGEMM: small enough to stay in the processor's cache


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A 2-bit matrix as stored on disk; field names are the tensors' names after the layer's."""

    qweight: Tensor  # uint8 [O, K/4]
    qscale: Tensor  # uint8 [O, G]
    qoff: Tensor  # uint8 [O, G]
    qmeta: Tensor  # int16 [O, 4], float16 bits

    @property
    def group_size(self) -> int:
        return self.qweight.shape[1] * 4 // self.qscale.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self) -> Tensor:
        """FBGEMM rows, uint8 [O * G, g/4 + 4]."""
        scale, offset = affine_parameters(self)
        codes = self.qweight.view(-1, self.group_size // 4)
        parameters = torch.stack([scale, offset], dim=-1).view(-1, 2)
        return torch.cat([codes, parameters.view(torch.uint8)], dim=1)


PACKED_NAMES = tuple(field.name for field in fields(PackedWeight))


def stored_layout(rows: int, columns: int, group_size: int) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """Type and shape of each tensor that stores a matrix [rows, columns], by the field names of `PackedWeight`."""
    groups = columns // group_size
    return {
        "qweight": (torch.uint8, (rows, columns // 4)),
        "qscale": (torch.uint8, (rows, groups)),
        "qoff": (torch.uint8, (rows, groups)),
        "qmeta": (torch.int16, (rows, 4)),
    }


def group_size_for(columns: int) -> int | None:
    """The largest group that divides a row of so many weights; None where the matrix is too narrow to pack."""
    return next((size for size in GROUPS if columns % size == 0 and columns >= size), None)


def pack_2bit(codes: Tensor) -> Tensor:
    """uint8 codes 0..3 [..., K] to uint8 [..., K/4], the first code in the lowest bits."""
    assert codes.dtype == torch.uint8, codes.dtype
    assert codes.shape[-1] % 4 == 0, codes.shape
    quads = codes.view(*codes.shape[:-1], -1, 4)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack_2bit(packed: Tensor) -> Tensor:
    """The inverse of `pack_2bit`: uint8 [..., K/4] to uint8 [..., K]."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 3).flatten(-2)


def affine_parameters(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Scale and offset of every group, float16 [O, G] each."""
    meta = weight.qmeta.view(torch.float16).float()  # [O, 4]
    scale = meta[:, 0:1] + weight.qscale.float() * meta[:, 1:2]
    offset = meta[:, 2:3] + weight.qoff.float() * meta[:, 3:4]
    return scale.half(), offset.half()


def unpack_rows_torch(rows: Tensor, out: Tensor) -> Tensor:
    """FBGEMM rows uint8 [N, g/4 + 4] to float32 [N, g] in `out`, in plain torch, on any device."""
    parameters = rows[:, -4:].contiguous().view(torch.float16).float()  # [N, 2]
    out.copy_(unpack_2bit(rows[:, :-4]))
    return out.mul_(parameters[:, 0:1]).add_(parameters[:, 1:2])


def unpack_rows_fbgemm(rows: Tensor, out: Tensor) -> Tensor:
    """The same by the FBGEMM operator that comes with torch; CPU only, and equal to the bit.

    Both compute code * scale + offset in float32. The product of 2 and 11 bits is exact: fused or not, it rounds once.
    """
    for start in range(0, rows.shape[0], UNPACK_ROWS):
        part = slice(start, start + UNPACK_ROWS)
        out[part].copy_(torch.ops.quantized.embedding_bag_2bit_unpack(rows[part]))
    return out


def new_output(rows: Tensor) -> Tensor:
    """Room for unpacked rows, float32 [N, g]."""
    return torch.empty(rows.shape[0], (rows.shape[1] - 4) * 4, device=rows.device)


class Scratch(threading.local):
    """One buffer per thread in which layers unpack in turn: fresh memory for each would cost more than unpacking."""

    buffer: Tensor | None = None

    def output(self, rows: Tensor) -> Tensor:
        """Room for unpacked rows, float32 [N, g]; the next call may hand out the same memory."""
        needed = rows.shape[0] * (rows.shape[1] - 4) * 4
        if self.buffer is None or self.buffer.numel() < needed or self.buffer.device != rows.device:
            with torch.inference_mode(False):  # else nobody outside the inference mode could write to it later
                self.buffer = torch.empty(needed, device=rows.device)
        return self.buffer[:needed].view(rows.shape[0], -1)


SCRATCH = Scratch()


@cache
def has_fbgemm() -> bool:
    """Whether the FBGEMM operator is there and decodes a known row as we do; it is no documented interface."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 16), dtype=torch.uint8, generator=generator)
    parameters = torch.tensor([[0.25, -0.5], [-1.5, 2.0], [6e-5, 0.0]], dtype=torch.float16)
    golden = torch.cat([codes, parameters.view(torch.uint8)], dim=1)
    try:
        return torch.equal(
            unpack_rows_fbgemm(golden, new_output(golden)), unpack_rows_torch(golden, new_output(golden))
        )
    except (AttributeError, RuntimeError):
        return False


def unpack_rows(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """FBGEMM rows uint8 [N, g/4 + 4] to float32 [N, g], by the fastest way there is on the rows' device."""
    room = new_output(rows) if out is None else out
    if rows.device.type == "cpu" and has_fbgemm():
        return unpack_rows_fbgemm(rows, room)
    return unpack_rows_torch(rows, room)


def to_matrix(weight: Tensor) -> Tensor:
    """A linear [O, K] or convolution [O, I, kh, kw] weight as a matrix [O, K], tap-major."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


class PackedLayer(nn.Module):
    """What packed linear and convolution layers share: the rows, and how they become a matrix."""

    rows: Tensor
    bias: nn.Parameter | None
    keeps_unpacked = False  # set where memory is no concern: unpack once, until the fragment leaves

    def __init__(self, out_features: int, columns: int, group_size: int, bias: bool) -> None:
        super().__init__()
        self.out_features = out_features
        self.columns = columns
        self.group_size = group_size
        self.register_weight()
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        self.kept: tuple[Tensor, Tensor] | None = None  # the rows it was unpacked from, and the matrix

    def register_weight(self) -> None:
        """Make empty room for the weight."""
        shape = (self.out_features * self.columns // self.group_size, self.group_size // 4 + 4)
        self.register_buffer("rows", torch.empty(shape, dtype=torch.uint8, device="meta"))

    def fbgemm_rows(self) -> Tensor:
        """The weight as FBGEMM rows, uint8 [O * G, g/4 + 4]."""
        return self.rows

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight as [O, K], good until another layer is asked for its own."""
        rows = self.fbgemm_rows()
        if self.kept is not None and self.kept[0] is rows:
            return self.kept[1]
        out = None if self.keeps_unpacked else SCRATCH.output(rows)
        matrix = unpack_rows(rows, out).view(self.out_features, self.columns).to(dtype)
        self.kept = (rows, matrix) if self.keeps_unpacked else None
        return matrix


class PackedLinear(PackedLayer):
    """`nn.Linear` with a 2-bit weight."""

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool) -> None:
        super().__init__(out_features, in_features, group_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), self.bias)


class PackedConv2d(PackedLayer):
    """`nn.Conv2d` (one group, zero padding) with a 2-bit weight."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, ...], stride: tuple[int, ...],
        padding: tuple[int, ...], group_size: int, bias: bool,
    ) -> None:  # fmt: skip
        super().__init__(out_channels, in_channels * kernel[0] * kernel[1], group_size, bias)
        self.in_channels = in_channels
        self.kernel = kernel
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        weight = self.matrix(x.dtype).view(self.out_features, *self.kernel, self.in_channels).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


Kinds = tuple[type[PackedLinear], type[PackedConv2d]]
KINDS: Kinds = (PackedLinear, PackedConv2d)


def packed_like(layer: nn.Module, group_size: int, kinds: Kinds = KINDS) -> PackedLayer:
    """An empty packed layer of one of these kinds in place of a linear or convolution layer."""
    linear, convolution = kinds
    bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Linear):
        return linear(layer.in_features, layer.out_features, group_size, bias)
    assert isinstance(layer, nn.Conv2d), type(layer)
    assert layer.groups == 1, layer
    assert layer.padding_mode == "zeros", layer
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    assert not isinstance(padding, str), padding
    return convolution(layer.in_channels, layer.out_channels, kernel, stride, padding, group_size, bias)


def keep_unpacked(model: nn.Module) -> None:
    """Let all packed layers unpack once and keep the floats."""
    for layer in model.modules():
        if isinstance(layer, PackedLayer):
            layer.keeps_unpacked = True


def unpacked_bytes(model: nn.Module) -> int:
    """What the packed layers would take as float32."""
    return sum(4 * layer.out_features * layer.columns for layer in model.modules() if isinstance(layer, PackedLayer))


def swap_packed_layers(model: nn.Module, group_sizes: Mapping[str, int], kinds: Kinds = KINDS) -> None:
    """Replace the layers named in `group_sizes` by empty packed ones of these kinds, in place."""
    for name, group_size in group_sizes.items():
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, child, packed_like(getattr(holder, child), group_size, kinds))
        if isinstance(holder, nn.Sequential | nn.ModuleList):
            holder[int(child)] = getattr(holder, child)
