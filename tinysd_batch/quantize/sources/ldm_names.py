"""Names of tensors in LDM checkpoints (CompVis' latent-diffusion, the code that SD v1 was trained with)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tinysd_batch.errors import ModelError

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_ENCODER_PREFIX = "cond_stage_model."
CLIP_PREFIX = f"{TEXT_ENCODER_PREFIX}transformer."
EMA_PREFIX = "model_ema."
EMA_COUNTERS = (f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates")

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
TRAINING_PREFIXES = ("first_stage_model.loss.", "embedding_manager.")
# What SD v1 does not use of CLIP: the image encoder, and the projections into the space shared with it.
UNUSED_CLIP_PREFIXES = (
    f"{CLIP_PREFIX}vision_model.",
    f"{CLIP_PREFIX}visual_projection.",
    f"{CLIP_PREFIX}text_projection",
    f"{CLIP_PREFIX}logit_scale",
    f"{TEXT_ENCODER_PREFIX}logit_scale",
    f"{TEXT_ENCODER_PREFIX}text_projection",
)
VAE_TRAINING_PREFIXES = (f"{VAE_PREFIX}model_ema.", f"{VAE_PREFIX}loss.")

EMA_COPIES = "EMA copies"
# Names that a checkpoint may have beside the model and that are ignored, by category. The first match decides.
IGNORED_CATEGORIES: dict[str, Callable[[str], bool]] = {
    EMA_COPIES: lambda name: name.startswith(EMA_PREFIX),
    "noise schedule tensors": lambda name: name in SCHEDULE_TENSORS,
    "training entries": lambda name: name in TRAINING_ENTRIES or name.startswith(TRAINING_PREFIXES),
    "position ids": lambda name: name.endswith(".position_ids"),
    "unused CLIP tensors": lambda name: name.startswith(UNUSED_CLIP_PREFIXES),
    "VAE training tensors": lambda name: name.startswith(VAE_TRAINING_PREFIXES),
}

MAX_COMPONENT_TENSORS = 4000  # SD v1's UNet has 686, the one of tiny-stable-diffusion about 1,750


def find_ignored_category(name: str) -> str | None:
    """Return why a tensor or entry may be ignored; None if it may not."""
    return next((category for category, matches in IGNORED_CATEGORIES.items() if matches(name)), None)


def convert_to_diffusers_names(
    tensors: dict[str, Tensor], convert: Callable[[Any], Any], path: Path
) -> dict[str, Tensor]:
    """Rename tensors with one of diffusers' converters.

    Raises:
        ModelError: the converter missed a tensor, dropped one or got one with the wrong number of dimensions.
    """
    check_tensor_count(len(tensors), path)
    try:
        renamed: dict[str, Tensor | None] = convert(tensors)
    except KeyError as error:
        raise ModelError(f"{path}: tensor {error.args[0]} is missing") from None
    except (IndexError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}: a tensor has the wrong number of dimensions: {error}") from None
    converted = {name: tensor for name, tensor in renamed.items() if tensor is not None}
    if len(converted) < len(renamed):
        raise ModelError(f"{path}: tensor {min(renamed.keys() - converted.keys())} is missing")
    kept_pointers = {tensor.data_ptr() for tensor in converted.values()}
    if dropped := sorted(name for name, tensor in tensors.items() if tensor.data_ptr() not in kept_pointers):
        raise ModelError(f"{path}: {len(dropped)} unexpected tensors, the first is {dropped[0]}")
    return converted


def check_tensor_count(count: int, path: object) -> None:
    """Raise ModelError for more tensors than a component can have: diffusers renames them in quadratic time."""
    if count > MAX_COMPONENT_TENSORS:
        raise ModelError(
            f"{path}: {count:,} tensors in a component of the model; at most {MAX_COMPONENT_TENSORS:,} are read"
        )
