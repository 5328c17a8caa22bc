"""Linear and convolution layers whose weights stay packed in memory and are dequantized when they are used."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinysd_batch.model.packed.dequantize import SCRATCH, dequantize, rows_per_chunk
from tinysd_batch.model.packed.format import Layout, PackedWeight

MAX_ONEDNN_COPY_BYTES = 6 * 2**20  # fits the CPU's caches, and is below malloc's mmap threshold


class PackedLayer(nn.Module):
    """Base of packed linear and convolution layers: the file's tensors, and how to dequantize them to a matrix."""

    qweight: Tensor
    bias: nn.Parameter | None
    keeps_dequantized = False  # set where memory is plentiful: dequantize once, until the weights leave the device

    def __init__(self, out_features: int, columns: int, layout: Layout, bias: bool) -> None:
        super().__init__()
        self.out_features = out_features
        self.columns = columns
        self.layout = layout
        for name, (dtype, shape) in layout.tensors(out_features, columns).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        # Both caches start with the codes they were made from, to notice when these are replaced.
        self.cached_matrix: tuple[Tensor, Tensor] | None = None  # codes, dequantized matrix
        self.cached_chunks: tuple[Tensor, int, list[tuple[slice, PackedWeight]]] | None = None  # codes, rows per chunk

    def packed_weight(self) -> PackedWeight:
        return self.layout.weight(dict(self.named_buffers(recurse=False)))

    def dequantized_chunks(
        self, dtype: torch.dtype, max_bytes: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the weight as matrices [rows, K] with their biases; each is valid until the next is requested.

        If the layer keeps its dequantized weight and `max_bytes` is not given, yield it as one matrix.
        """
        if self.keeps_dequantized and max_bytes is None:
            yield self.dequantize_all(dtype), self.bias
            return
        for rows, weight in self.row_chunks(rows_per_chunk(self.out_features, self.columns, dtype, max_bytes)):
            yield self.dequantize_chunk(rows, weight, dtype), None if self.bias is None else self.bias[rows]

    def dequantize_chunk(self, rows: slice, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """Dequantize some rows, stored as `weight`. The result is valid until the next call."""
        if self.keeps_dequantized:
            return self.dequantize_all(dtype)[rows]
        return dequantize(weight, SCRATCH.get_matrix(*weight.shape, dtype, self.qweight.device))

    def row_chunks(self, step: int) -> list[tuple[slice, PackedWeight]]:
        """Split the weight into chunks of `step` rows. Cached: splitting takes longer than dequantizing on a GPU."""
        if self.cached_chunks is None or self.cached_chunks[0] is not self.qweight or self.cached_chunks[1] != step:
            weight, ends = self.packed_weight(), range(step, self.out_features + step, step)
            slices = [slice(end - step, min(end, self.out_features)) for end in ends]
            self.cached_chunks = self.qweight, step, [(rows, weight.select_rows(rows)) for rows in slices]
        return self.cached_chunks[2]

    def clear_cache(self) -> None:
        """Drop what was derived from tensors that have left the device."""
        self.cached_matrix = self.cached_chunks = None

    def dequantize_all(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [O, K] in its own memory, which is kept until the weights leave the device."""
        if self.cached_matrix is None or self.cached_matrix[0] is not self.qweight:
            out = torch.empty(self.out_features, self.columns, dtype=dtype, device=self.qweight.device)
            self.cached_matrix = self.qweight, dequantize(self.packed_weight(), out)
        return self.cached_matrix[1]


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
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        layout: Layout,
        bias: bool,
    ) -> None:
        super().__init__(out_channels, in_channels * kernel[0] * kernel[1], layout, bias)
        self.in_channels = in_channels
        self.kernel = kernel
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        chunks = self.dequantized_chunks(x.dtype, self.max_chunk_bytes(x))
        return concatenate([self.convolve(x, weight, bias) for weight, bias in chunks], 1)

    def max_chunk_bytes(self, x: Tensor) -> int | None:
        """Return how large chunks may be, or None for the usual size: oneDNN copies each into its own order.

        For a weight larger than the feature map, copying is much of the work, and it is slow for large chunks, whose
        memory is freshly mapped every time. For other weights, reading the feature map once more per chunk costs more.
        """
        is_map_smaller = x.numel() < self.out_features * self.columns
        return MAX_ONEDNN_COPY_BYTES if x.device.type == "cpu" and is_map_smaller else None

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernels = weight.view(-1, *self.kernel, self.in_channels).permute(0, 3, 1, 2)
        return F.conv2d(x, kernels, bias, self.stride, self.padding)


def make_packed_layer(layer: nn.Module, layout: Layout) -> PackedLayer:
    """Return an empty packed layer to replace a linear or convolution layer."""
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
    """Let all packed layers dequantize once and keep the result."""
    for layer in iterate_packed_layers(model):
        layer.keeps_dequantized = True


def count_dequantized_bytes(model: nn.Module) -> int:
    """Return the size of all packed weights in float32."""
    return sum(4 * layer.out_features * layer.columns for layer in iterate_packed_layers(model))


def required_scratch_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the size of the largest chunk in which a layer is dequantized."""
    layers = [layer for layer in iterate_packed_layers(model) if not layer.keeps_dequantized]
    counts = [rows_per_chunk(layer.out_features, layer.columns, dtype) for layer in layers]
    sizes = (dtype.itemsize * rows * layer.columns for rows, layer in zip(counts, layers, strict=True))
    return max(sizes, default=0)


def swap_packed_layers(model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Replace the layers named in `layouts` by empty packed layers, in place."""
    for name, layout in layouts.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, make_packed_layer(getattr(owner, child), layout))
        if isinstance(owner, nn.Sequential | nn.ModuleList):
            owner[int(child)] = getattr(owner, child)
