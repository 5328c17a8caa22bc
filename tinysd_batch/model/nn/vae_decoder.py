"""VAE decoder that processes feature maps in horizontal strips to limit peak memory.

A plain decoder holds a gigabyte of float32 feature maps at 512x512. Here diffusers' blocks run norm, activation and
convolution on some rows of a feature map at a time. The statistics of the group norms are taken from the whole map, so
there are no seams. What remains in memory is a block's input and the map between its two convolutions. In the last
block, whose maps are the largest, these can be recomputed each time they are read, instead of being stored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tinysd_batch.model.chunking import get_chunk_bytes

HALO = 1  # rows that a 3x3 convolution reads above and below its output rows

Factors = tuple[Tensor, Tensor]  # scale and shift, [1, C, 1, 1] each


class FactorNorm(nn.GroupNorm):
    """Group norm that returns the scale and shift of each channel instead of the normalized map."""

    def forward(self, mean: Tensor, variance: Tensor) -> Factors:  # type: ignore[override] # other input and output
        """Compute scale and shift from the map's `channel_statistics`."""
        means, variances = mean.view(self.num_groups, -1), variance.view(self.num_groups, -1)
        # Law of total variance: within channels plus between channels.
        group_variance = variances.mean(dim=1) + means.var(dim=1, correction=0)
        group_channels = self.num_channels // self.num_groups
        scale = self.weight * (group_variance + self.eps).rsqrt().repeat_interleave(group_channels)
        shift = self.bias - means.mean(dim=1).repeat_interleave(group_channels) * scale
        return scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)


def use_strip_layers(vae: AutoencoderKL) -> None:
    """Prepare the decoder's layers for strips, in place.

    Norms become empty `FactorNorm` layers, activations work in place, and convolutions pad columns but no rows.
    """
    decoder = vae.decoder
    resnets = [module for module in decoder.modules() if isinstance(module, ResnetBlock2D)]
    norms = [(decoder, "conv_norm_out"), *((resnet, name) for resnet in resnets for name in ("norm1", "norm2"))]
    for owner, name in norms:
        norm = getattr(owner, name)
        with torch.device("meta"):
            setattr(owner, name, FactorNorm(norm.num_groups, norm.num_channels, norm.eps))
    for module in decoder.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True
    upsamplers = [upsampler for block in decoder.up_blocks for upsampler in block.upsamplers or ()]
    convs = [conv for resnet in resnets for conv in (resnet.conv1, resnet.conv2)]
    for conv in [*convs, *(upsampler.conv for upsampler in upsamplers), decoder.conv_out]:
        conv.padding = (0, HALO)


def get_interleaved_layers(vae: AutoencoderKL) -> list[list[nn.Module]]:
    """Return lists of layers that are called alternately, strip by strip, when maps are recomputed.

    There is one list for each resnet of the last block; the first also has the upsampler before it.
    """
    groups = [list(resnet.modules()) for resnet in vae.decoder.up_blocks[-1].resnets]
    upsamplers = [upsampler.conv for block in vae.decoder.up_blocks[-2:-1] for upsampler in block.upsamplers or ()]
    return [[*upsamplers, *groups[0]], *groups[1:]]


def decode_latents(
    vae: AutoencoderKL, latents: Tensor, storage_dtype: torch.dtype | None = None, *, recompute: bool = False
) -> Tensor:
    """Decode latents one image at a time.

    Args:
        vae: the autoencoder, prepared by `use_strip_layers`.
        latents: [B, 4, h, w], divided by the scaling factor. Computation is in their dtype.
        storage_dtype: dtype that large feature maps are stored in; the latents' if None.
        recompute: recompute the maps of the last block: half their memory, 30 % more work.

    Returns:
        Pixels in -1..1, float32 [B, 3, H, W], on the host.
    """
    images = torch.split(latents, 1)
    return torch.cat([decode_single(vae, image, storage_dtype, recompute=recompute).float().cpu() for image in images])


