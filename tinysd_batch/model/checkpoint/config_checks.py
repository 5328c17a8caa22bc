"""Which models this program computes: one check of their configuration files, for every command that takes a model.

Whatever diffusers acts upon is either computed here as diffusers computes it (tests compare the two), or must have the
value of Stable Diffusion v1. Entries that diffusers ignores are ignored. Imports no torch: `plan` and `submit` check a
model before anything of it is loaded.
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

MAX_LAYERS = 100  # of any kind; SD v1's most are the text encoder's 12
MAX_LEVELS = 8  # of a UNet or an autoencoder; SD v1 has four
UNET_CLASS = "UNet2DConditionModel"
VAE_CLASSES = ("AutoencoderKL", "AutoencoderKLDecoder")  # the second is ours, of a VAE that lacks an encoder
SD2_CONTEXT = 1024
NOT_SD_V1 = "only Stable Diffusion v1 is read, with 768 wide text and noise prediction"
# By how many channels the UNet takes in.
MODELS_BY_INPUT_CHANNELS = {
    5: ("Stable Diffusion for depth maps", "it needs a depth map beside the prompt"),
    7: ("Stable Diffusion upscaler", "it needs an image beside the prompt"),
    8: ("InstructPix2Pix", "it needs an image beside the prompt"),
    9: ("Stable Diffusion for inpainting", "it needs an image and a mask beside the prompt"),
}
LCM = ("a latent consistency model (LCM)", "its UNet embeds the guidance scale, which is not supported")
PREDICTION_TYPES = {
    "v_prediction": "a model that predicts v",
    "sample": "a model that predicts the image",
    "flow_prediction": "a flow matching model",
}


@dataclass(frozen=True, slots=True)
class ModelType:
    """What a model is, and why it is not read, if it is not."""

    name: str
    reason: str | None = None


BETA_KEYS = ("beta_start", "beta_end", "beta_schedule")  # whose defaults in diffusers are not SD v1's
# What a folder says of its own sampler, and the samplers here do not follow. SD v1's values.
SD_V1_SCHEDULER_SETTINGS = {
    "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
    "skip_prk_steps": True, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False, "final_sigmas_type": "zero",
}  # fmt: skip
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


def check_unet_config(config: ComponentConfig, where: Path) -> None:
    """Raise ModelError naming the first entry of a UNet's configuration that is not computed."""
    check_class_name(config, (UNET_CLASS,), where)
    check_config_entries(UNET_RULES, config, where)
    check_block_types(UNET_RULES, config, where)
    if config.get("out_channels", 4) != config.get("in_channels", 4):
        raise ModelError(
            f"{where}: out_channels = {format_config_value(config.get('out_channels', 4))}: not supported; as many as in_channels, "
            f"{format_config_value(config.get('in_channels', 4))}, were expected"
        )


def check_vae_config(config: ComponentConfig, where: Path) -> None:
    """The same of an autoencoder."""
    check_class_name(config, VAE_CLASSES, where)
    check_config_entries(VAE_RULES, config, where)
    check_block_types(VAE_RULES, config, where)


def check_text_encoder_config(config: ComponentConfig, where: Path) -> None:
    """The same of a text encoder."""
    check_config_entries(TEXT_ENCODER_RULES, config, where)


def check_scheduler_config(config: ComponentConfig, where: Path) -> None:
    """The same of a noise schedule. Of a sampler's settings see `sampler_notes`."""
    predicts = config.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        what = PREDICTION_TYPES.get(predicts, "another model") if isinstance(predicts, str) else "another model"
        raise ModelError(
            f"{where}: prediction_type = {format_config_value(predicts)}: this is {what}; only models that predict the noise "
            f"(epsilon) are read"
        )
    if "Flow" in str(config.get("_class_name")):
        raise ModelError(
            f"{where}: _class_name = {format_config_value(config['_class_name'])}: flow matching is not supported"
        )
    for name in BETA_KEYS[:2]:
        if not is_finite_number(value := config.get(name)) or not 0 < value < 1:
            raise ModelError(f"{where}: {name} = {format_config_value(value)}: a number between 0 and 1 was expected")
    if "beta_schedule" not in config:
        raise ModelError(f'{where}: beta_schedule is missing; SD v1 models have "scaled_linear"')
    check_config_entries(SCHEDULER_RULES, config, where)


def check_config_entries(settings: Mapping[str, ConfigRule], config: ComponentConfig, where: Path) -> None:
    for name, value in config.items():
        check_layer_count(name, value, where)
    for name, setting in settings.items():
        setting.check(name, config, where)


def check_class_name(config: ComponentConfig, expected: tuple[str, ...], where: Path) -> None:
    if (found := config.get("_class_name", expected[0])) not in expected:
        raise ModelError(
            f"{where}: _class_name = {format_config_value(found)}: not supported; {expected[0]} was expected"
        )


