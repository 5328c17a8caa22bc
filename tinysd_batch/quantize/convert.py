"""Write float model folders in diffusers' layout: self-contained, whole or not there, and a tensor at a time."""

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
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.quantize.sources.tiny_stable_diffusion import TinyStableDiffusionSource
from tinysd_batch.storage.atomic import create_folder_atomically, storage_errors

DTYPE_BY_NAME = {"fp16": torch.float16, "fp32": torch.float32}


def convert_model(source: Path, out: Path, options: SourceOptions, dtype: str | None, say: StatusCallback) -> None:
    """Write `out`, a float model folder with everything of `source` that drawing needs.

    The UNet of the origin's checkpoint stays at 2 bits, every number kept.
    `dtype` is fp16, fp32 or None: as stored, and float16 for what is stored as bfloat16 or float8. `say` is told what
    is being done. Raises ModelError where a tensor is missing, unexpected, of the wrong shape or not finite, and where
    `out` exists; of a new `out` nothing is left then.
    """
    check_not_existing(out)
    model = open_source(source, options)
    wanted = DTYPE_BY_NAME[dtype] if dtype else None
    with storage_errors(out), create_folder_atomically(out) as folder:
        if isinstance(model, TinyStableDiffusionSource):
            unet = model.read_packed_unet(wanted)
            say(
                f"unet: {len(unet.packed):,} layers at 2 and 8 bits as they are, {len(unet.other_tensors):,} other tensors"
            )
            write_packed_unet(folder / "unet", unet.config, unet.packed, unet.other_tensors, {"level": "origin"})
            del unet
        else:
            write_component(model.unet(), folder / "unet", WEIGHTS_FILE, wanted, say)
        write_other_components(model, folder, wanted, say)
    report_ignored_tensors(model, say)


def check_not_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out}: exists; name a folder that does not")


def report_ignored_tensors(model: CheckpointSource, say: StatusCallback) -> None:
    if model.report.ignored:
        say(f"left out: {model.report}")
    for note in model.report.notes:
        say(f"note: {note}")


def write_other_components(
    model: CheckpointSource, folder: Path, wanted: torch.dtype | None, say: StatusCallback
) -> None:
    """Everything but the UNet, which is there already. Raises ModelError where the parts do not go together."""
    unet = read_json_object(folder / "unet" / "config.json")
    vae, text = model.vae(), model.text_encoder()
    check_components_fit(unet, vae, text)
    parts = {} if has_encoder(vae) else {"vae": DECODER_ONLY_VAE}
    write_component(vae, folder / "vae", WEIGHTS_FILE, wanted, say)
    del vae
    # Under the old name older libraries find them, too; transformers 5 and we read both.
    named = {f"text_model.{name}": value for name, value in text.tensors.items()}
    # transformers 5 would load float16 as float16, while diffusers loads all else as float32, unless told otherwise.
    config = {name: value for name, value in text.config.items() if name != "torch_dtype"} | {"dtype": "float32"}
    write_component(
        SourceComponent(config, named, text.path), folder / "text_encoder", TEXT_ENCODER_WEIGHTS_FILE, wanted, say
    )
    model.write_scheduler_and_tokenizer(folder)
    write_pipeline_index(folder, **parts)
    read_folder_info(folder, digest="")


def check_components_fit(unet: Mapping[str, Any], vae: SourceComponent, text: SourceComponent) -> None:
    """Raise ModelError where the parts do not go together."""
    check_width_matches_unet(vae.config, "latent_channels", unet, "in_channels", vae.path)
    check_width_matches_unet(text.config, "hidden_size", unet, "cross_attention_dim", text.path)


def write_component(
    part: SourceComponent, folder: Path, file: str, wanted: torch.dtype | None, say: StatusCallback
) -> None:
    """Configuration and weights. Raises ModelError where a tensor is not finite."""
    count = sum(tensor.numel() for tensor in part.tensors.values())
    say(f"{folder.name}: {len(part.tensors):,} tensors, {count / 1e6:,.1f} M weights")
    write_json(folder / "config.json", part.config)
    dtypes = {name: choose_storage_dtype(tensor.dtype, wanted) for name, tensor in part.tensors.items()}
    write_safetensors(
        folder / file,
        part.tensors,
        dtypes,
        lambda name: convert_for_storage(name, part.tensors[name], wanted, part.path),
    )