def decode_single(
    vae: AutoencoderKL, latents: Tensor, storage_dtype: torch.dtype | None = None, *, recompute: bool = False
) -> Tensor:
    """Decode the latents of one image, [1, 4, h, w], to pixels [1, 3, H, W] in the storage dtype."""
    decoder, maps = vae.decoder, FeatureMaps(latents.dtype, storage_dtype or latents.dtype)
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    x = decoder.conv_in(latents).to(maps.storage_dtype, memory_format=torch.channels_last)
    first, *others = decoder.mid_block.resnets
    x = maps.run_resnet(first, x)
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
        if attention is not None:
            x = attention(x.to(maps.compute_dtype)).to(maps.storage_dtype, memory_format=torch.channels_last)
        x = maps.run_resnet(resnet, x)
    for block in decoder.up_blocks:
        if block is decoder.up_blocks[-1]:
            maps = replace(maps, recompute=recompute)
        x = maps.store_input(x)
        for resnet in block.resnets:
            x = maps.run_resnet(resnet, x)
        for upsampler in block.upsamplers or ():
            x = maps.upsample(shrink_storage(x)).conv3x3(upsampler.conv)
    return maps.collect(maps.norm_and_activate(decoder.conv_norm_out, decoder.conv_act, x).conv3x3(decoder.conv_out))


