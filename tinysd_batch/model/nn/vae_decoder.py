"""The VAE decoder, strip by strip over diffusers' blocks, so that few large maps exist at a time.

A whole decoder at 512x512 holds a gigabyte of feature maps in float32. Here norm, activation and convolution run over
some rows of a map at a time, with the group norm's statistics taken from the whole map, so that there are no seams.
What remains is a block's input and one map between its two convolutions. In the last block, whose maps are the largest,
those can be made anew each time they are looked at, instead of being kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tinysd_batch.model.chunking import get_chunk_bytes

HALO = 1  # rows that a 3x3 convolution sees beyond its own

Factors = tuple[Tensor, Tensor]


class FactorNorm(nn.GroupNorm):
    """A group norm that tells by what to multiply each channel of a map, and what to add: [1, C, 1, 1] each."""

    def forward(self, mean: Tensor, variance: Tensor) -> Factors:  # type: ignore[override] # what it takes and returns
        """From the map's `channel_statistics`."""
        means, variances = mean.view(self.num_groups, -1), variance.view(self.num_groups, -1)
        # The law of total variance: within channels, and between them.
        spread = variances.mean(dim=1) + means.var(dim=1, correction=0)
        each = self.num_channels // self.num_groups
        scale = self.weight * (spread + self.eps).rsqrt().repeat_interleave(each)
        shift = self.bias - means.mean(dim=1).repeat_interleave(each) * scale
        return scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)


def use_strip_layers(vae: AutoencoderKL) -> None:
    """Make the decoder's layers fit for strips, in place: norms that tell factors, and are empty, activations in the
    memory of their input, convolutions that add no rows of zeros."""
    decoder = vae.decoder
    resnets = [module for module in decoder.modules() if isinstance(module, ResnetBlock2D)]
    for owner, name in [(decoder, "conv_norm_out"), *((one, name) for one in resnets for name in ("norm1", "norm2"))]:
        norm = getattr(owner, name)
        with torch.device("meta"):
            setattr(owner, name, FactorNorm(norm.num_groups, norm.num_channels, norm.eps))
    for module in decoder.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True
    upsamplers = [one for block in decoder.up_blocks for one in block.upsamplers or ()]
    convs = [conv for one in resnets for conv in (one.conv1, one.conv2)] + [one.conv for one in upsamplers]
    for conv in [*convs, decoder.conv_out]:
        conv.padding = (0, HALO)


def get_interleaved_layers(vae: AutoencoderKL) -> list[list[nn.Module]]:
    """Layers that work by turns, strip for strip, where maps are made anew: each resnet of the last block, the first
    with the upsampler before it."""
    groups = [list(resnet.modules()) for resnet in vae.decoder.up_blocks[-1].resnets]
    before = [one.conv for block in vae.decoder.up_blocks[-2:-1] for one in block.upsamplers or ()]
    return [[*before, *groups[0]], *groups[1:]]


def decode_latents(
    vae: AutoencoderKL, latents: Tensor, storage_dtype: torch.dtype | None = None, *, recompute: bool = False
) -> Tensor:
    """Latents [B, 4, h, w], scaled, to pixels in -1..1, [B, 3, H, W] float32 on the host; an image at a time.

    Large maps are kept as `storage_dtype`, if it is not that of the latents, in which all is computed. With
    `recompute` the last block keeps half of what it else would, at 30 % more work.
    """
    images = torch.split(latents, 1)
    return torch.cat([decode_single(vae, one, storage_dtype, recompute=recompute).float().cpu() for one in images])


def decode_single(
    vae: AutoencoderKL, latents: Tensor, storage_dtype: torch.dtype | None = None, *, recompute: bool = False
) -> Tensor:
    decoder, maps = vae.decoder, Maps(latents.dtype, storage_dtype or latents.dtype)
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    x = decoder.conv_in(latents).to(maps.storage_dtype, memory_format=torch.channels_last)
    first, *others = decoder.mid_block.resnets
    x = maps.residual(first, x)
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
        if attention is not None:
            x = attention(x.to(maps.computed)).to(maps.storage_dtype, memory_format=torch.channels_last)
        x = maps.residual(resnet, x)
    for block in decoder.up_blocks:
        if block is decoder.up_blocks[-1]:
            maps = replace(maps, recompute=recompute)
        x = maps.begun(x)
        for resnet in block.resnets:
            x = maps.residual(resnet, x)
        for upsampler in block.upsamplers or ():
            x = maps.doubled(fitted(x)).convolved(upsampler.conv)
    return maps.collect(maps.normed(decoder.conv_norm_out, decoder.conv_act, x).convolved(decoder.conv_out))


