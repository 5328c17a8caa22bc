"""What a checkpoint is, told from the names and shapes of its tensors, and why some are not read."""

import re
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from tinysd_batch.model.checkpoint.config_checks import LCM, NOT_SD_V1, OTHER_INPUTS, SD2_CONTEXT, Kind
from tinysd_batch.quantize.sources.ldm_names import EMA, EMA_COUNTERS, TEXT, UNET, VAE
from tinysd_batch.quantize.sources.tensor_files import Contents

SD_V1 = "Stable Diffusion v1"
AUTOENCODER = "autoencoder"
ORIGIN = "the origin's 2-bit checkpoint"

SD_V1_CHANNELS = 4
ADDITION = "it is an addition to a model, not a model; merge it into one with another program first"


def anywhere(*marks: str) -> Callable[[str], bool]:
    return lambda name: any(mark in name for mark in marks)


def beginning(*marks: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(marks)


# LoRA as kohya's scripts, diffusers (`processor.to_q_lora.down`), peft (`lora_A`) and others spell it, and LyCORIS:
# LoHa, LoKr, OFT, IA3, DoRA and plain differences.
LORA = re.compile(
    r"lora|lycoris|loha_|hada_[wt]|lokr_|\b(b?oft|ia3)_|dora_scale|\.on_input$|\.diff(_b)?$", re.IGNORECASE
)

# The first rule that one of the names fits decides.
RULES: tuple[tuple[Callable[[str], bool], Kind], ...] = (
    (
        anywhere(".weight_quantizer.delta"),
        Kind(ORIGIN, "it is at 2 bits already; `tinysd-batch convert` takes it over as it is"),
    ),
    (
        anywhere("control_model.", "input_hint_block", "controlnet_", "lora_controlnet"),
        Kind("ControlNet", ADDITION),
    ),
    (lambda name: LORA.search(name) is not None, Kind("LoRA or LyCORIS", ADDITION)),
    (beginning("ip_adapter.", "image_proj."), Kind("IP-Adapter", ADDITION)),
    (beginning("adapter.body.", "body.0.in_conv.", "body.0.resnets."), Kind("T2I-Adapter", ADDITION)),
    (lambda name: name == "layer_structure", Kind("hypernetwork", ADDITION)),
    (anywhere("position_net."), Kind("GLIGEN", "it needs boxes beside the prompt")),
    (anywhere("time_embed.cond_proj.", "time_embedding.cond_proj."), Kind(*LCM)),
    (anywhere("motion_modules."), Kind("AnimateDiff", ADDITION)),
    (
        lambda name: name in ("string_to_param", "string_to_token", "emb_params", "clip_l", "clip_g"),
        Kind("textual inversion", ADDITION),
    ),
    (beginning("conditioner.embedders."), Kind("Stable Diffusion XL", NOT_SD_V1)),
    (
        anywhere("joint_blocks.", "double_blocks.", "single_blocks."),
        Kind("Stable Diffusion 3, Flux or alike", NOT_SD_V1),
    ),
    (beginning("cond_stage_model.model."), Kind("Stable Diffusion v2", f"its text encoder is OpenCLIP's; {NOT_SD_V1}")),
    (lambda name: name in ("v_pred", "ztsnr", "edm_vpred.sigma_max"), Kind("a model that predicts v", NOT_SD_V1)),
    (lambda name: name in ("edm_mean", "edm_std"), Kind("a model with EDM's noise levels", NOT_SD_V1)),
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
    return kind_without_unet(contents, names)


def kind_without_unet(contents: Contents, names: Collection[str]) -> Kind:
    """What a file without a UNet is."""
    if any(name.startswith(EMA) and name not in EMA_COUNTERS for name in names):
        return Kind("averaged copies of a UNet (EMA) alone", "the UNet itself is missing; take the full checkpoint")
    if is_autoencoder(names):
        return Kind(AUTOENCODER, "it holds no UNet; `--vae` takes it beside a checkpoint that lacks one")
    if is_hypernetwork(contents):
        return Kind("hypernetwork", ADDITION)
    if is_embedding(contents.tensors):
        return Kind("textual inversion", ADDITION)
    if any(name.startswith(TEXT) for name in names):
        return Kind("text encoder", "it holds no UNet")
    first = f"; the first of {len(names)} names is {next(iter(names))!r}" if names else "; it is empty"
    return Kind("unknown", f"no UNet of Stable Diffusion v1 is in it{first}")


def kind_of_unet(shapes: Mapping[str, tuple[int, ...]]) -> Kind:
    """By the UNet's shapes; names that are missing are found later."""
    channels = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, SD_V1_CHANNELS))[1:2]
    context = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2]
    if channels and channels[0] in OTHER_INPUTS:
        return Kind(*OTHER_INPUTS[channels[0]])
    if any(name.startswith(f"{UNET}label_emb.") for name in shapes):
        return Kind("unCLIP or Stable Diffusion XL", NOT_SD_V1)
    linear = any(name.startswith(UNET) and name.endswith(".1.proj_in.weight") and len(shape) == 2
                 for name, shape in shapes.items())  # fmt: skip
    if linear or (context and context[0] >= SD2_CONTEXT):
        return Kind("Stable Diffusion v2", f"its cross attention is {context[0] if context else '?'} wide; {NOT_SD_V1}")
    return Kind(SD_V1)


def is_autoencoder(names: Collection[str]) -> bool:
    bare = {name.removeprefix(VAE) for name in names}
    return {"post_quant_conv.weight", "decoder.conv_in.weight"} <= bare


def is_hypernetwork(contents: Contents) -> bool:
    """Whether it holds layers for texts and maps of these widths and no tensor beside them, as the web UI writes it."""
    return not contents.tensors and {"320", "640", "768", "1280"} & set(contents.others) != set()


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the vectors of a few words for CLIP."""
    return 0 < len(tensors) <= 4 and all(
        value.dim() in (1, 2) and value.shape[-1] in (768, 1024, 1280) for value in tensors.values()
    )