@dataclass(frozen=True, slots=True)
class LazyFeatureMap:
    """A feature map [1, C, height, width] that is computed when it is read, some rows at a time."""

    channels: int
    height: int
    width: int
    device: torch.device
    take: Callable[[int, int], Tensor]  # first row and row after the last to [1, C, rows, width]
    max_input_channels: int = 0  # of all maps that it is computed from

    @property
    def strip_rows(self) -> int:
        """Number of rows of a strip."""
        return max(1, get_chunk_bytes() // (4 * max(self.channels, self.max_input_channels) * self.width))

    def strips(self) -> Iterator[tuple[int, int]]:
        """Yield each strip's first row and the row after its last, from top to bottom."""
        step = self.strip_rows
        return ((top, min(top + step, self.height)) for top in range(0, self.height, step))

    def write(self, target: Tensor, *, add: bool = False) -> None:
        """Write the strips to a map [1, C, height, width], or add them to it."""
        for top, bottom in self.strips():  # a strip gets no name here, which would keep it alive during the next
            rows = target[:, :, top:bottom]
            (rows.add_ if add else rows.copy_)(self.take(top, bottom))

    def conv1x1(self, conv: nn.Conv2d) -> "LazyFeatureMap":
        return self.after_conv(conv, lambda first, last: torch.as_tensor(conv(self.take(first, last))))

    def conv3x3(self, conv: nn.Conv2d) -> "LazyFeatureMap":
        """Apply a 3x3 convolution. It reads one row above and one below, which are zeros beyond the map's edges."""

        def take(first: int, last: int) -> Tensor:
            x = self.take(max(0, first - HALO), min(self.height, last + HALO))
            if first < HALO or last + HALO > self.height:
                x = F.pad(x, (0, 0, max(0, HALO - first), max(0, last + HALO - self.height)))
            return torch.as_tensor(conv(x))

        return self.after_conv(conv, take)

    def after_conv(self, conv: nn.Conv2d, take: Callable[[int, int], Tensor]) -> "LazyFeatureMap":
        max_input_channels = max(self.channels, self.max_input_channels)
        return replace(self, channels=conv.out_channels, take=take, max_input_channels=max_input_channels)

    def with_overlap(self) -> "LazyFeatureMap":
        """Return the same map for strips that are read from top to bottom and share rows, which are computed once.

        The map that it is computed from may be overwritten as far as strips have been read.
        """
        return replace(self, take=OverlappingStrips(self.take))


class OverlappingStrips:
    """Compute rows [first, last) of a map, and keep the last two for the next strip."""

    def __init__(self, compute: Callable[[int, int], Tensor]) -> None:
        self.compute = compute
        self.end = 0
        self.last_rows: Tensor | None = None

    def __call__(self, first: int, last: int) -> Tensor:
        parts = []
        if self.last_rows is not None and self.end - self.last_rows.shape[2] <= first < self.end:
            parts.append(self.last_rows[:, :, first - self.end :])
            first = self.end
        if first < last:
            parts.append(self.compute(first, last))
        strip = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        self.end, self.last_rows = last, strip[:, :, -2 * HALO :].clone()
        return strip


def as_lazy_map(x: Tensor | LazyFeatureMap) -> LazyFeatureMap:
    """Wrap a stored map [1, C, H, W]."""
    if isinstance(x, LazyFeatureMap):
        return x
    return LazyFeatureMap(x.shape[1], x.shape[2], x.shape[3], x.device, lambda first, last: x[:, :, first:last])


def shrink_storage(x: Tensor) -> Tensor:
    """Copy a map if its storage is larger than the map, as after a shortcut that was written in place."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def channel_statistics(x: LazyFeatureMap) -> Factors:
    """Compute mean and variance of each channel of a map, float64 [C], strip by strip."""
    strips = list(x.strips())
    parts = [torch.var_mean(x.take(*strip).float(), dim=(0, 2, 3), correction=0) for strip in strips]
    variances, means = (torch.stack(values).double() for values in zip(*parts, strict=True))
    rows = [[bottom - top] for top, bottom in strips]
    shares = torch.tensor(rows, dtype=torch.float64, device=means.device) / x.height
    mean = (shares * means).sum(dim=0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(dim=0)


@dataclass(frozen=True, slots=True)
class FeatureMaps:
    """Operations on feature maps that are stored in one dtype and computed, strip by strip, in another."""

    compute_dtype: torch.dtype
    storage_dtype: torch.dtype
    recompute: bool = False

    def store_input(self, x: Tensor | LazyFeatureMap) -> Tensor | LazyFeatureMap:
        """Store a block's input, unless it is to be recomputed."""
        if isinstance(x, Tensor):
            return x
        return x.with_overlap() if self.recompute else self.collect(x)

    def run_resnet(self, block: ResnetBlock2D, x: Tensor | LazyFeatureMap) -> Tensor:
        """conv2(act(norm2(conv1(act(norm1(x)))))) plus x or its shortcut, in the memory of x if x is stored."""
        first = self.norm_and_activate(block.norm1, block.nonlinearity, x).conv3x3(block.conv1)
        if isinstance(x, LazyFeatureMap):
            out = self.finish_in_place(self.collect(first), block, x)
        else:
            recompute = self.recompute and block.conv_shortcut is None  # a shortcut would overwrite x too early
            hidden = first.with_overlap() if recompute else self.collect(first)
            second = self.norm_and_activate(block.norm2, block.nonlinearity, hidden).conv3x3(block.conv2)
            out = x if block.conv_shortcut is None else self.shortcut_in_place(block.conv_shortcut, x)
            second.write(out, add=True)
        return out if block.output_scale_factor == 1 else out.div_(block.output_scale_factor)

    def finish_in_place(self, hidden: Tensor, block: ResnetBlock2D, x: LazyFeatureMap) -> Tensor:
        """conv2(act(norm2(hidden))) plus x or its shortcut, in the memory of `hidden`; x is computed strip by strip."""
        second = self.norm_and_activate(block.norm2, block.nonlinearity, hidden).with_overlap().conv3x3(block.conv2)
        second.write(hidden)
        (x if block.conv_shortcut is None else x.conv1x1(block.conv_shortcut)).write(hidden, add=True)
        return hidden

    def norm_and_activate(self, norm: nn.Module, act: nn.Module, x: Tensor | LazyFeatureMap) -> LazyFeatureMap:
        """act(norm(x)), computed in float32."""
        x = as_lazy_map(x)
        scale, shift = norm(*channel_statistics(x))

        def take(first: int, last: int) -> Tensor:
            strip = x.take(first, last).to(torch.float32, copy=True)
            return torch.as_tensor(act(torch.addcmul(shift, strip, scale, out=strip))).to(self.compute_dtype)

        return replace(x, take=take)

    def upsample(self, x: Tensor) -> LazyFeatureMap:
        """Double height and width by repeating each value four times."""

        def take(first: int, last: int) -> Tensor:
            above = first // 2
            taller = F.interpolate(x[:, :, above : -(-last // 2)], scale_factor=2.0, mode="nearest")
            return taller[:, :, first - 2 * above : last - 2 * above].to(self.compute_dtype)

        return LazyFeatureMap(x.shape[1], 2 * x.shape[2], 2 * x.shape[3], x.device, take)

    def collect(self, x: LazyFeatureMap) -> Tensor:
        """Compute all strips and store them as [1, C, height, width]."""
        shape = (1, x.channels, x.height, x.width)
        out = torch.empty(shape, dtype=self.storage_dtype, device=x.device, memory_format=torch.channels_last)
        x.write(out)
        return out

    def shortcut_in_place(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Apply a 1x1 convolution to x [1, C, H, W], and write the result to the memory of x if it fits."""
        channels, height, width = x.shape[1:]
        if conv.out_channels > channels:
            return torch.as_tensor(conv(x.to(self.compute_dtype))).to(
                self.storage_dtype, memory_format=torch.channels_last
            )
        memory = x.permute(0, 2, 3, 1).view(-1)
        end = 0
        for strip in torch.split(x, as_lazy_map(x).strip_rows, dim=2):  # a strip is read before it is overwritten
            values = conv(strip.to(self.compute_dtype)).permute(0, 2, 3, 1).reshape(-1)
            start, end = end, end + len(values)
            memory[start:end] = values
        return memory[:end].view(1, height, width, conv.out_channels).permute(0, 3, 1, 2)
