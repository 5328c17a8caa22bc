"""Linear and convolution layers whose weights stay packed and become floats when they are used."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinysd_batch.model.packing import SCRATCH, Layout, Weight, unpack


class PackedLayer(nn.Module):
    """What packed linear and convolution layers share: the tensors of the file, and how they become a matrix."""

    qweight: Tensor
    bias: nn.Parameter | None
    keeps_unpacked = False  # set where memory is no concern: unpack once, until the fragment leaves

    def __init__(self, out_features: int, columns: int, layout: Layout, bias: bool) -> None:
        super().__init__()
        self.out_features = out_features
        self.columns = columns
        self.layout = layout
        for name, (dtype, shape) in layout.tensors(out_features, columns).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        self.kept: tuple[Tensor, Tensor] | None = None  # the codes it was unpacked from, and the matrix

    def weight_as_stored(self) -> Weight:
        return self.layout.weight(dict(self.named_buffers(recurse=False)))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight as [O, K], good until another layer is asked for its own."""
        if self.kept is not None and self.kept[0] is self.qweight:
            return self.kept[1]
        if self.keeps_unpacked:
            room = torch.empty(self.out_features, self.columns, device=self.qweight.device)
        else:
            room = SCRATCH.output(self.out_features, self.columns, self.qweight.device)
        matrix = unpack(self.weight_as_stored(), room).to(dtype)
        self.kept = (self.qweight, matrix) if self.keeps_unpacked else None
        return matrix


class PackedLinear(PackedLayer):
    """`nn.Linear` with a packed weight."""

    def __init__(self, in_features: int, out_features: int, layout: Layout, bias: bool) -> None:
        super().__init__(out_features, in_features, layout, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), self.bias)


class PackedConv2d(PackedLayer):
    """`nn.Conv2d` (one group, zero padding) with a packed weight."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, ...], stride: tuple[int, ...],
        padding: tuple[int, ...], layout: Layout, bias: bool,
    ) -> None:  # fmt: skip
        super().__init__(out_channels, in_channels * kernel[0] * kernel[1], layout, bias)
        self.in_channels = in_channels
        self.kernel = kernel
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        weight = self.matrix(x.dtype).view(self.out_features, *self.kernel, self.in_channels).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def packed_like(layer: nn.Module, layout: Layout) -> PackedLayer:
    """An empty packed layer in place of a linear or convolution layer."""
    bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer.in_features, layer.out_features, layout, bias)
    assert isinstance(layer, nn.Conv2d), type(layer)
    assert layer.groups == 1, layer
    assert layer.padding_mode == "zeros", layer
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    assert not isinstance(padding, str), padding
    return PackedConv2d(layer.in_channels, layer.out_channels, kernel, stride, padding, layout, bias)


def keep_unpacked(model: nn.Module) -> None:
    """Let all packed layers unpack once and keep the floats."""
    for layer in model.modules():
        if isinstance(layer, PackedLayer):
            layer.keeps_unpacked = True


def unpacked_bytes(model: nn.Module) -> int:
    """What the packed layers would take as float32."""
    return sum(4 * layer.out_features * layer.columns for layer in model.modules() if isinstance(layer, PackedLayer))


def swap_packed_layers(model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Replace the layers named in `layouts` by empty packed ones, in place."""
    for name, layout in layouts.items():
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, child, packed_like(getattr(holder, child), layout))
        if isinstance(holder, nn.Sequential | nn.ModuleList):
            holder[int(child)] = getattr(holder, child)
