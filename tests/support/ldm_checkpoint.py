"""SD v1 checkpoints under LDM's names, built from random diffusers models.

The program renames tensors with diffusers' converters. Here the names are derived independently and in the other
direction, and those of the UNet are compared with the layer list in `tiny_stable_diffusion.py`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tinysd_batch.quantize.sources.clip_tokenizer import VOCAB_SIZE

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
TEXT_WIDTH = 32


@dataclass(frozen=True)
class Sizes:
    """Widths of the components; the defaults are those of SD v1."""

    unet: int = 320
    vae: int = 128
    text: int = 768
    text_layers: int = 12
    vocabulary: int = VOCAB_SIZE


SMALL = Sizes(unet=32, vae=32, text=TEXT_WIDTH, text_layers=2)


def new_unet(sizes: Sizes) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(sizes.unet * factor for factor in (1, 2, 4, 4)),
        attention_head_dim=8,
        cross_attention_dim=sizes.text,
    )


def new_vae(sizes: Sizes) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=tuple(sizes.vae * factor for factor in (1, 2, 4, 4)),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
    )


def new_text_encoder(sizes: Sizes) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.text,
            intermediate_size=4 * sizes.text,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=max(sizes.text // 64, 1),
        )
    )


@dataclass(frozen=True)
class Models:
    """The three components of a model, as modules of diffusers and transformers."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel

    def ldm_tensors(self) -> dict[str, Tensor]:
        """Return all tensors under the names and in the shapes of a single file."""
        tensors = {UNET + unet_name(name): value for name, value in self.unet.state_dict().items()}
        for name, value in self.vae.state_dict().items():
            old = vae_name(name)
            is_kernel = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", old)
            tensors[VAE + old] = value[:, :, None, None] if is_kernel else value
        return tensors | {CLIP + name: value for name, value in self.text_encoder.state_dict().items()}


def random_models(sizes: Sizes = SMALL, seed: int = 0) -> Models:
    torch.manual_seed(seed)
    models = Models(new_unet(sizes), new_vae(sizes), new_text_encoder(sizes))
    with torch.no_grad():  # initial norms and biases are all equal, which would hide mixed-up tensors
        for module in (models.unet, models.vae, models.text_encoder):
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return models


def replace_all(name: str, rules: Mapping[str, str]) -> str:
    for pattern, new in rules.items():
        name = re.sub(pattern, new, name)
    return name


RESIDUAL = {
    r"\.norm1\.": ".in_layers.0.",
    r"\.conv1\.": ".in_layers.2.",
    r"\.time_emb_proj\.": ".emb_layers.1.",
    r"\.norm2\.": ".out_layers.0.",
    r"\.conv2\.": ".out_layers.3.",
    r"\.conv_shortcut\.": ".skip_connection.",
}
ENDS = {
    r"^conv_in\.": "input_blocks.0.0.",
    r"^time_embedding\.linear_1\.": "time_embed.0.",
    r"^time_embedding\.linear_2\.": "time_embed.2.",
    r"^conv_norm_out\.": "out.0.",
    r"^conv_out\.": "out.2.",
}


def unet_name(name: str) -> str:
    """Return LDM's name of a UNet tensor."""
    pattern = r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)"
    if match := re.match(pattern, name):
        side, stage, modules, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if modules == "downsamplers":
            return f"input_blocks.{3 * stage + 3}.0.op.{rest.removeprefix('conv.')}"
        if modules == "upsamplers":
            return f"output_blocks.{3 * stage + 2}.{2 if stage else 1}.{rest}"
        block = f"input_blocks.{3 * stage + layer + 1}" if side == "down" else f"output_blocks.{3 * stage + layer}"
        if modules == "attentions":
            return f"{block}.1.{rest}"
        return f"{block}.0{replace_all('.' + rest, RESIDUAL)}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}{replace_all('.' + match[3], RESIDUAL)}"
    return replace_all(name, ENDS)


ATTENTION = {r"group_norm\.": "norm.", r"to_q\.": "q.", r"to_k\.": "k.", r"to_v\.": "v.", r"to_out\.0\.": "proj_out."}


def vae_name(name: str) -> str:
    """Return LDM's name of a VAE tensor."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if match := re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        if match[2] == "attentions":
            return f"{match[1]}.mid.attn_1.{replace_all(match[4], ATTENTION)}"
        return f"{match[1]}.mid.block_{int(match[3]) + 1}.{match[4]}"
    if match := re.match(r"(encoder\.down|decoder\.up)_blocks\.(\d)\.(resnets|down|up)(?:samplers)?\.(\d)\.(.*)", name):
        stage = int(match[2]) if match[1] == "encoder.down" else 3 - int(match[2])
        if match[3] == "resnets":
            return f"{match[1]}.{stage}.block.{match[4]}.{match[5]}"
        return f"{match[1]}.{stage}.{match[3]}sample.{match[5]}"
    return name


def full_size_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor, without allocating any."""
    with torch.device("meta"):
        models = Models(new_unet(sizes), new_vae(sizes), new_text_encoder(sizes))
    for name, value in models.ldm_tensors().items():
        yield name, tuple(value.shape)


def schedule_buffers() -> dict[str, Tensor]:
    """Return some of the noise schedule's tensors that SD v1's checkpoints contain."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = (1 - betas).cumprod(0)
    return {
        "betas": betas,
        "alphas_cumprod": alphas,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "logvar": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
    }


def ema_copies(tensors: Mapping[str, Tensor], change: float = 0.0) -> dict[str, Tensor]:
    """Return the contents of `model_ema`: the UNet's tensors under names without dots, and two counters."""
    copies = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value + change
        for name, value in tensors.items()
        if name.startswith(UNET)
    }
    return copies | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def same_tensors(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    """Whether these are exactly the module's tensors in this dtype."""
    expected = module.state_dict()
    return expected.keys() == tensors.keys() and all(
        value.dtype == dtype and torch.equal(value, expected[name].to(dtype)) for name, value in tensors.items()
    )
