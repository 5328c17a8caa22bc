"""A synthetic checkpoint in tiny-stable-diffusion's format: a small SD v1 UNet with random packed weights.

The real file is not available to tests, but its layout is known. Four consecutive output channels share a byte, the
first in the lowest bits, and every output channel has a float32 `delta` and `zero_point`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PREFIX = "model.diffusion_model.model."
MULTIPLIERS = (1, 2, 4, 4)
CONTEXT = 128


@dataclass(frozen=True)
class Layer:
    name: str
    storage: str  # q2, q8, float or norm
    shape: tuple[int, ...]
    bias: bool = True


def residual(prefix: str, width_in: int, width: int, time: int) -> Iterator[Layer]:
    yield Layer(f"{prefix}.in_layers.0", "norm", (width_in,))
    yield Layer(f"{prefix}.in_layers.2", "q2", (width, width_in, 3, 3))
    yield Layer(f"{prefix}.emb_layers.1", "q2", (width, time))
    yield Layer(f"{prefix}.out_layers.0", "norm", (width,))
    yield Layer(f"{prefix}.out_layers.3", "q2", (width, width, 3, 3))
    if width_in != width:
        yield Layer(f"{prefix}.skip_connection", "float", (width, width_in, 1, 1))


def transformer(prefix: str, width: int, context: int) -> Iterator[Layer]:
    block = f"{prefix}.transformer_blocks.0"
    yield Layer(f"{prefix}.norm", "norm", (width,))
    yield Layer(f"{prefix}.proj_in", "q2", (width, width, 1, 1))
    for name, columns in (("attn1", width), ("attn2", context)):
        yield Layer(f"{block}.{name}.to_q", "q2", (width, width), bias=False)
        yield Layer(f"{block}.{name}.to_k", "q2", (width, columns), bias=False)
        yield Layer(f"{block}.{name}.to_v", "q2", (width, columns), bias=False)
        yield Layer(f"{block}.{name}.to_out.0", "q2", (width, width))
    yield Layer(f"{block}.ff.net.0.proj", "q2", (8 * width, width))
    yield Layer(f"{block}.ff.net.2", "q2", (width, 4 * width))
    for number in (1, 2, 3):
        yield Layer(f"{block}.norm{number}", "norm", (width,))
    yield Layer(f"{prefix}.proj_out", "q2", (width, width, 1, 1))


def unet_layers(base: int, context: int) -> Iterator[Layer]:
    """Yield every layer of SD v1's UNet.

    Args:
        base: channels of the first level (SD v1: 320).
        context: width of a token's text embedding (SD v1: 768).
    """
    time = 4 * base
    widths = [base * factor for factor in MULTIPLIERS]
    yield Layer("time_embed.0", "q8", (time, base))
    yield Layer("time_embed.2", "q8", (time, time))
    yield Layer("input_blocks.0.0", "q8", (base, 4, 3, 3))
    skips, channels, number = [base], base, 1
    for stage, width in enumerate(widths):
        for _ in range(2):
            yield from residual(f"input_blocks.{number}.0", channels, width, time)
            if stage < 3:
                yield from transformer(f"input_blocks.{number}.1", width, context)
            channels, number = width, number + 1
            skips.append(channels)
        if stage < 3:
            yield Layer(f"input_blocks.{number}.0.op", "float", (width, width, 3, 3))
            skips.append(channels)
            number += 1
    yield from residual("middle_block.0", channels, channels, time)
    yield from transformer("middle_block.1", channels, context)
    yield from residual("middle_block.2", channels, channels, time)
    for number in range(12):
        stage = 3 - number // 3
        width = widths[stage]
        yield from residual(f"output_blocks.{number}.0", channels + skips.pop(), width, time)
        channels = width
        if stage < 3:
            yield from transformer(f"output_blocks.{number}.1", width, context)
        if number % 3 == 2 and stage > 0:
            yield Layer(f"output_blocks.{number}.{2 if stage < 3 else 1}.conv", "q2", (width, width, 3, 3))
    yield Layer("out.0", "norm", (base,))
    yield Layer("out.2", "q8", (4, base, 3, 3))


def unet_checkpoint(base: int = 32, seed: int = 0, context: int = CONTEXT) -> dict[str, Tensor]:
    """Return the UNet's tensors under the names of tiny-stable-diffusion's file."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in unet_layers(base, context):
        name, rows = PREFIX + layer.name, layer.shape[0]
        column = (rows,) + (1,) * (len(layer.shape) - 1)
        spread = math.prod(layer.shape[1:]) ** -0.5
        if layer.storage == "norm":
            tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(rows, generator=generator)
        elif layer.storage == "q2":
            codes = torch.randint(0, 4, layer.shape, generator=generator, dtype=torch.uint8).view(rows // 4, 4, -1)
            packed = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
            tensors[f"{name}.weight"] = packed.view(rows // 4, *layer.shape[1:])
            tensors[f"{name}.weight_quantizer.delta"] = spread * (0.7 + 0.4 * torch.rand(column, generator=generator))
            tensors[f"{name}.weight_quantizer.zero_point"] = torch.randint(1, 3, column, generator=generator).float()
        else:
            tensors[f"{name}.weight"] = spread * torch.randn(layer.shape, generator=generator)
        if layer.storage == "q8":
            tensors[f"{name}.weight_quantizer.delta"] = torch.full(column, spread * 5 / 255)
            tensors[f"{name}.weight_quantizer.zero_point"] = torch.full(column, 128.0)
        if layer.bias:
            tensors[f"{name}.bias"] = 0.05 * torch.randn(rows, generator=generator)
    return tensors


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same UNet as floats, under the names of SD v1's own files."""
    floats: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            continue
        weight = value
        if leaf == "weight" and f"{layer}.weight_quantizer.delta" in tensors:
            delta = tensors[f"{layer}.weight_quantizer.delta"]
            zero = tensors[f"{layer}.weight_quantizer.zero_point"]
            if value.dtype == torch.uint8:
                codes = torch.stack([value >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten(0, 1).float()
            else:
                codes = ((value / delta).round() + zero).clamp(0, 255)
            weight = (codes - zero) * delta
        floats[name.replace(PREFIX, "model.diffusion_model.")] = weight
    return floats
