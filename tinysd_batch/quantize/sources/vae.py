"""Read a VAE from a folder, from a file of its own or out of a checkpoint, under LDM's or diffusers' names."""

from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.sources.checkpoint_source import (
    SourceComponent,
    SourceOptions,
    check_vae_tensors,
    has_encoder,
)
from tinysd_batch.quantize.sources.component_files import read_component
from tinysd_batch.quantize.sources.detect import AUTOENCODER, SD_V1, detect_model_type
from tinysd_batch.quantize.sources.ldm_config import VAE_CONVERTER_CONFIG, VAE_SCALING_FACTOR, infer_vae_config
from tinysd_batch.quantize.sources.ldm_names import VAE_PREFIX, convert_to_diffusers_names, find_ignored_category
from tinysd_batch.quantize.sources.tensor_files import open_tensors

# What diffusers called the layers of a VAE's attention before version 0.18.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a VAE's attention layers today's names; weights of 1x1 convolutions become matrices."""
    renamed = {}
    for name, tensor in tensors.items():
        *parents, layer, leaf = name.split(".") if name.count(".") else ("", name)
        if layer in OLD_ATTENTION_NAMES and "attentions" in parents:
            name = ".".join([*parents, OLD_ATTENTION_NAMES[layer], leaf])
            tensor = tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor
        renamed[name] = tensor
    return renamed


def read_vae_folder(path: Path, options: SourceOptions) -> SourceComponent:
    """Read a VAE's own folder, or the `vae` folder of a model."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    vae = read_component(folder, "vae", options)
    vae = SourceComponent(vae.config, rename_old_attention(vae.tensors), vae.path)
    if (scale := vae.config.get("scaling_factor", VAE_SCALING_FACTOR)) != VAE_SCALING_FACTOR:
        raise ModelError(f"{folder}: its scaling_factor is {scale}; that of SD v1's VAE is {VAE_SCALING_FACTOR}")
    check_vae_tensors(vae)
    return vae


def convert_ldm_vae(tensors: Mapping[str, Tensor], path: Path) -> SourceComponent:
    """Select the VAE among tensors under LDM's names, and rename it."""
    selected = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(VAE_PREFIX) and find_ignored_category(name) is None
    }
    converted = convert_to_diffusers_names(
        selected, lambda ldm_tensors: convert_ldm_vae_checkpoint(ldm_tensors, VAE_CONVERTER_CONFIG), path
    )
    return build_vae_component(converted, path)


def build_vae_component(tensors: dict[str, Tensor], path: Path) -> SourceComponent:
    """Build a checked component from a VAE's tensors under diffusers' names. Raises ModelError."""
    vae = SourceComponent(infer_vae_config(tensors, path), tensors, path)
    if not has_encoder(vae):
        raise ModelError(f"{path}: the VAE has no encoder")
    check_vae_tensors(vae)
    return vae


def read_vae(path: Path, options: SourceOptions) -> SourceComponent:
    """Read the VAE that `--vae` names: a folder, a file of its own, or a checkpoint that contains one."""
    if path.is_dir():
        return read_vae_folder(path, options)
    contents = open_tensors(path, allow_pickle=options.allow_pickle)
    if any(name.startswith("decoder.up_blocks.") for name in contents.tensors):
        return build_vae_component(rename_old_attention(contents.tensors), path)
    model_type = detect_model_type(contents)
    if model_type.name not in (SD_V1, AUTOENCODER):
        raise ModelError(f"{path}: no VAE: this is {model_type.name}")
    if model_type.name == AUTOENCODER and "decoder.conv_in.weight" in contents.tensors:
        return convert_ldm_vae({f"{VAE_PREFIX}{name}": tensor for name, tensor in contents.tensors.items()}, path)
    if not any(name.startswith(VAE_PREFIX) for name in contents.tensors):
        raise ModelError(f"{path}: it contains no VAE")
    return convert_ldm_vae(contents.tensors, path)
