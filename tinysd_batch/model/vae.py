"""The VAE decoder, strip by strip over diffusers' blocks, so that few large maps exist at a time.

A whole decoder at 512x512 holds a gigabyte of feature maps in float32. Here norm, activation and convolution run over
some rows of a map at a time, with the group norm's statistics taken from the whole map, so that there are no seams.
What remains is a block's input and one map between its two convolutions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tinysd_batch.model.parts import part_bytes

HALO = 1  # rows that a 3x3 convolution sees beyond its own

Factors = tuple[Tensor, Tensor]


class FactorNorm(nn.GroupNorm):
    """A group norm that tells by what to multiply each channel of a map, and what to add: [1, C, 1, 1] each."""

    def forward(self, x: Tensor) -> Factors:  # type: ignore[override] # what it returns
        mean, variance = channel_statistics(x)
        means, variances = mean.view(self.num_groups, -1), variance.view(self.num_groups, -1)
        # The law of total variance: within channels, and between them.
        spread = variances.mean(dim=1) + means.var(dim=1, correction=0)
        each = self.num_channels // self.num_groups
        scale = self.weight * (spread + self.eps).rsqrt().repeat_interleave(each)
        shift = self.bias - means.mean(dim=1).repeat_interleave(each) * scale
        return scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of [1, C, H, W], float64 [C], taken strip by strip."""
    taken = torch.split(x, strip_rows(x.shape[1], x.shape[3]), dim=2)
    parts = [torch.var_mean(strip.float(), dim=(0, 2, 3), correction=0) for strip in taken]
    variances, means = (torch.stack(values).double() for values in zip(*parts, strict=True))
    rows = torch.tensor([[strip.shape[2]] for strip in taken], dtype=torch.float64, device=x.device) / x.shape[2]
    mean = (rows * means).sum(dim=0)
    return mean, (rows * (variances + (means - mean) ** 2)).sum(dim=0)


def strip_rows(channels: int, width: int) -> int:
    """How many rows of a map make a strip."""
    return max(1, part_bytes() // (4 * channels * width))


def use_factor_norms(vae: AutoencoderKL) -> None:
    """Put the norms that strips need into the decoder, empty, in place."""
    decoder = vae.decoder
    resnets = [module for module in decoder.modules() if isinstance(module, ResnetBlock2D)]
    for owner, name in [(decoder, "conv_norm_out"), *((one, name) for one in resnets for name in ("norm1", "norm2"))]:
        norm = getattr(owner, name)
        with torch.device("meta"):
            setattr(owner, name, FactorNorm(norm.num_groups, norm.num_channels, norm.eps))


def decode_latents(vae: AutoencoderKL, latents: Tensor, kept: torch.dtype | None = None) -> Tensor:
    """Latents [B, 4, h, w], scaled, to pixels in -1..1, [B, 3, H, W] float32 on the host; an image at a time.

    Large maps are kept in the type `kept`, if it is not that of the latents, in which all is computed.
    """
    return torch.cat([decode_one(vae, one, kept).float().cpu() for one in torch.split(latents, 1)])


def decode_one(vae: AutoencoderKL, latents: Tensor, kept: torch.dtype | None = None) -> Tensor:
    decoder, maps = vae.decoder, Maps(latents.dtype, kept or latents.dtype)
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    x = decoder.conv_in(latents).to(maps.kept, memory_format=torch.channels_last)
    first, *others = decoder.mid_block.resnets
    x = maps.residual(first, x)
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
        if attention is not None:
            x = attention(x.to(maps.computed)).to(maps.kept, memory_format=torch.channels_last)
        x = maps.residual(resnet, x)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = maps.residual(resnet, x)
        for upsampler in block.upsamplers or ():
            x = maps.collect(maps.doubled(x), upsampler.conv)
    return maps.collect(maps.normed(decoder.conv_norm_out, decoder.conv_act, x), decoder.conv_out)


@dataclass(frozen=True, slots=True)
class Rows:
    """A map [1, C, height, width] that is made when it is looked at, some rows at a time."""

    channels: int
    height: int
    width: int
    take: Callable[[int, int], Tensor]  # first row and the row after the last to [1, C, rows, width]

    def strips(self, conv: nn.Module) -> Iterator[tuple[int, int, Tensor]]:
        """A 3x3 convolution in parts: first row, the row after the last, [1, C, rows, width]."""
        step = strip_rows(self.channels, self.width)
        for top in range(0, self.height, step):
            bottom = min(top + step, self.height)
            first, last = max(0, top - HALO), min(self.height, bottom + HALO)
            yield top, bottom, conv(self.take(first, last))[:, :, top - first : bottom - first]


@dataclass(frozen=True, slots=True)
class Maps:
    """Feature maps kept in one type and computed with, strip by strip, in another."""

    computed: torch.dtype
    kept: torch.dtype

    def residual(self, block: ResnetBlock2D, x: Tensor) -> Tensor:
        """conv2(act(norm2(conv1(act(norm1(x)))))) plus x or its shortcut, in the memory of x."""
        inner = self.collect(self.normed(block.norm1, block.nonlinearity, x), block.conv1)
        base = x if block.conv_shortcut is None else self.shortened(block.conv_shortcut, x)
        for top, bottom, strip in self.normed(block.norm2, block.nonlinearity, inner).strips(block.conv2):
            base[:, :, top:bottom] += strip
        return base if block.output_scale_factor == 1 else base.div_(block.output_scale_factor)

    def normed(self, norm: nn.Module, act: nn.Module, x: Tensor) -> Rows:
        """act(norm(x)), computed in float32."""
        scale, shift = norm(x)

        def take(first: int, last: int) -> Tensor:
            return torch.as_tensor(act(torch.addcmul(shift, x[:, :, first:last].float(), scale))).to(self.computed)

        return Rows(x.shape[1], x.shape[2], x.shape[3], take)

    def doubled(self, x: Tensor) -> Rows:
        """x twice as high and wide, each value four times."""

        def take(first: int, last: int) -> Tensor:
            above = first // 2
            taller = F.interpolate(x[:, :, above : -(-last // 2)], scale_factor=2.0, mode="nearest")
            return taller[:, :, first - 2 * above : last - 2 * above].to(self.computed)

        return Rows(x.shape[1], 2 * x.shape[2], 2 * x.shape[3], take)

    def collect(self, rows: Rows, conv: nn.Module) -> Tensor:
        """A convolution's strips put together, [1, C, height, width]."""
        whole: Tensor | None = None
        for top, bottom, strip in rows.strips(conv):
            if whole is None:
                shape = (1, strip.shape[1], rows.height, rows.width)
                whole = torch.empty(shape, dtype=self.kept, device=strip.device, memory_format=torch.channels_last)
            whole[:, :, top:bottom] = strip
        assert whole is not None, rows.height
        return whole

    def shortened(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """A 1x1 convolution of x [1, C, H, W], written into the memory of x where that has room."""
        channels, height, width = x.shape[1:]
        if conv.out_channels > channels:
            return torch.as_tensor(conv(x.to(self.computed))).to(self.kept, memory_format=torch.channels_last)
        room = x.permute(0, 2, 3, 1).view(-1)
        end = 0
        for strip in torch.split(x, strip_rows(channels, width), dim=2):  # each is read before its place is written
            made = conv(strip.to(self.computed)).permute(0, 2, 3, 1).reshape(-1)
            start, end = end, end + len(made)
            room[start:end] = made
        return room[:end].view(1, height, width, conv.out_channels).permute(0, 3, 1, 2)
