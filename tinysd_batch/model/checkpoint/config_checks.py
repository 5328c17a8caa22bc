"""Check that a model's configuration files describe a supported model; every command that takes a model does.

Each entry that diffusers uses is either supported with the same result as in diffusers (tests compare the two), or must
have the value of Stable Diffusion v1. Entries that diffusers ignores are ignored. Does not import torch: `plan` and
`submit` check a model before loading it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_rules import (
    MAX_VALUE_CHARACTERS,
    SCHEDULER_RULES,
    TEXT_ENCODER_RULES,
    UNET_RULES,
    VAE_RULES,
    ComponentConfig,
    ConfigRule,
    format_config_value,
    is_finite_number,
    is_positive_int,
    is_same_json_value,
)
from tinysd_batch.text import make_printable

MAX_LAYERS = 100  # of one type; SD v1 has at most 12, in the text encoder
MAX_LEVELS = 8  # resolutions of a UNet or VAE; SD v1 has four
UNET_CLASS = "UNet2DConditionModel"
VAE_CLASSES = ("AutoencoderKL", "AutoencoderKLDecoder")  # the second is ours, for a VAE without an encoder
SD2_CONTEXT = 1024
NOT_SD_V1 = "only Stable Diffusion v1 is supported (text embeddings of width 768, noise prediction)"
# By the number of the UNet's input channels.
MODELS_BY_INPUT_CHANNELS = {
    5: ("Stable Diffusion for depth maps", "it needs a depth map in addition to the prompt"),
    7: ("Stable Diffusion upscaler", "it needs an image in addition to the prompt"),
    8: ("InstructPix2Pix", "it needs an image in addition to the prompt"),
    9: ("Stable Diffusion for inpainting", "it needs an image and a mask in addition to the prompt"),
}
LCM = ("a latent consistency model (LCM)", "its UNet embeds the guidance scale, which is not supported")
PREDICTION_TYPES = {
    "v_prediction": "a model that predicts v",
    "sample": "a model that predicts the image",
    "flow_prediction": "a flow matching model",
}


@dataclass(frozen=True, slots=True)
class ModelType:
    """The name of a model type, and the reason if it is not supported."""

    name: str
    reason: str | None = None


BETA_KEYS = ("beta_start", "beta_end", "beta_schedule")  # their defaults in diffusers differ from SD v1's
# SD v1's values of sampler settings in a scheduler configuration; our samplers always use these.
SD_V1_SCHEDULER_SETTINGS = {
    "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
    "skip_prk_steps": True, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False, "final_sigmas_type": "zero",
}  # fmt: skip
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


def check_unet_config(config: ComponentConfig, path: Path) -> None:
    """Raise ModelError for the first entry of a UNet's configuration that is not supported."""
    check_class_name(config, (UNET_CLASS,), path)
    check_config_entries(UNET_RULES, config, path)
    check_block_types(UNET_RULES, config, path)
    if config.get("out_channels", 4) != config.get("in_channels", 4):
        out_channels, in_channels = (
            format_config_value(config.get(name, 4)) for name in ("out_channels", "in_channels")
        )
        raise ModelError(
            f"{path}: out_channels = {out_channels}: not supported; in_channels, {in_channels}, was expected"
        )


def check_vae_config(config: ComponentConfig, path: Path) -> None:
    """Raise ModelError for the first entry of a VAE's configuration that is not supported."""
    check_class_name(config, VAE_CLASSES, path)
    check_config_entries(VAE_RULES, config, path)
    check_block_types(VAE_RULES, config, path)


def check_text_encoder_config(config: ComponentConfig, path: Path) -> None:
    """Raise ModelError for the first entry of a text encoder's configuration that is not supported."""
    check_config_entries(TEXT_ENCODER_RULES, config, path)


def check_scheduler_config(config: ComponentConfig, path: Path) -> None:
    """Raise ModelError for the first entry of a noise schedule that is not supported.

    The sampler's settings are not checked; see `list_sampler_differences`.
    """
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type != "epsilon":
        model = "another model"
        if isinstance(prediction_type, str):
            model = PREDICTION_TYPES.get(prediction_type, model)
        raise ModelError(
            f"{path}: prediction_type = {format_config_value(prediction_type)}: this is {model}; only models that "
            f"predict the noise (epsilon) are supported"
        )
    if "Flow" in str(config.get("_class_name")):
        raise ModelError(
            f"{path}: _class_name = {format_config_value(config['_class_name'])}: flow matching is not supported"
        )
    for name in BETA_KEYS[:2]:
        if not is_finite_number(value := config.get(name)) or not 0 < value < 1:
            raise ModelError(f"{path}: {name} = {format_config_value(value)}: a number between 0 and 1 was expected")
    if "beta_schedule" not in config:
        raise ModelError(f'{path}: beta_schedule is missing; SD v1 models have "scaled_linear"')
    check_config_entries(SCHEDULER_RULES, config, path)


def check_config_entries(rules: Mapping[str, ConfigRule], config: ComponentConfig, path: Path) -> None:
    for name, value in config.items():
        check_layer_count(name, value, path)
    for name, rule in rules.items():
        rule.check(name, config, path)


def check_class_name(config: ComponentConfig, expected: tuple[str, ...], path: Path) -> None:
    if (class_name := config.get("_class_name", expected[0])) not in expected:
        raise ModelError(
            f"{path}: _class_name = {format_config_value(class_name)}: not supported; {expected[0]} was expected"
        )


