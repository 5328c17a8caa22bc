"""Write float model folders in diffusers' layout: self-contained, atomic, and with one tensor in memory at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import check_width_matches_unet
from tinysd_batch.model.checkpoint.folder import TEXT_ENCODER_WEIGHTS_FILE, write_packed_unet, write_pipeline_index
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE, read_folder_info
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.checkpoint.safetensors_mmap import write_safetensors
from tinysd_batch.quantize.sources.checkpoint_source import (
    CheckpointSource,
    SourceComponent,
    SourceOptions,
    StatusCallback,
    choose_storage_dtype,
    convert_for_storage,
    has_encoder,
    write_json,
)
from tinysd_batch.quantize.sources.diffusers_folder import DECODER_ONLY_VAE
from tinysd_batch.quantize.sources.formats import open_source
from tinysd_batch.quantize.sources.tiny_stable_diffusion import TinyStableDiffusionSource
from tinysd_batch.storage.atomic import create_folder_atomically
from tinysd_batch.storage.filesystem import storage_errors

DTYPE_BY_NAME = {"fp16": torch.float16, "fp32": torch.float32}


def convert_model(
    source: Path, out: Path, options: SourceOptions, dtype: str | None, on_status: StatusCallback
) -> None:
    """Write `out`, a float model folder with everything of `source` that generating needs.

    The UNet of tiny-stable-diffusion's checkpoint stays at 2 bits, and no number of it changes.

    Args:
        source: checkpoint file or model folder.
        out: the folder to write; must not exist. After an error nothing of it is left.
        options: how to read the source.
        dtype: "fp16", "fp32", or None to keep dtypes as stored (float16 for what is stored as bfloat16 or float8).
        on_status: receives lines about what is being done.

    Raises:
        ModelError: a tensor is missing, unexpected, of the wrong shape or not finite, or `out` exists.
    """
    check_not_existing(out)
    model = open_source(source, options)
    torch_dtype = DTYPE_BY_NAME[dtype] if dtype else None
    with storage_errors(out), create_folder_atomically(out) as folder:
        if isinstance(model, TinyStableDiffusionSource):
            write_tiny_stable_diffusion_unet(model, folder / "unet", torch_dtype, on_status)
        else:
            write_component(model.unet(), folder / "unet", WEIGHTS_FILE, torch_dtype, on_status)
        write_other_components(model, folder, torch_dtype, on_status)
    report_ignored_tensors(model, on_status)


def write_tiny_stable_diffusion_unet(
    model: TinyStableDiffusionSource, folder: Path, dtype: torch.dtype | None, on_status: StatusCallback
) -> None:
    unet = model.read_packed_unet(dtype)
    on_status(
        f"unet: {len(unet.packed):,} layers at 2 and 8 bits as they are, {len(unet.other_tensors):,} other tensors"
    )
    write_packed_unet(folder, unet.config, unet.packed, unet.other_tensors, {"level": "origin"})


def check_not_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out}: exists; name a folder that does not")


def report_ignored_tensors(model: CheckpointSource, on_status: StatusCallback) -> None:
    if model.report.ignored:
        on_status(f"left out: {model.report}")
    for note in model.report.notes:
        on_status(f"note: {note}")


def write_other_components(
    model: CheckpointSource, folder: Path, dtype: torch.dtype | None, on_status: StatusCallback
) -> None:
    """Write everything but the UNet, which must be in `folder` already. Raises ModelError if they do not fit it."""
    unet_config = read_json_object(folder / "unet" / "config.json")
    vae, text_encoder = model.vae(), model.text_encoder()
    check_components_fit(unet_config, vae, text_encoder)
    index_entries = {} if has_encoder(vae) else {"vae": DECODER_ONLY_VAE}
    write_component(vae, folder / "vae", WEIGHTS_FILE, dtype, on_status)
    del vae
    text_encoder = prepare_text_encoder(text_encoder)
    write_component(text_encoder, folder / "text_encoder", TEXT_ENCODER_WEIGHTS_FILE, dtype, on_status)
    model.write_scheduler_and_tokenizer(folder)
    write_pipeline_index(folder, **index_entries)
    read_folder_info(folder, digest="")


def prepare_text_encoder(component: SourceComponent) -> SourceComponent:
    """Give a text encoder the names and the dtype entry with which all versions of the libraries load it alike.

    Older versions of transformers need the prefix `text_model.`; version 5 and this program read both names.
    Without the entry, transformers 5 would load float16 as float16, while diffusers loads the rest as float32.
    """
    tensors = {f"text_model.{name}": tensor for name, tensor in component.tensors.items()}
    config = {name: value for name, value in component.config.items() if name != "torch_dtype"}
    return SourceComponent(config | {"dtype": "float32"}, tensors, component.path)


def check_components_fit(unet_config: Mapping[str, Any], vae: SourceComponent, text_encoder: SourceComponent) -> None:
    """Raise ModelError if the widths of VAE or text encoder do not match the UNet's."""
    check_width_matches_unet(vae.config, "latent_channels", unet_config, "in_channels", vae.path)
    check_width_matches_unet(text_encoder.config, "hidden_size", unet_config, "cross_attention_dim", text_encoder.path)


def write_component(
    component: SourceComponent, folder: Path, file: str, dtype: torch.dtype | None, on_status: StatusCallback
) -> None:
    """Write a component's configuration and weights. Raises ModelError if a tensor is not finite."""
    count = sum(tensor.numel() for tensor in component.tensors.values())
    on_status(f"{folder.name}: {len(component.tensors):,} tensors, {count / 1e6:,.1f} M weights")
    write_json(folder / "config.json", component.config)
    dtypes = {name: choose_storage_dtype(tensor.dtype, dtype) for name, tensor in component.tensors.items()}
    write_safetensors(
        folder / file,
        component.tensors,
        dtypes,
        lambda name: convert_for_storage(name, component.tensors[name], dtype, component.path),
    )
