"""Models of SD v1's size with random weights: a packed one, and a float one to quantize."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tinysd_batch.model.checkpoint.folder import (
    TEXT_ENCODER_WEIGHTS_FILE,
    write_packed_unet,
    write_pipeline_index,
)
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.checkpoint.safetensors_mmap import write_safetensors
from tinysd_batch.model.packed.format import GroupWeight, Layout
from tinysd_batch.quantize.presets import get_preset_layouts
from tinysd_batch.quantize.sources.clip_tokenizer import write_clip_tokenizer

MODEL = Path("outputs/random-sd-v1")
SD_V1_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD_V1_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
}  # fmt: skip
SD_V1_TEXT: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 49406,
    "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip
RANDOM_NUMBERS = 2**24  # repeated as often as needed
STD = 0.02


def build_empty_components() -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Return the components of SD v1 on the meta device."""
    with torch.device("meta"):
        return (
            UNet2DConditionModel(**SD_V1_UNET),
            AutoencoderKL(**SD_V1_VAE),
            CLIPTextModel(CLIPTextConfig(**SD_V1_TEXT)),
        )


def make_random_model(folder: Path) -> None:
    """Write a packed model folder with random weights."""
    print(f"writing {folder}", file=sys.stderr)
    generator = torch.Generator().manual_seed(0)
    unet, vae, text_encoder = build_empty_components()
    layouts = get_preset_layouts(unet, "tiny")
    packed = {name: make_random_packed(unet.get_submodule(name), layout, generator) for name, layout in layouts.items()}
    packed_names = {f"{name}.weight" for name in packed}
    others = make_random_tensors(
        {name: tensor for name, tensor in unet.state_dict().items() if name not in packed_names}, generator
    )
    write_packed_unet(folder / "unet", dict(unet.config), packed, others, {"level": "random"})
    for component, module, config, file_name in (
        ("vae", vae, dict(vae.config), WEIGHTS_FILE),
        ("text_encoder", text_encoder, text_encoder.config.to_dict(), TEXT_ENCODER_WEIGHTS_FILE),
    ):
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / "config.json").write_text(json.dumps(config, indent=2))
        tensors = make_random_tensors(module.state_dict(), generator)
        save_file(tensors, folder / component / file_name, metadata={"format": "pt"})
    write_clip_tokenizer(folder / "tokenizer", SD_V1_TEXT["max_position_embeddings"])
    (folder / "scheduler").mkdir()
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "PNDMScheduler", **schedule})
    )
    (folder / "tinysd.json").write_text(json.dumps({"name": "random SD v1"}))
    write_pipeline_index(folder)


def make_random_packed(
    layer: nn.Module, layout: Layout, generator: torch.Generator
) -> tuple[GroupWeight, tuple[int, ...]]:
    """Return random codes, with a scale at which the layer preserves the spread of its input, and their shape."""
    assert isinstance(layer.weight, Tensor)
    shape = tuple(layer.weight.shape)
    rows, columns = shape[0], layer.weight[0].numel()
    scale = 0.9 * columns**-0.5  # the codes 0..3 have a standard deviation of 1.118
    meta = torch.tensor([scale, 0.0, -1.5 * scale, 0.0], dtype=torch.float16).repeat(rows, 1)
    codes = torch.randint(0, 256, (rows, columns // 4), dtype=torch.uint8, generator=generator)
    zeros = torch.zeros(rows, columns // layout.group_size_in(columns), dtype=torch.uint8)
    return GroupWeight(codes, zeros, zeros.clone(), meta.view(torch.int16)), shape


def make_random_tensors(like: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return float16 tensors of the same shapes: norms 1, biases 0, weights scaled by their fan-in."""
    tensors = {}
    for name, tensor in like.items():
        if tensor.dim() < 2:
            tensors[name] = torch.full(tensor.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.float16)
        else:
            fan_in = tensor[0].numel()
            tensors[name] = (torch.randn(tensor.shape, generator=generator) * 0.9 * fan_in**-0.5).half()
    return tensors


def make_float_model(folder: Path) -> None:
    """Write a float32 model folder in diffusers' layout, 4.3 GB."""
    print(f"writing {folder}", file=sys.stderr)
    numbers = STD * torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0))
    unet, vae, text_encoder = build_empty_components()
    text_config = text_encoder.config.to_dict()
    write_random_component(folder / "unet", unet, dict(unet.config), WEIGHTS_FILE, numbers)
    write_random_component(folder / "vae", vae, dict(vae.config), WEIGHTS_FILE, numbers)
    write_random_component(folder / "text_encoder", text_encoder, text_config, TEXT_ENCODER_WEIGHTS_FILE, numbers)


def write_random_component(
    folder: Path, module: nn.Module, config: dict[str, object], file_name: str, numbers: Tensor
) -> None:
    """Write a component whose tensors repeat `numbers`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = module.state_dict()

    def make_values(name: str) -> Tensor:
        count = shapes[name].numel()
        return numbers.repeat(math.ceil(count / RANDOM_NUMBERS))[:count].view(shapes[name].shape)

    write_safetensors(folder / file_name, shapes, dict.fromkeys(shapes, torch.float32), make_values)
