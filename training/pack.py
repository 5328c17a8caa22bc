"""Write model folders from trained components: everything but the UNet of the folder that ships, and float weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinysd_batch.model.checkpoint.folder import write_packed_unet, write_pipeline_index
from tinysd_batch.model.packed.format import PackedWeight
from tinysd_batch.quantize.data_free import quantize_unet
from tinysd_batch.quantize.presets import SMALLEST_PRESET, get_preset_layouts
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent
from training import captions, checkpoints, unet, vae

STEPS, SCALE = 20, 2.0
NAME = "tinysd emoji 64"


def to_float16(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}


def clean_config(module: Any) -> dict[str, Any]:
    config = json.loads(module.to_json_string()) if hasattr(module, "to_json_string") else module.config.to_dict()
    return {
        name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version", "dtype")
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_decoder_state(build: Path) -> dict[str, Tensor]:
    state = checkpoints.load(build / "decoder_done.pt") or checkpoints.load(build / "decoder.pt")
    state = state or checkpoints.load(build / "vae_frozen.pt")
    assert state is not None, "train the autoencoder first"
    return state["vae"]


def write_shared_components(build: Path, out: Path) -> None:
    """Write everything but the UNet: text encoder, VAE decoder, tokenizer, scheduler, name and defaults."""
    _, text = unet.read_trained(build)
    # Without a dtype, transformers would compute in the file's float16, and diffusers' pipeline in two dtypes.
    write_json(out / "text_encoder" / "config.json", {**clean_config(text), "dtype": "float32"})
    save_file(to_float16(text), out / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    autoencoder = vae.build_vae()
    autoencoder.load_state_dict(read_decoder_state(build))
    write_json(out / "vae" / "config.json", clean_config(autoencoder))
    decoder = {
        name: tensor
        for name, tensor in to_float16(autoencoder).items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    save_file(decoder, out / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    tokenizer = out / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).write_bytes((build / "tokenizer" / name).read_bytes())
    write_json(
        tokenizer / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": captions.MAX_TOKENS,
            "bos_token": captions.BOS,
            "eos_token": captions.EOS,
            "pad_token": captions.EOS,
            "unk_token": captions.EOS,
        },
    )
    write_json(
        out / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "PNDMScheduler",
            **unet.BETAS,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    )
    write_pipeline_index(out, vae=["tinysd_batch.diffusers", "AutoencoderKLDecoder"])
    write_json(out / "tinysd.json", {"name": NAME, "steps": STEPS, "scale": SCALE})


def write_model(
    build: Path,
    out: Path,
    packed: dict[str, tuple[PackedWeight, tuple[int, ...]]],
    others: dict[str, Tensor],
    notes: dict[str, Any],
) -> None:
    """Write a complete model folder; `packed` and `others` together are the UNet's tensors."""
    write_shared_components(build, out)
    write_packed_unet(
        out / "unet",
        clean_config(unet.build_unet()),
        packed,
        {name: tensor.half() for name, tensor in others.items()},
        notes,
    )


def write_float_weights(build: Path, out: Path) -> None:
    """Write the float UNet and the VAE's encoder as float16; calibration starts from them."""
    trained, _ = unet.read_trained(build)
    write_json(out / "unet" / "config.json", clean_config(trained))
    save_file(to_float16(trained), out / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    autoencoder = vae.build_vae()
    autoencoder.load_state_dict(read_decoder_state(build))
    encoder = {
        name: tensor for name, tensor in to_float16(autoencoder).items() if name.startswith(("encoder.", "quant_conv."))
    }
    (out / "vae_encoder").mkdir(parents=True, exist_ok=True)
    save_file(encoder, out / "vae_encoder" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_preview(build: Path) -> None:
    """Write `model`, the latest checkpoint quantized without data, to look at while training runs."""
    trained, _ = unet.read_trained(build)
    component = SourceComponent(clean_config(trained), dict(trained.state_dict()), build)
    layers = quantize_unet(component, get_preset_layouts(trained, SMALLEST_PRESET))
    packed = {name: (layer.weight, layer.shape) for name, layer in layers.items()}
    others = {name: tensor for name, tensor in component.tensors.items() if name.removesuffix(".weight") not in layers}
    write_model(build, build / "model", packed, others, {"level": "fast", "preset": SMALLEST_PRESET})


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_preview(Path(__file__).parent / "build")