@dataclass(frozen=True, slots=True)
class LazyFeatureMap:
    """A map [1, C, height, width] that is made when it is looked at, some rows at a time."""

    channels: int
    height: int
    width: int
    device: torch.device
    take: Callable[[int, int], Tensor]  # first row and the row after the last to [1, C, rows, width]
    widest: int = 0  # the most channels of what it is made from

    @property
    def strip_rows(self) -> int:
        """How many rows make a strip."""
        return max(1, get_chunk_bytes() // (4 * max(self.channels, self.widest) * self.width))

    def cuts(self) -> Iterator[tuple[int, int]]:
        """Each strip's first row and the row after its last, from top to bottom."""
        step = self.strip_rows
        return ((top, min(top + step, self.height)) for top in range(0, self.height, step))

    def write(self, place: Tensor, *, add: bool = False) -> None:
        """Put the strips into a map [1, C, height, width], or add them to it."""
        for top, bottom in self.cuts():  # no name for what is taken: it would stay until after the next
            part = place[:, :, top:bottom]
            (part.add_ if add else part.copy_)(self.take(top, bottom))

    def mixed(self, conv: nn.Conv2d) -> "LazyFeatureMap":
        """A 1x1 convolution."""
        return self.through(conv, lambda first, last: torch.as_tensor(conv(self.take(first, last))))

    def convolved(self, conv: nn.Conv2d) -> "LazyFeatureMap":
        """A 3x3 convolution: made from a row above and one below, which beyond the map's edges are zeros."""

        def take(first: int, last: int) -> Tensor:
            x = self.take(max(0, first - HALO), min(self.height, last + HALO))
            if first < HALO or last + HALO > self.height:
                x = F.pad(x, (0, 0, max(0, HALO - first), max(0, last + HALO - self.height)))
            return torch.as_tensor(conv(x))

        return self.through(conv, take)

    def through(self, conv: nn.Conv2d, take: Callable[[int, int], Tensor]) -> "LazyFeatureMap":
        return replace(self, channels=conv.out_channels, take=take, widest=max(self.channels, self.widest))

    def overlapping(self) -> "LazyFeatureMap":
        """The same for strips that go from top to bottom and share rows: those are made once, and remembered.

        What it is made from may be overwritten as far as strips have come.
        """
        return replace(self, take=Overlap(self.take))


class Overlap:
    """Rows [first, last) of a map, of which the last two are remembered."""

    def __init__(self, make: Callable[[int, int], Tensor]) -> None:
        self.make = make
        self.end = 0
        self.storage_dtype: Tensor | None = None

    def __call__(self, first: int, last: int) -> Tensor:
        parts = []
        if self.storage_dtype is not None and self.end - self.storage_dtype.shape[2] <= first < self.end:
            parts.append(self.storage_dtype[:, :, first - self.end :])
            first = self.end
        if first < last:
            parts.append(self.make(first, last))
        strip = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        self.end, self.storage_dtype = last, strip[:, :, -2 * HALO :].clone()
        return strip


def as_lazy_map(x: Tensor | LazyFeatureMap) -> LazyFeatureMap:
    """Rows of a map [1, C, H, W] that is there."""
    if isinstance(x, LazyFeatureMap):
        return x
    return LazyFeatureMap(x.shape[1], x.shape[2], x.shape[3], x.device, lambda first, last: x[:, :, first:last])


def fitted(x: Tensor) -> Tensor:
    """A map in memory of its own size: after a shortcut it may lie in that of a larger one."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def channel_statistics(x: LazyFeatureMap) -> Factors:
    """Mean and variance of each channel of a map, float64 [C], taken strip by strip."""
    cuts = list(x.cuts())
    parts = [torch.var_mean(x.take(*cut).float(), dim=(0, 2, 3), correction=0) for cut in cuts]
    variances, means = (torch.stack(values).double() for values in zip(*parts, strict=True))
    rows = [[bottom - top] for top, bottom in cuts]
    shares = torch.tensor(rows, dtype=torch.float64, device=means.device) / x.height
    mean = (shares * means).sum(dim=0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(dim=0)


@dataclass(frozen=True, slots=True)
class Maps:
    """Feature maps kept in one type and computed with, strip by strip, in another."""

    computed: torch.dtype
    storage_dtype: torch.dtype
    recompute: bool = False

    def begun(self, x: Tensor | LazyFeatureMap) -> Tensor | LazyFeatureMap:
        """A block's input, kept unless it is to be made anew."""
        if isinstance(x, Tensor):
            return x
        return x.overlapping() if self.recompute else self.collect(x)

    def residual(self, block: ResnetBlock2D, x: Tensor | LazyFeatureMap) -> Tensor:
        """conv2(act(norm2(conv1(act(norm1(x)))))) plus x or its shortcut, in the memory of x if that is there."""
        first = self.normed(block.norm1, block.nonlinearity, x).convolved(block.conv1)
        if isinstance(x, LazyFeatureMap):
            made = self.in_memory_of(self.collect(first), block, x)
        else:
            anew = self.recompute and block.conv_shortcut is None  # a shortcut overwrites x too early
            inner = first.overlapping() if anew else self.collect(first)
            second = self.normed(block.norm2, block.nonlinearity, inner).convolved(block.conv2)
            made = x if block.conv_shortcut is None else self.shortened(block.conv_shortcut, x)
            second.write(made, add=True)
        return made if block.output_scale_factor == 1 else made.div_(block.output_scale_factor)

    def in_memory_of(self, inner: Tensor, block: ResnetBlock2D, x: LazyFeatureMap) -> Tensor:
        """conv2(act(norm2(inner))) plus x or its shortcut, where strip after strip of x is made."""
        second = self.normed(block.norm2, block.nonlinearity, inner).overlapping().convolved(block.conv2)
        second.write(inner)
        (x if block.conv_shortcut is None else x.mixed(block.conv_shortcut)).write(inner, add=True)
        return inner

    def normed(self, norm: nn.Module, act: nn.Module, x: Tensor | LazyFeatureMap) -> LazyFeatureMap:
        """act(norm(x)), computed in float32."""
        x = as_lazy_map(x)
        scale, shift = norm(*channel_statistics(x))

        def take(first: int, last: int) -> Tensor:
            strip = x.take(first, last).to(torch.float32, copy=True)
            return torch.as_tensor(act(torch.addcmul(shift, strip, scale, out=strip))).to(self.computed)

        return replace(x, take=take)

    def doubled(self, x: Tensor) -> LazyFeatureMap:
        """x twice as high and wide, each value four times."""

        def take(first: int, last: int) -> Tensor:
            above = first // 2
            taller = F.interpolate(x[:, :, above : -(-last // 2)], scale_factor=2.0, mode="nearest")
            return taller[:, :, first - 2 * above : last - 2 * above].to(self.computed)

        return LazyFeatureMap(x.shape[1], 2 * x.shape[2], 2 * x.shape[3], x.device, take)

    def collect(self, rows: LazyFeatureMap) -> Tensor:
        """Strips put together, [1, C, height, width]."""
        shape = (1, rows.channels, rows.height, rows.width)
        whole = torch.empty(shape, dtype=self.storage_dtype, device=rows.device, memory_format=torch.channels_last)
        rows.write(whole)
        return whole

    def shortened(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """A 1x1 convolution of x [1, C, H, W], written into the memory of x where that has room."""
        channels, height, width = x.shape[1:]
        if conv.out_channels > channels:
            return torch.as_tensor(conv(x.to(self.computed))).to(self.storage_dtype, memory_format=torch.channels_last)
        room = x.permute(0, 2, 3, 1).view(-1)
        end = 0
        for strip in torch.split(x, as_lazy_map(x).strip_rows, dim=2):  # each is read before its place is written
            made = conv(strip.to(self.computed)).permute(0, 2, 3, 1).reshape(-1)
            start, end = end, end + len(made)
            room[start:end] = made
        return room[:end].view(1, height, width, conv.out_channels).permute(0, 3, 1, 2)