def check_block_types(settings: Mapping[str, ConfigRule], config: ComponentConfig, where: Path) -> None:
    """Raise ModelError unless there are as many types of blocks as widths, where those are sensible."""
    widths = config.get("block_out_channels")
    for name in ("down_block_types", "up_block_types"):
        types = config.get(name, settings[name].sd_v1_value)
        if isinstance(widths, list) and len(types) != len(widths) <= MAX_LEVELS:
            raise ModelError(
                f"{where}: {name} = {format_config_value(types)}: not supported; {len(widths)} types were expected"
            )


def check_layer_count(name: str, value: Any, where: Path) -> None:
    """Each layer costs time and memory, weights or not. Raises ModelError for too many."""
    counts = list(flatten(value))
    if len(counts) > MAX_LAYERS or (
        "layers" in name and any(is_positive_int(one) and one > MAX_LAYERS for one in counts)
    ):
        raise ModelError(f"{where}: {name} = {format_config_value(value)}: at most {MAX_LAYERS} were expected")


def flatten(value: Any) -> Iterator[Any]:
    """The members of lists within lists."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, list):
            pending += each
        else:
            yield each


def detect_model_type_from_configs(unet: ComponentConfig, scheduler: ComponentConfig) -> ModelType:
    """What a float model folder is, by its configurations, and why it is not read, if it is not."""
    found = unet.get("_class_name", UNET_CLASS)
    if found != UNET_CLASS:
        return ModelType(
            "ControlNet" if "ControlNet" in str(found) else make_printable(str(found))[:MAX_VALUE_CHARACTERS], NOT_SD_V1
        )
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
        return ModelType("Stable Diffusion v2", f"its cross attention is {context} wide; {NOT_SD_V1}")
    predicts = scheduler.get("prediction_type", "epsilon")
    if isinstance(predicts, str) and predicts in PREDICTION_TYPES:
        return ModelType(PREDICTION_TYPES[predicts], f"prediction_type is {predicts!r}; {NOT_SD_V1}")
    return ModelType("Stable Diffusion v1")


def check_configs(folder: Path, configs: Mapping[str, ComponentConfig]) -> None:
    """Raise ModelError where the parts of a model folder are of another kind of model, or have what is not computed.

    `configs` has the parts' configurations by folder, those that are there.
    """
    unet = configs.get("unet", {})
    kind = detect_model_type_from_configs(unet, configs.get("scheduler", {}))
    if kind.reason:
        raise ModelError(f"{folder}: this is {kind.name}: {kind.reason}")
    for part, config in configs.items():
        CONFIG_CHECKS[part](config, folder / part / CONFIG_FILES[part])
    for part, name, unet_name in WIDTHS_TO_MATCH:
        if part in configs:
            check_width_matches_unet(configs[part], name, unet, unet_name, folder / part / CONFIG_FILES[part])


def check_width_matches_unet(
    config: ComponentConfig, name: str, unet: ComponentConfig, unet_name: str, where: Path
) -> None:
    """Raise ModelError where a part does not go with a UNet."""
    mine = config.get(name, LIBRARY_DEFAULTS[name])
    widths = unet.get(unet_name, LIBRARY_DEFAULTS[unet_name])
    if is_positive_int(mine) and any(width != mine for width in flatten(widths)):  # what is no number fails by itself
        raise ModelError(
            f"{where}: does not go with this UNet: {name} is {format_config_value(mine)}, the UNet's {unet_name} {format_config_value(widths)}"
        )


# What has to be as wide as the UNet expects it, and what the libraries take where an entry is missing.
WIDTHS_TO_MATCH = (("vae", "latent_channels", "in_channels"), ("text_encoder", "hidden_size", "cross_attention_dim"))
LIBRARY_DEFAULTS = {"latent_channels": 4, "in_channels": 4, "hidden_size": 512, "cross_attention_dim": 1280}
CONFIG_FILES = {
    "unet": "config.json", "vae": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json",
}  # fmt: skip
CONFIG_CHECKS: dict[str, Callable[[ComponentConfig, Path], None]] = {
    "unet": check_unet_config, "vae": check_vae_config, "text_encoder": check_text_encoder_config, "scheduler": check_scheduler_config,
}  # fmt: skip


def list_sampler_differences(scheduler: ComponentConfig) -> list[str]:
    """What a folder's own sampler does that ours do not: it changes images a little, and is no fault of the model."""
    differs = [
        f"{name} = {format_config_value(scheduler[name])}"
        for name, value in SD_V1_SCHEDULER_SETTINGS.items()
        if scheduler.get(name) is not None and not is_same_json_value(scheduler[name], value)
    ]
    notes = []
    if differs:
        notes.append(f"scheduler: {', '.join(differs)}: the samplers here keep to SD v1's times and noise levels")
    if (name := scheduler.get("_class_name")) in FEW_STEP_SCHEDULERS:
        notes.append(f"scheduler: {name} is for few-step models, and not among the samplers here")
    return notes
