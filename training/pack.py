"""Put the trained parts together: all but the UNet of the folder that ships, and the float folder that stays here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinysd_batch.model.checkpoint.folder import write_packed_unet, write_pipeline_index
from tinysd_batch.model.packed.format import GroupWeight
from training import captions, checkpoints, unet, vae

STEPS, SCALE = 20, 2.0
NAME = "tinysd emoji 64"


def half(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.half().contiguous() for name, value in module.state_dict().items()}


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


def write_shared_parts(build: Path, out: Path) -> None:
    """Everything but the UNet: text encoder, decoder, tokenizer, scheduler, names and defaults."""
    _, text = unet.read_trained(build)
    # Without a dtype, transformers would compute in the file's float16, and diffusers' pipeline in two types.
    write_json(out / "text_encoder" / "config.json", {**clean_config(text), "dtype": "float32"})
    save_file(half(text), out / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    autoencoder = vae.new_vae()
    autoencoder.load_state_dict(read_decoder_state(build))
    write_json(out / "vae" / "config.json", clean_config(autoencoder))
    decoder = {n: v for n, v in half(autoencoder).items() if not n.startswith(("encoder.", "quant_conv."))}
    save_file(decoder, out / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    tokenizer = out / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).write_bytes((build / "tokenizer" / name).read_bytes())
    write_json(
        tokenizer / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": captions.MAX_TOKENS, "bos_token": captions.BOS,
         "eos_token": captions.EOS, "pad_token": captions.EOS, "unk_token": captions.EOS},
    )  # fmt: skip
    write_json(
        out / "scheduler" / "scheduler_config.json",
        {"_class_name": "PNDMScheduler", **unet.BETAS, "num_train_timesteps": 1000, "prediction_type": "epsilon",
         "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    )  # fmt: skip
    write_pipeline_index(out, vae=["tinysd_batch.diffusers", "AutoencoderKLDecoder"])
    write_json(out / "tinysd.json", {"name": NAME, "steps": STEPS, "scale": SCALE})


def write_model(
    build: Path,
    out: Path,
    packed: dict[str, tuple[GroupWeight, tuple[int, ...]]],
    others: dict[str, Tensor],
    notes: dict[str, Any],
) -> None:
    """A whole model folder: `packed` and `others` together make the UNet."""
    write_shared_parts(build, out)
    write_packed_unet(
        out / "unet", clean_config(unet.new_unet()), packed, {n: v.half() for n, v in others.items()}, notes
    )


def write_float_parts(build: Path, out: Path) -> None:
    """The float UNet and the VAE's encoder, fp16: the teacher of later work."""
    trained, _ = unet.read_trained(build)
    write_json(out / "unet" / "config.json", clean_config(trained))
    save_file(half(trained), out / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    autoencoder = vae.new_vae()
    autoencoder.load_state_dict(read_decoder_state(build))
    encoder = {n: v for n, v in half(autoencoder).items() if n.startswith(("encoder.", "quant_conv."))}
    (out / "vae_encoder").mkdir(parents=True, exist_ok=True)
    save_file(encoder, out / "vae_encoder" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def read_float(build: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    trained, _ = unet.read_trained(build)
    return trained, dict(trained.state_dict())


if __name__ == "__main__":
    # A model from whatever training has reached, data-free at 2 bits: to look at while it runs.
    from tinysd_batch.quantize.data_free import quantize_unet

    here = Path(__file__).parent
    torch.set_num_threads(1)
    network, tensors = read_float(here / "build")
    packed = quantize_unet(network, tensors)
    rest = {name: value for name, value in tensors.items() if name.removesuffix(".weight") not in packed}
    write_model(here / "build", here / "build" / "model", packed, rest, {"level": "fast"})
