"""A UNet that calibrates in seconds, and a recipe for it."""

import torch
from diffusers import UNet2DConditionModel

from tests.support.paths import EMBEDDED_MODEL

EMBEDDED = EMBEDDED_MODEL
RECIPE = """
steps = 2
scale = 2.0
points = 2
tokens = 2048
sweeps = 2
prompts = ["red apple", "blue heart", "cat", "dog", "green car", "yellow sun"]
held_out = ["lion", "bell"]
"""
CPU = torch.device("cpu")


def small_unet() -> UNet2DConditionModel:
    """Return a UNet with random weights, whose predictions depend on latents, timestep and text."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=256,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
