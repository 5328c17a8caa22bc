"""Write float model folders in diffusers' layout: self-contained, whole or not there, and a tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import check_fit
from tinysd_batch.model.checkpoint.folder import TEXT_WEIGHTS, write_packed_unet, write_pipeline_index
from tinysd_batch.model.checkpoint.info import WEIGHTS, look_at
from tinysd_batch.model.checkpoint.json_file import read_json
from tinysd_batch.model.checkpoint.safetensors_mmap import write_tensors
from tinysd_batch.quantize.sources.checkpoint_source import (
    Options,
    Part,
    Say,
    Source,
    as_stored,
    has_encoder,
    stored_dtype,
    write_json,
)
from tinysd_batch.quantize.sources.diffusers_folder import DECODER_ONLY
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.quantize.sources.tiny_stable_diffusion import OriginFile
from tinysd_batch.storage.atomic import new_folder, storage_errors

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def convert_model(source: Path, out: Path, options: Options, dtype: str | None, say: Say) -> None:
    """Write `out`, a float model folder with everything of `source` that drawing needs.

    The UNet of the origin's checkpoint stays at 2 bits, every number kept.
    `dtype` is fp16, fp32 or None: as stored, and float16 for what is stored as bfloat16 or float8. `say` is told what
    is being done. Raises ModelError where a tensor is missing, unexpected, of the wrong shape or not finite, and where
    `out` exists; of a new `out` nothing is left then.
    """
    refuse_existing(out)
    model = open_source(source, options)
    wanted = DTYPES[dtype] if dtype else None
    with storage_errors(out), new_folder(out) as folder:
        if isinstance(model, OriginFile):
            unet = model.packed_unet(wanted)
            say(f"unet: {len(unet.packed):,} layers at 2 and 8 bits as they are, {len(unet.others):,} other tensors")
            write_packed_unet(folder / "unet", unet.config, unet.packed, unet.others, {"level": "origin"})
            del unet
        else:
            write_part(model.unet(), folder / "unet", WEIGHTS, wanted, say)
        write_others(model, folder, wanted, say)
    tell_left_out(model, say)


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out}: exists; name a folder that does not")


def tell_left_out(model: Source, say: Say) -> None:
    if model.found.left_out:
        say(f"left out: {model.found}")
    for note in model.found.notes:
        say(f"note: {note}")


def write_others(model: Source, folder: Path, wanted: torch.dtype | None, say: Say) -> None:
    """Everything but the UNet, which is there already. Raises ModelError where the parts do not go together."""
    unet = read_json(folder / "unet" / "config.json")
    vae, text = model.vae(), model.text_encoder()
    check_parts(unet, vae, text)
    parts = {} if has_encoder(vae) else {"vae": DECODER_ONLY}
    write_part(vae, folder / "vae", WEIGHTS, wanted, say)
    del vae
    # Under the old name older libraries find them, too; transformers 5 and we read both.
    named = {f"text_model.{name}": value for name, value in text.tensors.items()}
    # transformers 5 would load float16 as float16, while diffusers loads all else as float32, unless told otherwise.
    config = {name: value for name, value in text.config.items() if name != "torch_dtype"} | {"dtype": "float32"}
    write_part(Part(config, named, text.where), folder / "text_encoder", TEXT_WEIGHTS, wanted, say)
    model.write_rest(folder)
    write_pipeline_index(folder, **parts)
    look_at(folder, digest="")


def check_parts(unet: Mapping[str, Any], vae: Part, text: Part) -> None:
    """Raise ModelError where the parts do not go together."""
    check_fit(vae.config, "latent_channels", unet, "in_channels", vae.where)
    check_fit(text.config, "hidden_size", unet, "cross_attention_dim", text.where)


def write_part(part: Part, folder: Path, file: str, wanted: torch.dtype | None, say: Say) -> None:
    """Configuration and weights. Raises ModelError where a tensor is not finite."""
    count = sum(tensor.numel() for tensor in part.tensors.values())
    say(f"{folder.name}: {len(part.tensors):,} tensors, {count / 1e6:,.1f} M weights")
    write_json(folder / "config.json", part.config)
    dtypes = {name: stored_dtype(tensor.dtype, wanted) for name, tensor in part.tensors.items()}
    write_tensors(
        folder / file, part.tensors, dtypes, lambda name: as_stored(name, part.tensors[name], wanted, part.where)
    )
