"""Read a VAE from a file or folder of its own."""

from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
)
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
from tinysd_batch.quantize.sources.ldm_config import (
    VAE_CONVERTER_CONFIG,
    VAE_SCALING_FACTOR,
    infer_vae_config,
)
from tinysd_batch.quantize.sources.ldm_names import VAE_PREFIX, convert_to_diffusers_names, find_ignored_category
from tinysd_batch.quantize.sources.tensor_files import open_tensors

# diffusers' names of an autoencoder's attention before 0.18.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors with its attention called as today; weights of 1x1 convolutions become matrices."""
    renamed = {}
    for name, value in tensors.items():
        *path, layer, leaf = name.split(".") if name.count(".") else ("", name)
        if layer in OLD_ATTENTION_NAMES and "attentions" in path:
            name = ".".join([*path, OLD_ATTENTION_NAMES[layer], leaf])
            value = value[:, :, 0, 0] if value.dim() == 4 else value
        renamed[name] = value
    return renamed


def read_vae_folder(path: Path, options: SourceOptions) -> SourceComponent:
    """An autoencoder's own folder, or that of a model folder."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    part = read_component(folder, "vae", options)
    part = SourceComponent(part.config, rename_old_attention(part.tensors), part.path)
    if (scale := part.config.get("scaling_factor", VAE_SCALING_FACTOR)) != VAE_SCALING_FACTOR:
        raise ModelError(
            f"{folder}: its scaling_factor is {scale}; that of SD v1's autoencoder is {VAE_SCALING_FACTOR}"
        )
    check_vae_tensors(part)
    return part


def convert_ldm_vae(tensors: Mapping[str, Tensor], where: Path) -> SourceComponent:
    """The autoencoder among tensors in LDM's names."""
    mine = {
        name: value
        for name, value in tensors.items()
        if name.startswith(VAE_PREFIX) and find_ignored_category(name) is None
    }
    converted = convert_to_diffusers_names(
        mine, lambda named: convert_ldm_vae_checkpoint(named, VAE_CONVERTER_CONFIG), where
    )
    return build_vae_component(converted, where)


def build_vae_component(tensors: dict[str, Tensor], where: Path) -> SourceComponent:
    part = SourceComponent(infer_vae_config(tensors, where), tensors, where)
    if not has_encoder(part):
        raise ModelError(f"{where}: the autoencoder has no encoder")
    check_vae_tensors(part)
    return part


def read_vae(path: Path, options: SourceOptions) -> SourceComponent:
    """The autoencoder that `--vae` names: a folder, a file of its own, or a checkpoint that has one."""
    if path.is_dir():
        return read_vae_folder(path, options)
    contents = open_tensors(path, allow_pickle=options.allow_pickle)
    if any(name.startswith("decoder.up_blocks.") for name in contents.tensors):
        return build_vae_component(rename_old_attention(contents.tensors), path)
    kind = detect_model_type(contents)
    if kind.name not in (SD_V1, AUTOENCODER):
        raise ModelError(f"{path}: no autoencoder: this is {kind.name}")
    if kind.name == AUTOENCODER and "decoder.conv_in.weight" in contents.tensors:
        return convert_ldm_vae({f"{VAE_PREFIX}{name}": value for name, value in contents.tensors.items()}, path)
    if not any(name.startswith(VAE_PREFIX) for name in contents.tensors):
        raise ModelError(f"{path}: no autoencoder is in it")
    return convert_ldm_vae(contents.tensors, path)
