"""The names that LDM checkpoints give their tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tinysd_batch.errors import ModelError

UNET_PREFIX = "model.diffusion_model."

VAE_PREFIX = "first_stage_model."

TEXT_ENCODER_PREFIX = "cond_stage_model."

EMA_PREFIX = "model_ema."

EMA_COUNTERS = (f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates")


CLIP_PREFIX = f"{TEXT_ENCODER_PREFIX}transformer."


SCHEDULE_TENSORS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "lvlb_weights",
    "scale_factor",
)  # fmt: skip


TRAINING_ENTRIES = (
    "optimizer_states", "lr_schedulers", "callbacks", "loops", "epoch", "global_step", "global_samples", "hparams_name",
    "hparams_type", "hyper_parameters", "native_amp_scaling_state", "amp_scaling_state", "pytorch-lightning_version",
    "datamodule_hparams_name", "state_dict", "num_updates",
)  # fmt: skip


# What may lie in a file beside the model, and is left out: by how it is called.
EMA_COPIES = "EMA copies"


IGNORED_CATEGORIES: dict[str, Callable[[str], bool]] = {
    EMA_COPIES: lambda name: name.startswith(EMA_PREFIX),
    "of the noise schedule": lambda name: name in SCHEDULE_TENSORS,
    "of training": lambda name: name in TRAINING_ENTRIES or name.startswith(("first_stage_model.loss.", "embedding_manager.")),
    "position ids": lambda name: name.endswith(".position_ids"),
    "of CLIP's other half": lambda name: name.startswith(
        (f"{CLIP_PREFIX}vision_model.", f"{CLIP_PREFIX}visual_projection.", f"{CLIP_PREFIX}text_projection", f"{CLIP_PREFIX}logit_scale",
         f"{TEXT_ENCODER_PREFIX}logit_scale", f"{TEXT_ENCODER_PREFIX}text_projection")
    ),
    "of the autoencoder's training": lambda name: name.startswith((f"{VAE_PREFIX}model_ema.", f"{VAE_PREFIX}loss.")),
}  # fmt: skip


def find_ignored_category(name: str) -> str | None:
    """Why a tensor may be left out; None if it may not."""
    return next((kind for kind, fits in IGNORED_CATEGORIES.items() if fits(name)), None)


def convert_to_diffusers_names(
    tensors: dict[str, Tensor], rename: Callable[[Any], Any], where: Path
) -> dict[str, Tensor]:
    """Tensors in diffusers' names; raise ModelError for one that the renaming lost or missed."""
    check_tensor_count(len(tensors), where)
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


MAX_COMPONENT_TENSORS = 4000  # of a part; SD v1's UNet has 686, and in tiny-stable-diffusion's file some 1,750


def check_tensor_count(tensors: int, where: object) -> None:
    """Raise ModelError for more tensors than a part can have: renaming them takes the square of their number."""
    if tensors > MAX_COMPONENT_TENSORS:
        raise ModelError(
            f"{where}: {tensors:,} tensors in a part of the model; at most {MAX_COMPONENT_TENSORS:,} are read"
        )
