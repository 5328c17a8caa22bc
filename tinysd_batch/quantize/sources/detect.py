"""Detect what model a checkpoint file holds, from the names and shapes of its tensors, and why it is not supported."""

import re
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from tinysd_batch.model.checkpoint.config_checks import LCM, MODELS_BY_INPUT_CHANNELS, NOT_SD_V1, SD2_CONTEXT, ModelType
from tinysd_batch.quantize.sources.ldm_names import (
    EMA_COUNTERS,
    EMA_PREFIX,
    TEXT_ENCODER_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
)
from tinysd_batch.quantize.sources.tensor_files import CheckpointContents

SD_V1 = "Stable Diffusion v1"
AUTOENCODER = "autoencoder"
TINY_STABLE_DIFFUSION = "tiny-stable-diffusion's 2-bit checkpoint"

SD_V1_LATENT_CHANNELS = 4
ADDITION_REASON = "it is an addition to a model, not a model; merge it into one with another program first"


def contains_any(*parts: str) -> Callable[[str], bool]:
    return lambda name: any(part in name for part in parts)


def starts_with_any(*prefixes: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)


# Names of LoRA in kohya's scripts, diffusers (`processor.to_q_lora.down`), peft (`lora_A`) and others, and of LyCORIS:
# LoHa, LoKr, OFT, IA3, DoRA and plain differences.
LORA_PATTERN = re.compile(
    r"lora|lycoris|loha_|hada_[wt]|lokr_|\b(b?oft|ia3)_|dora_scale|\.on_input$|\.diff(_b)?$", re.IGNORECASE
)

# The first rule that any of the names matches decides.
DETECTION_RULES: tuple[tuple[Callable[[str], bool], ModelType], ...] = (
    (
        contains_any(".weight_quantizer.delta"),
        ModelType(TINY_STABLE_DIFFUSION, "it is at 2 bits already; `tinysd-batch convert` copies it as it is"),
    ),
    (
        contains_any("control_model.", "input_hint_block", "controlnet_", "lora_controlnet"),
        ModelType("ControlNet", ADDITION_REASON),
    ),
    (lambda name: LORA_PATTERN.search(name) is not None, ModelType("LoRA or LyCORIS", ADDITION_REASON)),
    (starts_with_any("ip_adapter.", "image_proj."), ModelType("IP-Adapter", ADDITION_REASON)),
    (starts_with_any("adapter.body.", "body.0.in_conv.", "body.0.resnets."), ModelType("T2I-Adapter", ADDITION_REASON)),
    (lambda name: name == "layer_structure", ModelType("hypernetwork", ADDITION_REASON)),
    (contains_any("position_net."), ModelType("GLIGEN", "it needs boxes in addition to the prompt")),
    (contains_any("time_embed.cond_proj.", "time_embedding.cond_proj."), ModelType(*LCM)),
    (contains_any("motion_modules."), ModelType("AnimateDiff", ADDITION_REASON)),
    (
        lambda name: name in ("string_to_param", "string_to_token", "emb_params", "clip_l", "clip_g"),
        ModelType("textual inversion", ADDITION_REASON),
    ),
    (starts_with_any("conditioner.embedders."), ModelType("Stable Diffusion XL", NOT_SD_V1)),
    (
        contains_any("joint_blocks.", "double_blocks.", "single_blocks."),
        ModelType("Stable Diffusion 3, Flux or alike", NOT_SD_V1),
    ),
    (
        starts_with_any("cond_stage_model.model."),
        ModelType("Stable Diffusion v2", f"its text encoder is OpenCLIP's; {NOT_SD_V1}"),
    ),
    (lambda name: name in ("v_pred", "ztsnr", "edm_vpred.sigma_max"), ModelType("a model that predicts v", NOT_SD_V1)),
    (lambda name: name in ("edm_mean", "edm_std"), ModelType("a model with EDM's noise levels", NOT_SD_V1)),
    (
        starts_with_any("down_blocks.", "text_model."),
        ModelType("a component of a model folder", "name the whole folder"),
    ),
)


def detect_model_type(contents: CheckpointContents) -> ModelType:
    """Detect what model a single file holds."""
    names = [*contents.tensors, *contents.other_names]
    for matches, model_type in DETECTION_RULES:
        if any(matches(name) for name in names):
            return model_type
    if any(name.startswith(UNET_PREFIX) for name in contents.tensors):
        return detect_type_from_unet({name: tuple(value.shape) for name, value in contents.tensors.items()})
    return detect_type_without_unet(contents, names)


def detect_type_without_unet(contents: CheckpointContents, names: Collection[str]) -> ModelType:
    """Detect what a file without a UNet holds."""
    if any(name.startswith(EMA_PREFIX) and name not in EMA_COUNTERS for name in names):
        return ModelType(
            "averaged copies of a UNet (EMA) alone", "the UNet itself is missing; take the full checkpoint"
        )
    if is_autoencoder(names):
        return ModelType(AUTOENCODER, "it holds no UNet; use it with `--vae` for a checkpoint that has no VAE")
    if is_hypernetwork(contents):
        return ModelType("hypernetwork", ADDITION_REASON)
    if is_textual_inversion(contents.tensors):
        return ModelType("textual inversion", ADDITION_REASON)
    if any(name.startswith(TEXT_ENCODER_PREFIX) for name in names):
        return ModelType("text encoder", "it holds no UNet")
    first = f"; the first of {len(names)} names is {next(iter(names))!r}" if names else "; it is empty"
    return ModelType("unknown", f"it contains no UNet of Stable Diffusion v1{first}")


def detect_type_from_unet(shapes: Mapping[str, tuple[int, ...]]) -> ModelType:
    """Detect the model type from the UNet's shapes. Missing tensors are reported later."""
    channels = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", (0, SD_V1_LATENT_CHANNELS))[1:2]
    context_widths = [
        shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2
    ]
    if channels and channels[0] in MODELS_BY_INPUT_CHANNELS:
        return ModelType(*MODELS_BY_INPUT_CHANNELS[channels[0]])
    if any(name.startswith(f"{UNET_PREFIX}label_emb.") for name in shapes):
        return ModelType("unCLIP or Stable Diffusion XL", NOT_SD_V1)
    has_linear_projections = any(
        name.startswith(UNET_PREFIX) and name.endswith(".1.proj_in.weight") and len(shape) == 2
        for name, shape in shapes.items()
    )
    if has_linear_projections or (context_widths and context_widths[0] >= SD2_CONTEXT):
        return ModelType(
            "Stable Diffusion v2",
            f"its cross attention is {context_widths[0] if context_widths else '?'} wide; {NOT_SD_V1}",
        )
    return ModelType(SD_V1)


def is_autoencoder(names: Collection[str]) -> bool:
    vae_names = {name.removeprefix(VAE_PREFIX) for name in names}
    return {"post_quant_conv.weight", "decoder.conv_in.weight"} <= vae_names


def is_hypernetwork(contents: CheckpointContents) -> bool:
    """Whether it has the web UI's format: entries named after the widths that they modify, and no tensors."""
    return not contents.tensors and {"320", "640", "768", "1280"} & set(contents.other_names) != set()


def is_textual_inversion(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are embeddings of a few words for CLIP."""
    return 0 < len(tensors) <= 4 and all(
        value.dim() in (1, 2) and value.shape[-1] in (768, 1024, 1280) for value in tensors.values()
    )
