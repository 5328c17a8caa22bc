"""The settings of a model's configuration files, and which of their values are computed. Imports no torch."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from tinysd_batch.errors import ModelError
from tinysd_batch.text import printable

Config = Mapping[str, Any]

MAX_CHANNELS = 1024  # of the latents
MAX_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Setting:
    """Which values of an entry are computed. `sd_v1` is what the entry is where it is missing, and SD v1's value."""

    sd_v1: Any
    accepts: Callable[[Any], bool] | None = None  # None: no other value
    expected: str = ""
    meaning: str = ""  # of other values, for people

    def check(self, name: str, config: Config, where: Path) -> None:
        value = config.get(name, self.sd_v1)
        if is_same(value, self.sd_v1) or (self.accepts is not None and self.accepts(value)):
            return
        expected = self.expected or f"SD v1 models have {shown(self.sd_v1)}"
        meaning = f"{self.meaning} is " if self.meaning else ""
        raise ModelError(f"{where}: {name} = {shown(value)}: {meaning}not supported; {expected}")


def shown(value: Any) -> str:
    """A value as its file has it, on one line and not too long."""
    try:
        text = printable(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:
        text = "a list of lists of lists"
    return text[:MAX_SHOWN] + ("…" if len(text) > MAX_SHOWN else "")


def is_same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are equal; true is not 1 here, though 1.0 is."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def is_token(value: Any) -> bool:
    return is_count(value) or (value == 0 and not is_flag(value) and isinstance(value, int))


def is_token_or_null(value: Any) -> bool:
    return value is None or is_token(value)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value < 2**31


def is_kernel(value: Any) -> bool:
    return value in (1, 3, 5, 7) and is_count(value)


def are_counts(value: Any, depth: int = 2) -> bool:
    """A count, or a list of them for each block, or of lists for each layer."""
    if isinstance(value, list) and depth:
        return bool(value) and all(are_counts(each, depth - 1) for each in value)
    return is_count(value)


def are_equal_counts(value: Any) -> bool:
    return is_count(value) or (isinstance(value, list) and bool(value) and all(each == value[0] for each in value)
                               and is_count(value[0]))  # fmt: skip


def one_of(*values: str | None) -> Callable[[Any], bool]:
    return lambda value: (value is None or isinstance(value, str)) and value in values


def all_of(*values: str) -> Callable[[Any], bool]:
    """A list of them, one for each block."""
    return lambda value: (
        isinstance(value, list) and bool(value) and all(isinstance(each, str) and each in values for each in value)
    )


ID_EXPECTED = "the number of a token was expected"
COUNTS = "a whole number above zero, or a list of them, was expected"
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
DOWN_BLOCKS, UP_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
MIDDLE = "UNetMidBlock2DCrossAttn"

UNET = {
    # Computed with any of these values.
    "act_fn": Setting("silu", one_of(*ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)} is"),
    "attention_head_dim": Setting(8, are_counts, COUNTS),
    "conv_in_kernel": Setting(3, is_kernel, "1, 3, 5 or 7 is"),
    "conv_out_kernel": Setting(3, is_kernel, "1, 3, 5 or 7 is"),
    "cross_attention_dim": Setting(1280, are_equal_counts, "one width for all blocks is"),
    "down_block_types": Setting(
        [DOWN_BLOCKS[1]] * 3 + [DOWN_BLOCKS[0]], all_of(*DOWN_BLOCKS), f"{' and '.join(DOWN_BLOCKS)} are"
    ),
    "downsample_padding": Setting(1, lambda value: value in (0, 1) and not is_flag(value), "0 or 1 is"),
    "dropout": Setting(0.0, lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1 is"),
    "flip_sin_to_cos": Setting(True, is_flag, "true or false was expected"),
    "freq_shift": Setting(0, is_number, "a number was expected"),
    "in_channels": Setting(4, lambda value: is_count(value) and value <= MAX_CHANNELS, f"1 to {MAX_CHANNELS:,} are"),
    "layers_per_block": Setting(2, are_counts, COUNTS),
    "mid_block_scale_factor": Setting(1, is_positive, "a number above zero was expected"),
    "mid_block_type": Setting(MIDDLE, one_of(MIDDLE, None), f"{MIDDLE} or null is"),
    "norm_eps": Setting(1e-5, is_positive, "a number above zero was expected"),
    "norm_num_groups": Setting(32, is_count, "a whole number above zero was expected"),
    "resnet_time_scale_shift": Setting("default", one_of("default", "scale_shift"), "default or scale_shift is"),
    "reverse_transformer_layers_per_block": Setting(None, are_counts, COUNTS),
    "time_embedding_dim": Setting(None, is_count, "a whole number above zero was expected"),
    "timestep_post_act": Setting(None, one_of(*ACTIVATIONS), f"null or one of {', '.join(ACTIVATIONS)} is"),
    "transformer_layers_per_block": Setting(1, are_counts, COUNTS),
    "up_block_types": Setting(
        [UP_BLOCKS[0]] + [UP_BLOCKS[1]] * 3, all_of(*UP_BLOCKS), f"{' and '.join(UP_BLOCKS)} are"
    ),
    "upcast_attention": Setting(False, is_flag, "true or false was expected"),
    "use_linear_projection": Setting(False, is_flag, "true or false was expected"),
    # Not computed.
    "addition_embed_type": Setting(None, meaning="an embedding beside the prompt's (SDXL, IP-Adapter)"),
    "attention_type": Setting("default", meaning="attention to boxes (GLIGEN)"),
    "center_input_sample": Setting(False, meaning="centring the latents"),
    "class_embed_type": Setting(None, meaning="an embedding of classes"),
    "class_embeddings_concat": Setting(False, meaning="an embedding of classes"),
    "cross_attention_norm": Setting(None, meaning="a norm of the prompt's embedding"),
    "dual_cross_attention": Setting(False, meaning="attention to two prompts"),
    "encoder_hid_dim": Setting(None, meaning="a projection of the prompt's embedding"),
    "encoder_hid_dim_type": Setting(None, meaning="a projection of the prompt's embedding"),
    "num_attention_heads": Setting(None, meaning="the number of heads beside attention_head_dim"),
    "num_class_embeds": Setting(None, meaning="an embedding of classes"),
    "only_cross_attention": Setting(False, meaning="attention to the prompt alone"),
    "resnet_out_scale_factor": Setting(1.0, meaning="scaling what resnets add"),
    "resnet_skip_time_act": Setting(False, meaning="resnets without an activation of the time"),
    "time_cond_proj_dim": Setting(None, meaning="the embedding of the guidance scale in few-step models (LCM)"),
    "time_embedding_act_fn": Setting(None, meaning="an activation of the time embedding"),
    "time_embedding_type": Setting("positional", meaning="another embedding of the time"),
}  # fmt: skip

ENCODER_BLOCK, DECODER_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"
VAE = {
    "act_fn": Setting("silu"),
    "down_block_types": Setting([ENCODER_BLOCK], all_of(ENCODER_BLOCK), f"{ENCODER_BLOCK} is"),
    "latents_mean": Setting(None, meaning="shifted latents"),
    "latents_std": Setting(None, meaning="scaled latents"),
    "layers_per_block": Setting(1, is_count, "a whole number above zero was expected"),
    "mid_block_add_attention": Setting(True, is_flag, "true or false was expected"),
    "norm_num_groups": Setting(32, is_count, "a whole number above zero was expected"),
    "in_channels": Setting(3),
    "out_channels": Setting(3),
    "scaling_factor": Setting(0.18215, is_positive, "a number above zero was expected"),
    "shift_factor": Setting(None, meaning="shifted latents"),
    "up_block_types": Setting([DECODER_BLOCK], all_of(DECODER_BLOCK), f"{DECODER_BLOCK} is"),
    "use_post_quant_conv": Setting(True, is_flag, "true or false was expected"),
    "use_quant_conv": Setting(True, is_flag, "true or false was expected"),
}

TEXT_MODELS = ("clip_text_model", "clip")
TEXT = {
    "bos_token_id": Setting(49406, is_token_or_null, ID_EXPECTED),
    "eos_token_id": Setting(49407, is_token, ID_EXPECTED),
    "pad_token_id": Setting(1, is_token_or_null, ID_EXPECTED),
    "hidden_act": Setting("quick_gelu", one_of("quick_gelu", "gelu"), "quick_gelu or gelu is"),
    "layer_norm_eps": Setting(1e-5, is_positive, "a number above zero was expected"),
    "model_type": Setting("clip_text_model", one_of(*TEXT_MODELS), "CLIP's text encoder is", "another text encoder"),
    "num_attention_heads": Setting(12, is_count, "a whole number above zero was expected"),
    "num_hidden_layers": Setting(12, is_count, "a whole number above zero was expected"),
    "vocab_size": Setting(49408, is_count, "a whole number above zero was expected"),
    "use_attention_mask": Setting(False, one_of(None), meaning="masking the padding"),
}

SCHEDULER = {
    "beta_start": Setting(0.00085),
    "beta_end": Setting(0.012),
    "beta_schedule": Setting("scaled_linear"),
    "num_train_timesteps": Setting(1000),
    "prediction_type": Setting("epsilon"),
    "rescale_betas_zero_snr": Setting(False, one_of(None), meaning="a noise schedule that ends without signal"),
    "thresholding": Setting(False, one_of(None), meaning="clipping latents (dynamic thresholding)"),
    "trained_betas": Setting(None, meaning="a noise schedule of its own"),
    "use_flow_sigmas": Setting(False, one_of(None), meaning="flow matching"),
    "variance_type": Setting(
        None, lambda value: isinstance(value, str) and not value.startswith("learned"), meaning="a learned variance"
    ),
}
