"""SD v1 in a single file, in the names of its first authors (LDM). diffusers' own functions rename the tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.info import OUR_FILE
from tinysd_batch.quantize.sources.checkpoint_source import (
    Found,
    Options,
    Part,
    check_text_encoder,
    check_unet,
    check_vae,
    has_encoder,
    write_json,
)
from tinysd_batch.quantize.sources.clip_tokenizer import write_tokenizer
from tinysd_batch.quantize.sources.detect import AUTOENCODER, EMA, ORIGIN, SD_V1, TEXT, UNET, VAE, kind_of
from tinysd_batch.quantize.sources.diffusers_folder import modern_attention, read_vae_folder
from tinysd_batch.quantize.sources.ldm_config import (
    SCHEDULER,
    UNET_LAYERS,
    VAE_LAYERS,
    check_schedule,
    text_config,
    unet_config,
    vae_config,
)
from tinysd_batch.quantize.sources.tensor_files import Contents, open_tensors
from tinysd_batch.quantize.sources.tiny_stable_diffusion import OriginUNet, check_count, read_origin_unet

CLIP = f"{TEXT}transformer."
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "lvlb_weights",
    "scale_factor",
)  # fmt: skip
TRAINING = (
    "optimizer_states", "lr_schedulers", "callbacks", "loops", "epoch", "global_step", "global_samples", "hparams_name",
    "hparams_type", "hyper_parameters", "native_amp_scaling_state", "amp_scaling_state", "pytorch-lightning_version",
    "datamodule_hparams_name", "state_dict", "num_updates",
)  # fmt: skip
# What may lie in a file beside the model, and is left out: by how it is called.
COPIES = "EMA copies"
SPARE: dict[str, Callable[[str], bool]] = {
    COPIES: lambda name: name.startswith(EMA),
    "of the noise schedule": lambda name: name in SCHEDULE,
    "of training": lambda name: name in TRAINING or name.startswith(("first_stage_model.loss.", "embedding_manager.")),
    "position ids": lambda name: name.endswith(".position_ids"),
    "of CLIP's other half": lambda name: name.startswith(
        (f"{CLIP}vision_model.", f"{CLIP}visual_projection.", f"{CLIP}text_projection", f"{CLIP}logit_scale",
         f"{TEXT}logit_scale", f"{TEXT}text_projection")
    ),
    "of the autoencoder's training": lambda name: name.startswith((f"{VAE}model_ema.", f"{VAE}loss.")),
}  # fmt: skip


def spare_kind(name: str) -> str | None:
    """Why a tensor may be left out; None if it may not."""
    return next((kind for kind, fits in SPARE.items() if fits(name)), None)


class SingleFile:
    """An SD v1 checkpoint file. Raises ModelError where it is something else, or incomplete."""

    reads = SD_V1

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self.options = options
        self.name = path.stem
        self.found = Found()
        contents = self.open()
        if (kind := kind_of(contents)).name != self.reads:
            raise ModelError(f"{path}: this is {kind.name}: {kind.reason}")
        check_schedule(contents.tensors, path)
        self.sort(contents)

    def open(self) -> Contents:
        return open_tensors(self.path, allow_pickle=self.options.allow_pickle)

    def sort(self, contents: Contents) -> None:
        """Count what is left out; raise ModelError for names that nobody knows, and for parts that are not there."""
        strange = []
        for name in [*contents.tensors, *contents.others]:
            if kind := spare_kind(name):
                if kind == COPIES and self.options.ema:
                    continue
                self.found.left_out[kind] = self.found.left_out.get(kind, 0) + 1
            elif name not in contents.tensors or not name.startswith((UNET, VAE, CLIP)):
                strange.append(name)
        if strange:
            raise ModelError(f"{self.path}: {len(strange)} unexpected names, the first is {strange[0]!r}")
        if not any(name.startswith(CLIP) for name in contents.tensors):
            raise ModelError(f"{self.path}: no text encoder is in it; a checkpoint that has one is needed")
        if self.options.vae is None and not any(name.startswith(VAE) for name in contents.tensors):
            raise ModelError(f"{self.path}: no autoencoder is in it; name one with --vae FILE_OR_FOLDER")

    def unet(self) -> Part:
        tensors = self.open().tensors
        mine = {name: value for name, value in tensors.items() if name.startswith(UNET)}
        if self.options.ema:
            mine = {name: ema_copy(name, tensors, self.path) for name in mine}
        converted = convert(mine, lambda named: convert_ldm_unet_checkpoint(named, UNET_LAYERS), self.path)
        part = Part(unet_config(converted, self.path), converted, self.path, tensors)
        check_unet(part)
        return part

    def vae(self) -> Part:
        if self.options.vae is not None:
            return read_vae(self.options.vae, self.options)
        return vae_part(self.open().tensors, self.path)

    def text_encoder(self) -> Part:
        tensors = self.open().tensors
        mine = {name: value for name, value in tensors.items() if name.startswith(CLIP) and spare_kind(name) is None}
        renamed = convert(mine, convert_ldm_clip_checkpoint, self.path)
        bare = {name.removeprefix("text_model."): value for name, value in renamed.items()}
        part = Part(text_config(bare, self.path), bare, self.path)
        check_text_encoder(part)
        return part

    def write_rest(self, folder: Path) -> None:
        write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(folder / OUR_FILE, {"name": self.name})
        positions = f"{CLIP}text_model.embeddings.position_embedding.weight"
        tensors = self.open().tensors
        known = tensors.get(positions, tensors.get(positions.replace("text_model.", "")))
        assert known is not None, positions
        write_tokenizer(folder / "tokenizer", known.shape[0])


def ema_copy(name: str, tensors: Mapping[str, Tensor], where: Path) -> Tensor:
    """The averaged copy of a UNet tensor, whose name is written without dots; raise ModelError without one."""
    flat = EMA + name.removeprefix("model.").replace(".", "")
    if flat not in tensors:
        raise ModelError(f"{where}: --ema: the copies are not complete, {flat} is missing")
    return tensors[flat]


def convert(tensors: dict[str, Tensor], rename: Callable[[Any], Any], where: Path) -> dict[str, Tensor]:
    """Tensors in diffusers' names; raise ModelError for one that the renaming lost or missed."""
    check_count(len(tensors), where)
    try:
        renamed: dict[str, Tensor | None] = rename(tensors)
    except KeyError as error:
        raise ModelError(f"{where}: tensor {error.args[0]} is missing") from None
    except (IndexError, AttributeError, TypeError) as error:
        raise ModelError(f"{where}: a tensor has the wrong number of dimensions: {error}") from None
    found = {name: value for name, value in renamed.items() if value is not None}
    if len(found) < len(renamed):
        raise ModelError(f"{where}: tensor {min(renamed.keys() - found.keys())} is missing")
    kept = {value.data_ptr() for value in found.values()}
    if lost := sorted(name for name, value in tensors.items() if value.data_ptr() not in kept):
        raise ModelError(f"{where}: {len(lost)} unexpected tensors, the first is {lost[0]}")
    return found


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


class OriginFile(SingleFile):
    """The origin's `full_int2_sd.pth`: autoencoder and text encoder as in any file of SD v1, the UNet at 2 bits."""

    reads = ORIGIN

    def unet(self) -> Part:
        """Raises ModelError always: these are no floats."""
        raise ModelError(f"{self.path}: the UNet is at 2 bits already")

    def packed_unet(self, dtype: torch.dtype | None) -> OriginUNet:
        return read_origin_unet(self.open().tensors, str(self.path), dtype or torch.float32)
