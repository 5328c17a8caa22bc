"""The UNet as two halves over diffusers' blocks, so that one can be on the device without the other.

What passes between them: the middle feature map and the skip feature maps.
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
    """Those that the UNet has: some were distilled down to no middle block."""
    return {name: module for name in names if (module := getattr(unet, name)) is not None}


def run_unet(
    unet: UNet2DConditionModel, latents: Tensor, prompts: Tensor, rows: int | None, dtype: torch.dtype
) -> Tensor:
    """What a UNet says whose `hoist.Hoisted` layers know timestep and prompts: [R, 4, h, w] float32.

    `latents` are [R, 4, h, w], `prompts` [R] names the prompt of each row; so many `rows` work at once, or all.
    """
    embedding = torch.zeros(1, device=latents.device, dtype=dtype)
    said = []
    for some, which in zip(
        torch.split(latents, rows or len(latents)), torch.split(prompts, rows or len(latents)), strict=True
    ):
        context = which.view(-1, 1, 1)
        said.append(decode_half(unet, encode_half(unet, some.to(dtype), embedding, context), context).float())
    return torch.cat(said)


def encode_half(unet: UNet2DConditionModel, latents: Tensor, embedding: Tensor, context: Tensor) -> Halfway:
    """Latents [2B, 4, h, w] to the middle of the UNet.

    `embedding` of the timestep [2B or 1, 4 C0] and `context` [2B, T, D] are what the UNet's layers want: with those of
    `hoist` in their places a number of no meaning, and the rows of prompts [2B, 1, 1].
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
    """From the middle of the UNet to the predicted noise [2B, 4, h, w]. Uses up the skips."""
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