def check_block_types(rules: Mapping[str, ConfigRule], config: ComponentConfig, path: Path) -> None:
    """Raise ModelError unless there is one block type for each width. Invalid widths are reported elsewhere."""
    widths = config.get("block_out_channels")
    for name in ("down_block_types", "up_block_types"):
        types = config.get(name, rules[name].sd_v1_value)
        if isinstance(widths, list) and len(types) != len(widths) <= MAX_LEVELS:
            raise ModelError(
                f"{path}: {name} = {format_config_value(types)}: not supported; {len(widths)} types were expected"
            )


def check_layer_count(name: str, value: Any, path: Path) -> None:
    """Raise ModelError for too many layers: each costs time and memory, even without weights."""
    counts = list(flatten(value))
    if len(counts) > MAX_LAYERS or (
        "layers" in name and any(is_positive_int(count) and count > MAX_LAYERS for count in counts)
    ):
        raise ModelError(f"{path}: {name} = {format_config_value(value)}: at most {MAX_LAYERS} were expected")


def flatten(value: Any) -> Iterator[Any]:
    """Yield the values in nested lists, last first."""
    pending = [value]
    while pending:
        member = pending.pop()
        if isinstance(member, list):
            pending += member
        else:
            yield member


def detect_model_type_from_configs(unet: ComponentConfig, scheduler: ComponentConfig) -> ModelType:
    """Detect the type of a float model folder from its configurations."""
    class_name = unet.get("_class_name", UNET_CLASS)
    if class_name != UNET_CLASS:
        is_controlnet = "ControlNet" in str(class_name)
        name = "ControlNet" if is_controlnet else make_printable(str(class_name))[:MAX_VALUE_CHARACTERS]
        return ModelType(name, NOT_SD_V1)
    channels = unet.get("in_channels")
    if is_positive_int(channels) and channels in MODELS_BY_INPUT_CHANNELS:
        return ModelType(*MODELS_BY_INPUT_CHANNELS[channels])
    if unet.get("time_cond_proj_dim"):
        return ModelType(LCM[0], f"time_cond_proj_dim = {format_config_value(unet['time_cond_proj_dim'])}: {LCM[1]}")
    for name in ("addition_embed_type", "class_embed_type"):
        if unet.get(name):
            return ModelType(
                "Stable Diffusion XL or unCLIP", f"{name} = {format_config_value(unet[name])}; {NOT_SD_V1}"
            )
    context = next(flatten(unet.get("cross_attention_dim")), None)
    if is_positive_int(context) and context >= SD2_CONTEXT:
        return ModelType("Stable Diffusion v2", f"its cross-attention has width {context}; {NOT_SD_V1}")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if isinstance(prediction_type, str) and prediction_type in PREDICTION_TYPES:
        return ModelType(PREDICTION_TYPES[prediction_type], f"prediction_type is {prediction_type!r}; {NOT_SD_V1}")
    return ModelType("Stable Diffusion v1")


def check_configs(folder: Path, configs: Mapping[str, ComponentConfig]) -> None:
    """Raise ModelError if a model folder holds another type of model, or has entries that are not supported.

    `configs` maps component folders to their configurations; missing components are not checked.
    """
    unet = configs.get("unet", {})
    model_type = detect_model_type_from_configs(unet, configs.get("scheduler", {}))
    if model_type.reason:
        raise ModelError(f"{folder}: this is {model_type.name}: {model_type.reason}")
    for component, config in configs.items():
        CONFIG_CHECKS[component](config, folder / component / CONFIG_FILES[component])
    for component, name, unet_name in WIDTHS_TO_MATCH:
        if component in configs:
            path = folder / component / CONFIG_FILES[component]
            check_width_matches_unet(configs[component], name, unet, unet_name, path)


def check_width_matches_unet(
    config: ComponentConfig, name: str, unet: ComponentConfig, unet_name: str, path: Path
) -> None:
    """Raise ModelError if a component's width does not match the UNet's. Other values than numbers fail elsewhere."""
    width = config.get(name, LIBRARY_DEFAULTS[name])
    unet_widths = unet.get(unet_name, LIBRARY_DEFAULTS[unet_name])
    if is_positive_int(width) and any(unet_width != width for unet_width in flatten(unet_widths)):
        raise ModelError(
            f"{path}: does not fit this UNet: {name} is {format_config_value(width)}, the UNet's {unet_name} "
            f"{format_config_value(unet_widths)}"
        )


# Entries of components that must equal an entry of the UNet.
WIDTHS_TO_MATCH = (("vae", "latent_channels", "in_channels"), ("text_encoder", "hidden_size", "cross_attention_dim"))
# The libraries' defaults for missing entries.
LIBRARY_DEFAULTS = {"latent_channels": 4, "in_channels": 4, "hidden_size": 512, "cross_attention_dim": 1280}
CONFIG_FILES = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
CONFIG_CHECKS: dict[str, Callable[[ComponentConfig, Path], None]] = {
    "unet": check_unet_config,
    "vae": check_vae_config,
    "text_encoder": check_text_encoder_config,
    "scheduler": check_scheduler_config,
}


def list_sampler_differences(scheduler: ComponentConfig) -> list[str]:
    """Return notes on a folder's sampler settings that our samplers do not use.

    They change images slightly and are not an error.
    """
    differences = [
        f"{name} = {format_config_value(scheduler[name])}"
        for name, value in SD_V1_SCHEDULER_SETTINGS.items()
        if scheduler.get(name) is not None and not is_same_json_value(scheduler[name], value)
    ]
    notes = []
    if differences:
        notes.append(
            f"scheduler: {', '.join(differences)}: not used; our samplers use SD v1's timesteps and noise levels"
        )
    if (name := scheduler.get("_class_name")) in FEW_STEP_SCHEDULERS:
        notes.append(f"scheduler: {name} is for few-step models and is not one of our samplers")
    return notes
