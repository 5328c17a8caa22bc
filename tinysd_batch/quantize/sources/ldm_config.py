"""SD v1's architecture in diffusers' words, its widths read off the tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.sources.clip_tokenizer import VOCABULARY

STAGES = 4
HEADS = 8
TEXT_HEAD_WIDTH = 64
NORM_GROUPS = 32
SAMPLE_SIZE = 64  # latents a side, of which SD v1 saw most
PIXELS = 512
VAE_SCALE = 0.18215
BETAS = (0.00085, 0.012)
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": BETAS[0], "beta_end": BETAS[1], "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "skip_prk_steps": True, "set_alpha_to_one": False,
    "steps_offset": 1,
}  # fmt: skip
# What diffusers' converters ask of a configuration.
UNET_LAYERS = {"layers_per_block": 2}
VAE_LAYERS = {"down_block_types": [""] * STAGES, "up_block_types": [""] * STAGES}


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, where: Path) -> tuple[int, ...]:
    """Raises ModelError where the tensor is missing or has another number of dimensions."""
    if name not in tensors:
        raise ModelError(f"{where}: tensor {name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ModelError(f"{where}: tensor {name} has shape {list(shape)}; {dims} dimensions were expected")
    return shape


def widths_of(tensors: Mapping[str, Tensor], pattern: str, where: Path) -> list[int]:
    """Channels of each stage, from its first convolution."""
    widths = [shape_of(tensors, pattern.format(stage), 4, where)[0] for stage in range(STAGES)]
    for width in widths:
        if width % NORM_GROUPS:
            raise ModelError(f"{where}: {width} channels; SD v1's norms work on multiples of {NORM_GROUPS}")
    return widths


def unet_config(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """Of UNet2DConditionModel, from tensors in diffusers' names. Raises ModelError."""
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": SAMPLE_SIZE,
        "in_channels": shape_of(tensors, "conv_in.weight", 4, where)[1],
        "out_channels": shape_of(tensors, "conv_out.weight", 4, where)[0],
        "block_out_channels": widths_of(tensors, "down_blocks.{}.resnets.0.conv1.weight", where),
        "cross_attention_dim": shape_of(tensors, attention, 2, where)[1],
        "attention_head_dim": HEADS,  # diffusers' old name for the number of heads
        "layers_per_block": 2,
        "norm_num_groups": NORM_GROUPS,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }


def vae_config(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """Of AutoencoderKL, from tensors in diffusers' names. Raises ModelError."""
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": PIXELS,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": shape_of(tensors, "post_quant_conv.weight", 4, where)[0],
        "block_out_channels": widths_of(tensors, "encoder.down_blocks.{}.resnets.0.conv1.weight", where),
        "layers_per_block": 2,
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": VAE_SCALE,
        "down_block_types": ["DownEncoderBlock2D"] * STAGES,
        "up_block_types": ["UpDecoderBlock2D"] * STAGES,
    }


def text_config(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """Of CLIPTextModel, from tensors in transformers' names without `text_model.`. Raises ModelError."""
    words, width = shape_of(tensors, "embeddings.token_embedding.weight", 2, where)
    if words != VOCABULARY:
        raise ModelError(f"{where}: the text encoder knows {words:,} tokens; CLIP's tokenizer has {VOCABULARY:,}")
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": shape_of(tensors, "encoder.layers.0.mlp.fc1.weight", 2, where)[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(width // TEXT_HEAD_WIDTH, 1),
        "max_position_embeddings": shape_of(tensors, "embeddings.position_embedding.weight", 2, where)[0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": VOCABULARY - 1,
    }


def check_schedule(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise ModelError where the file was trained on another noise schedule than SD v1's."""
    start, end = (beta**0.5 for beta in BETAS)
    betas = torch.linspace(start, end, 1000) ** 2
    for name, expected in (("betas", betas), ("alphas_cumprod", (1 - betas).cumprod(0))):
        found = tensors.get(name)
        if found is None:
            continue
        if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=0.02):
            raise ModelError(f"{where}: its noise schedule ({name}) is not SD v1's; only that is read")
