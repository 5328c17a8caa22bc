"""Write a float model of a few kilobytes in diffusers' layout."""

import json
from pathlib import Path

from tests.support.files import write_json
from tinysd_batch.model.checkpoint.info import embedded_model_path

TEXT_WIDTH = 32


def write_float_model(folder: Path) -> None:
    """Write SD's classes with random weights: 16x16 pixels, blocks named as in SD v1."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )
    vae = AutoencoderKL(
        latent_channels=4, sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    tokenizer = embedded_model_path() / "tokenizer"
    vocab_size = len(json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8")))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size, hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=24, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    for name, module in (("unet", unet), ("vae", vae)):
        module.save_pretrained(folder / name)
    (folder / "text_encoder").mkdir()
    write_json(folder / "text_encoder" / "config.json", text_encoder.config.to_dict())
    tensors = {name: tensor.contiguous() for name, tensor in text_encoder.state_dict().items()}
    save_file(tensors, folder / "text_encoder" / "model.safetensors")
    for component in ("tokenizer", "scheduler"):
        (folder / component).mkdir()
        for file in (embedded_model_path() / component).iterdir():
            (folder / component / file.name).write_bytes(file.read_bytes())
    write_json(folder / "tinysd.json", {"name": "random 16", "steps": 2, "scale": 2.0})
