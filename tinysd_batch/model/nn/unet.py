"""Run diffusers' UNet as two halves, so that one can be on the device without the other.

The middle feature map and the skip feature maps are passed between them.
"""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

ENCODE_MODULES = ("conv_in", "down_blocks", "mid_block")
DECODE_MODULES = ("up_blocks", "conv_norm_out", "conv_out")


@dataclass(slots=True)
class Halfway:
    """The state between the halves."""

    hidden: Tensor  # [2B, C, h / 2^n, w / 2^n]
    skips: list[Tensor]
    embedding: Tensor


def select_modules(unet: UNet2DConditionModel, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the named modules that exist: some UNets were distilled and have no middle block."""
    return {name: module for name in names if (module := getattr(unet, name)) is not None}


def run_unet(
    unet: UNet2DConditionModel, latents: Tensor, prompts: Tensor, rows: int | None, dtype: torch.dtype
) -> Tensor:
    """Predict noise with a UNet whose `PrecomputedLayers` hold the timestep and the prompts.

    Args:
        unet: the UNet with precomputed outputs in place of layers.
        latents: [R, 4, h, w].
        prompts: [R], the index of each row's prompt.
        rows: rows that go through the UNet at once; None: all.
        dtype: dtype to compute in.

    Returns:
        Predicted noise, float32 [R, 4, h, w].
    """
    embedding = torch.zeros(1, device=latents.device, dtype=dtype)
    size = rows or len(latents)
    noise = []
    for chunk, indices in zip(torch.split(latents, size), torch.split(prompts, size), strict=True):
        context = indices.view(-1, 1, 1)
        noise.append(decode_half(unet, encode_half(unet, chunk.to(dtype), embedding, context), context).float())
    return torch.cat(noise)


def encode_half(unet: UNet2DConditionModel, latents: Tensor, embedding: Tensor, context: Tensor) -> Halfway:
    """Run the encode half on latents [2B, 4, h, w].

    `embedding` of the timestep [2B or 1, 4 C0] and `context` [2B, T, D] are passed to the UNet's layers. With
    precomputed layers the embedding is ignored, and `context` holds the indices of prompts, [2B, 1, 1].
    """
    hidden = unet.conv_in(latents)
    skips = [hidden]
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            hidden, outputs = block(hidden, embedding, encoder_hidden_states=context)
        else:
            hidden, outputs = block(hidden, embedding)
        skips += outputs
    if unet.mid_block is not None:
        hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=context)
    return Halfway(hidden, skips, embedding)


def decode_half(unet: UNet2DConditionModel, state: Halfway, context: Tensor) -> Tensor:
    """Run the decode half, to the predicted noise [2B, 4, h, w]. Consumes the skips."""
    hidden = state.hidden
    for block in unet.up_blocks:
        count = len(block.resnets)
        skips = tuple(state.skips[-count:])
        del state.skips[-count:]
        if getattr(block, "has_cross_attention", False):
            hidden = block(hidden, skips, state.embedding, encoder_hidden_states=context)
        else:
            hidden = block(hidden, skips, state.embedding)
    return torch.as_tensor(unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden))))
