"""What a checkpoint is, told from the names and shapes of its tensors, and why some are not read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinysd_batch.quantize.checkpoint_files import Contents

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model."
EMA = "model_ema."
SD_V1 = "Stable Diffusion v1"
AUTOENCODER = "autoencoder"
ORIGIN = "the origin's 2-bit checkpoint"

SD_V1_CHANNELS = 4
SD2_CONTEXT = 1024
# By how many channels the UNet takes in.
OTHER_INPUTS = {
    5: ("Stable Diffusion for depth maps", "it needs a depth map beside the prompt"),
    7: ("Stable Diffusion upscaler", "it needs a picture beside the prompt"),
    8: ("InstructPix2Pix", "it needs a picture beside the prompt"),
    9: ("Stable Diffusion for inpainting", "it needs a picture and a mask beside the prompt"),
}
ADDITION = "it is an addition to a model, not a model; merge it into one with another program first"
SECOND = "only Stable Diffusion v1 is read, with 768 wide text and noise prediction"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a checkpoint is, and why it is not read, if it is not."""

    name: str
    reason: str | None = None


def anywhere(*marks: str) -> Callable[[str], bool]:
    return lambda name: any(mark in name for mark in marks)


def beginning(*marks: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(marks)


# The first rule that one of the names fits decides.
RULES: tuple[tuple[Callable[[str], bool], Kind], ...] = (
    (
        anywhere(".weight_quantizer.delta"),
        Kind(ORIGIN, "it is at 2 bits already; `tinysd-batch convert` takes it over as it is"),
    ),
    (
        anywhere("lora_up", "lora_down", "lora_A", "lora_B", "lora_unet_", "lora_te", "hada_w", "lokr_", "oft_blocks"),
        Kind("LoRA or LyCORIS", ADDITION),
    ),
    (
        anywhere("control_model.", "input_hint_block", "controlnet_cond_embedding", "controlnet_down_blocks"),
        Kind("ControlNet", ADDITION),
    ),
    (anywhere("motion_modules."), Kind("AnimateDiff", ADDITION)),
    (
        lambda name: name in ("string_to_param", "string_to_token", "emb_params", "clip_l", "clip_g"),
        Kind("textual inversion", ADDITION),
    ),
    (beginning("conditioner.embedders."), Kind("Stable Diffusion XL", SECOND)),
    (anywhere("joint_blocks.", "double_blocks.", "single_blocks."), Kind("Stable Diffusion 3, Flux or alike", SECOND)),
    (beginning("cond_stage_model.model."), Kind("Stable Diffusion v2", f"its text encoder is OpenCLIP's; {SECOND}")),
    (lambda name: name in ("v_pred", "ztsnr"), Kind("a model that predicts v", SECOND)),
    (beginning("down_blocks.", "text_model."), Kind("a part of a model folder", "name the whole folder")),
)


def kind_of(contents: Contents) -> Kind:
    """What a single file is."""
    names = [*contents.tensors, *contents.others]
    for fits, kind in RULES:
        if any(fits(name) for name in names):
            return kind
    if any(name.startswith(UNET) for name in contents.tensors):
        return kind_of_unet({name: tuple(value.shape) for name, value in contents.tensors.items()})
    if is_autoencoder(names):
        return Kind(AUTOENCODER, "it holds no UNet; `--vae` takes it beside a checkpoint that lacks one")
    if is_embedding(contents.tensors):
        return Kind("textual inversion", ADDITION)
    first = f"; the first of {len(names)} names is {names[0]!r}" if names else "; it is empty"
    return Kind("unknown", f"no UNet of Stable Diffusion v1 is in it{first}")


def kind_of_unet(shapes: Mapping[str, tuple[int, ...]]) -> Kind:
    """By the UNet's shapes; names that are missing are found later."""
    channels = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, SD_V1_CHANNELS))[1:2]
    context = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2]
    if channels and channels[0] in OTHER_INPUTS:
        return Kind(*OTHER_INPUTS[channels[0]])
    if any(name.startswith(f"{UNET}label_emb.") for name in shapes):
        return Kind("unCLIP or Stable Diffusion XL", SECOND)
    linear = any(name.startswith(UNET) and name.endswith(".1.proj_in.weight") and len(shape) == 2
                 for name, shape in shapes.items())  # fmt: skip
    if linear or (context and context[0] >= SD2_CONTEXT):
        return Kind("Stable Diffusion v2", f"its cross attention is {context[0] if context else '?'} wide; {SECOND}")
    return Kind(SD_V1)


def is_autoencoder(names: Collection[str]) -> bool:
    bare = {name.removeprefix(VAE) for name in names}
    return {"post_quant_conv.weight", "decoder.conv_in.weight"} <= bare


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the vectors of a few words for CLIP."""
    return 0 < len(tensors) <= 4 and all(
        value.dim() in (1, 2) and value.shape[-1] in (768, 1024, 1280) for value in tensors.values()
    )


def kind_of_configs(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Kind:
    """What a model folder is, by its `config.json` files."""
    if "quantization_config" in unet:
        return Kind("a packed model", "it is quantized already; a float model is needed")
    if (found := unet.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
        return Kind("ControlNet" if "ControlNet" in str(found) else str(found), SECOND)
    if unet.get("in_channels") in OTHER_INPUTS:
        return Kind(*OTHER_INPUTS[unet["in_channels"]])
    if unet.get("addition_embed_type") or unet.get("class_embed_type"):
        return Kind("Stable Diffusion XL or unCLIP", SECOND)
    context = unet.get("cross_attention_dim")
    if unet.get("use_linear_projection") or (isinstance(context, int) and context >= SD2_CONTEXT):
        return Kind("Stable Diffusion v2", f"its cross attention is {context} wide; {SECOND}")
    if (predicts := scheduler.get("prediction_type", "epsilon")) != "epsilon":
        return Kind("a model that predicts v", f"prediction_type is {predicts!r}; {SECOND}")
    return Kind(SD_V1)
