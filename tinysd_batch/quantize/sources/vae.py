"""Read a VAE from a file or folder of its own."""

from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.sources.checkpoint_source import (
    Options,
    Part,
    check_vae,
    has_encoder,
)
from tinysd_batch.quantize.sources.component_files import read_part
from tinysd_batch.quantize.sources.detect import AUTOENCODER, SD_V1, kind_of
from tinysd_batch.quantize.sources.ldm_config import (
    VAE_LAYERS,
    VAE_SCALE,
    vae_config,
)
from tinysd_batch.quantize.sources.ldm_names import VAE, convert, spare_kind
from tinysd_batch.quantize.sources.tensor_files import open_tensors

# diffusers' names of an autoencoder's attention before 0.18.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors with its attention called as today; weights of 1x1 convolutions become matrices."""
    renamed = {}
    for name, value in tensors.items():
        *path, layer, leaf = name.split(".") if name.count(".") else ("", name)
        if layer in OLD_ATTENTION and "attentions" in path:
            name = ".".join([*path, OLD_ATTENTION[layer], leaf])
            value = value[:, :, 0, 0] if value.dim() == 4 else value
        renamed[name] = value
    return renamed


def read_vae_folder(path: Path, options: Options) -> Part:
    """An autoencoder's own folder, or that of a model folder."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    part = read_part(folder, "vae", options)
    part = Part(part.config, modern_attention(part.tensors), part.where)
    if (scale := part.config.get("scaling_factor", VAE_SCALE)) != VAE_SCALE:
        raise ModelError(f"{folder}: its scaling_factor is {scale}; that of SD v1's autoencoder is {VAE_SCALE}")
    check_vae(part)
    return part


def vae_part(tensors: Mapping[str, Tensor], where: Path) -> Part:
    """The autoencoder among tensors in LDM's names."""
    mine = {name: value for name, value in tensors.items() if name.startswith(VAE) and spare_kind(name) is None}
    converted = convert(mine, lambda named: convert_ldm_vae_checkpoint(named, VAE_LAYERS), where)
    return checked_vae(converted, where)


def checked_vae(tensors: dict[str, Tensor], where: Path) -> Part:
    part = Part(vae_config(tensors, where), tensors, where)
    if not has_encoder(part):
        raise ModelError(f"{where}: the autoencoder has no encoder")
    check_vae(part)
    return part


def read_vae(path: Path, options: Options) -> Part:
    """The autoencoder that `--vae` names: a folder, a file of its own, or a checkpoint that has one."""
    if path.is_dir():
        return read_vae_folder(path, options)
    contents = open_tensors(path, allow_pickle=options.allow_pickle)
    if any(name.startswith("decoder.up_blocks.") for name in contents.tensors):
        return checked_vae(modern_attention(contents.tensors), path)
    kind = kind_of(contents)
    if kind.name not in (SD_V1, AUTOENCODER):
        raise ModelError(f"{path}: no autoencoder: this is {kind.name}")
    if kind.name == AUTOENCODER and "decoder.conv_in.weight" in contents.tensors:
        return vae_part({f"{VAE}{name}": value for name, value in contents.tensors.items()}, path)
    if not any(name.startswith(VAE) for name in contents.tensors):
        raise ModelError(f"{path}: no autoencoder is in it")
    return vae_part(contents.tensors, path)
