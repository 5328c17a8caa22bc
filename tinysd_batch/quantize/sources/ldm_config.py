"""diffusers' configurations of SD v1's components, for checkpoints that have none: widths come from the tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.sources.clip_tokenizer import VOCAB_SIZE

N_BLOCK_LEVELS = 4
ATTENTION_HEADS = 8
TEXT_HEAD_WIDTH = 64
NORM_GROUPS = 32
SAMPLE_SIZE = 64  # latents per side that SD v1 was trained on most
IMAGE_PX = 512
VAE_SCALING_FACTOR = 0.18215
BETA_RANGE = (0.00085, 0.012)
SCHEDULER_CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": BETA_RANGE[0],
    "beta_end": BETA_RANGE[1],
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# The entries of a configuration that diffusers' converters read.
UNET_CONVERTER_CONFIG = {"layers_per_block": 2}
VAE_CONVERTER_CONFIG = {"down_block_types": [""] * N_BLOCK_LEVELS, "up_block_types": [""] * N_BLOCK_LEVELS}


def get_tensor_shape(tensors: Mapping[str, Tensor], name: str, dims: int, path: Path) -> tuple[int, ...]:
    """Return a tensor's shape. Raises ModelError if it is missing or has another number of dimensions."""
    if name not in tensors:
        raise ModelError(f"{path}: tensor {name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ModelError(f"{path}: tensor {name} has shape {list(shape)}; {dims} dimensions were expected")
    return shape


def get_level_widths(tensors: Mapping[str, Tensor], pattern: str, path: Path) -> list[int]:
    """Return the channels of each block level, read from its first convolution."""
    widths = [get_tensor_shape(tensors, pattern.format(level), 4, path)[0] for level in range(N_BLOCK_LEVELS)]
    for width in widths:
        if width % NORM_GROUPS:
            raise ModelError(f"{path}: {width} channels; SD v1's group norms need a multiple of {NORM_GROUPS}")
    return widths


def infer_unet_config(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Infer the configuration of a UNet2DConditionModel from tensors under diffusers' names. Raises ModelError."""
    context_projection = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": SAMPLE_SIZE,
        "in_channels": get_tensor_shape(tensors, "conv_in.weight", 4, path)[1],
        "out_channels": get_tensor_shape(tensors, "conv_out.weight", 4, path)[0],
        "block_out_channels": get_level_widths(tensors, "down_blocks.{}.resnets.0.conv1.weight", path),
        "cross_attention_dim": get_tensor_shape(tensors, context_projection, 2, path)[1],
        "attention_head_dim": ATTENTION_HEADS,  # diffusers' old name for the number of heads
        "layers_per_block": 2,
        "norm_num_groups": NORM_GROUPS,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }


def infer_vae_config(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Infer the configuration of an AutoencoderKL from tensors under diffusers' names. Raises ModelError."""
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": IMAGE_PX,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": get_tensor_shape(tensors, "post_quant_conv.weight", 4, path)[0],
        "block_out_channels": get_level_widths(tensors, "encoder.down_blocks.{}.resnets.0.conv1.weight", path),
        "layers_per_block": 2,
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": VAE_SCALING_FACTOR,
        "down_block_types": ["DownEncoderBlock2D"] * N_BLOCK_LEVELS,
        "up_block_types": ["UpDecoderBlock2D"] * N_BLOCK_LEVELS,
    }


def infer_text_encoder_config(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Infer the configuration of a CLIPTextModel from tensors named as in transformers, without `text_model.`.

    Raises:
        ModelError: a tensor is missing, or the vocabulary is not CLIP's.
    """
    vocab_size, width = get_tensor_shape(tensors, "embeddings.token_embedding.weight", 2, path)
    if vocab_size != VOCAB_SIZE:
        raise ModelError(f"{path}: the text encoder knows {vocab_size:,} tokens; CLIP's tokenizer has {VOCAB_SIZE:,}")
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": get_tensor_shape(tensors, "encoder.layers.0.mlp.fc1.weight", 2, path)[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(width // TEXT_HEAD_WIDTH, 1),
        "max_position_embeddings": get_tensor_shape(tensors, "embeddings.position_embedding.weight", 2, path)[0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": VOCAB_SIZE - 2,
        "eos_token_id": VOCAB_SIZE - 1,
        "pad_token_id": VOCAB_SIZE - 1,
    }


def check_noise_schedule(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError if the file was trained with another noise schedule than SD v1's."""
    start, end = (beta**0.5 for beta in BETA_RANGE)
    betas = torch.linspace(start, end, 1000) ** 2
    for name, expected in (("betas", betas), ("alphas_cumprod", (1 - betas).cumprod(0))):
        stored = tensors.get(name)
        if stored is None:
            continue
        if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, rtol=0.02):
            raise ModelError(f"{path}: its noise schedule ({name}) is not SD v1's; other schedules are not supported")
