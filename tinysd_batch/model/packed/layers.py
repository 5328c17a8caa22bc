"""Linear and convolution layers whose weights stay packed and become floats when they are used."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinysd_batch.model.packed.dequantize import SCRATCH, dequantize, rows_per_chunk
from tinysd_batch.model.packed.format import Layout, PackedWeight

MAX_ONEDNN_COPY_BYTES = 6 * 2**20  # stays in caches, and below the blocks that go back to the system after a step


class PackedLayer(nn.Module):
    """What packed linear and convolution layers share: the tensors of the file, and how they become a matrix."""

    qweight: Tensor
    bias: nn.Parameter | None
    keeps_dequantized = False  # set where memory is no concern: unpack once, until the fragment leaves

    def __init__(self, out_features: int, columns: int, layout: Layout, bias: bool) -> None:
        super().__init__()
        self.out_features = out_features
        self.columns = columns
        self.layout = layout
        for name, (dtype, shape) in layout.tensors(out_features, columns).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        self.kept: tuple[Tensor, Tensor] | None = None  # the codes it was unpacked from, and the matrix
        self.cut: tuple[Tensor, int, list[tuple[slice, PackedWeight]]] | None = None  # likewise, and the rows of a part

    def packed_weight(self) -> PackedWeight:
        return self.layout.weight(dict(self.named_buffers(recurse=False)))

    def dequantized_chunks(
        self, dtype: torch.dtype, most_bytes: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The weight as matrices [rows, K] and their biases, each good until the next is asked for.

        Without `most_bytes` one that is kept comes as a whole.
        """
        if self.keeps_dequantized and most_bytes is None:
            yield self.whole(dtype), self.bias
            return
        for rows, weight in self.cuts(rows_per_chunk(self.out_features, self.columns, dtype, most_bytes)):
            yield self.matrix(rows, weight, dtype), None if self.bias is None else self.bias[rows]

    def matrix(self, rows: slice, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """Some rows, of which `weight` is what is stored; good until the next are asked for."""
        if self.keeps_dequantized:
            return self.whole(dtype)[rows]
        return dequantize(weight, SCRATCH.get_matrix(*weight.shape, dtype, self.qweight.device))

    def cuts(self, step: int) -> list[tuple[slice, PackedWeight]]:
        """The weight in parts of so many rows. Remembered: cutting takes longer than a card takes to unpack."""
        if self.cut is None or self.cut[0] is not self.qweight or self.cut[1] != step:
            weight, ends = self.packed_weight(), range(step, self.out_features + step, step)
            parts = [slice(end - step, min(end, self.out_features)) for end in ends]
            self.cut = self.qweight, step, [(rows, weight.cut(rows)) for rows in parts]
        return self.cut[2]

    def forget(self) -> None:
        """Let go of what was made of tensors that are no longer there."""
        self.kept = self.cut = None

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight as [O, K], in memory of its own that is kept until the fragment leaves."""
        if self.kept is None or self.kept[0] is not self.qweight:
            room = torch.empty(self.out_features, self.columns, dtype=dtype, device=self.qweight.device)
            self.kept = self.qweight, dequantize(self.packed_weight(), room)
        return self.kept[1]


def concatenate(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class PackedLinear(PackedLayer):
    """`nn.Linear` with a packed weight."""

    def __init__(self, in_features: int, out_features: int, layout: Layout, bias: bool) -> None:
        super().__init__(out_features, in_features, layout, bias)

    def forward(self, x: Tensor) -> Tensor:
        return concatenate([F.linear(x, weight, bias) for weight, bias in self.dequantized_chunks(x.dtype)], -1)


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
        parts = self.dequantized_chunks(x.dtype, self.most_bytes(x))
        return concatenate([self.convolve(x, weight, bias) for weight, bias in parts], 1)

    def most_bytes(self, x: Tensor) -> int | None:
        """How large parts are to be: oneDNN copies each into an order of its own.

        For a weight that is larger than the map this is much of the work, and dear for large parts, whose memory comes
        fresh from the system every time. For others it is dearer to go through the map once more for each part.
        """
        small_map = x.numel() < self.out_features * self.columns
        return MAX_ONEDNN_COPY_BYTES if x.device.type == "cpu" and small_map else None

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernels = weight.view(-1, *self.kernel, self.in_channels).permute(0, 3, 1, 2)
        return F.conv2d(x, kernels, bias, self.stride, self.padding)


def make_packed_layer(layer: nn.Module, layout: Layout) -> PackedLayer:
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


def iterate_packed_layers(model: nn.Module) -> Iterator[PackedLayer]:
    return (layer for layer in model.modules() if isinstance(layer, PackedLayer))


def keep_dequantized(model: nn.Module) -> None:
    """Let all packed layers unpack once and keep the floats."""
    for layer in iterate_packed_layers(model):
        layer.keeps_dequantized = True


def count_dequantized_bytes(model: nn.Module) -> int:
    """What the packed layers would take as float32."""
    return sum(4 * layer.out_features * layer.columns for layer in iterate_packed_layers(model))


def required_scratch_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the largest part takes in which a layer is unpacked."""
    layers = [layer for layer in iterate_packed_layers(model) if not layer.keeps_dequantized]
    rows = [rows_per_chunk(layer.out_features, layer.columns, dtype) for layer in layers]
    return max((dtype.itemsize * some * layer.columns for some, layer in zip(rows, layers, strict=True)), default=0)


def swap_packed_layers(model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Replace the layers named in `layouts` by empty packed ones, in place."""
    for name, layout in layouts.items():
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, child, make_packed_layer(getattr(holder, child), layout))
        if isinstance(holder, nn.Sequential | nn.ModuleList):
            holder[int(child)] = getattr(holder, child)
