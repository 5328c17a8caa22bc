"""The entries of a model's configuration files and their supported values. Does not import torch."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from tinysd_batch.errors import ModelError
from tinysd_batch.text import make_printable

ComponentConfig = Mapping[str, Any]

MAX_CHANNELS = 1024  # of the latents
MAX_VALUE_CHARACTERS = 60  # of a value in an error message


@dataclass(frozen=True, slots=True)
class ConfigRule:
    """The supported values of a configuration entry."""

    sd_v1_value: Any  # always supported, and the default of a missing entry
    accepts: Callable[[Any], bool] | None = None  # which other values are supported; None: none
    expected: str = ""  # the supported values, for error messages
    meaning: str = ""  # what an unsupported value means, for error messages

    def check(self, name: str, config: ComponentConfig, path: Path) -> None:
        """Raise ModelError if entry `name` of `config`, which was read from `path`, is not supported."""
        value = config.get(name, self.sd_v1_value)
        if is_same_json_value(value, self.sd_v1_value) or (self.accepts is not None and self.accepts(value)):
            return
        expected = self.expected or f"SD v1 models have {format_config_value(self.sd_v1_value)}"
        meaning = f"{self.meaning} is " if self.meaning else ""
        raise ModelError(f"{path}: {name} = {format_config_value(value)}: {meaning}not supported; {expected}")


def format_config_value(value: Any) -> str:
    """Format a value as JSON on one line, truncated if long."""
    try:
        text = make_printable(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:
        text = "a list of lists of lists"
    return text[:MAX_VALUE_CHARACTERS] + ("…" if len(text) > MAX_VALUE_CHARACTERS else "")


def is_same_json_value(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal. 1.0 equals 1, but true does not."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_positive_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def is_token_id(value: Any) -> bool:
    return is_positive_int(value) or (value == 0 and not is_bool(value) and isinstance(value, int))


def is_token_id_or_null(value: Any) -> bool:
    return value is None or is_token_id(value)


def is_finite_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_positive_number(value: Any) -> bool:
    return is_finite_number(value) and 0 < value < 2**31


def is_kernel_size(value: Any) -> bool:
    return value in (1, 3, 5, 7) and is_positive_int(value)


def are_positive_ints(value: Any, depth: int = 2) -> bool:
    """Whether it is a positive integer, or a list of them per block, or of such lists per layer."""
    if isinstance(value, list) and depth:
        return bool(value) and all(are_positive_ints(member, depth - 1) for member in value)
    return is_positive_int(value)


def are_equal_positive_ints(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(member == value[0] for member in value) and is_positive_int(value[0])
    return is_positive_int(value)


def one_of(*values: str | None) -> Callable[[Any], bool]:
    """Return a predicate: the value is one of these."""
    return lambda value: (value is None or isinstance(value, str)) and value in values


def list_of(*values: str) -> Callable[[Any], bool]:
    """Return a predicate: the value is a list of these, one for each block."""
    return lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(member, str) and member in values for member in value)
    )


ID_EXPECTED = "a token id was expected"
COUNTS_EXPECTED = "a whole number above zero, or a list of them, was expected"
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
DOWN_BLOCKS, UP_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
MID_BLOCK = "UNetMidBlock2DCrossAttn"

UNET_RULES = {
    # Supported with any of these values.
    "act_fn": ConfigRule("silu", one_of(*ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)} was expected"),
    "attention_head_dim": ConfigRule(8, are_positive_ints, COUNTS_EXPECTED),
    "conv_in_kernel": ConfigRule(3, is_kernel_size, "1, 3, 5 or 7 was expected"),
    "conv_out_kernel": ConfigRule(3, is_kernel_size, "1, 3, 5 or 7 was expected"),
    "cross_attention_dim": ConfigRule(1280, are_equal_positive_ints, "one width for all blocks was expected"),
    "down_block_types": ConfigRule(
        [DOWN_BLOCKS[1]] * 3 + [DOWN_BLOCKS[0]], list_of(*DOWN_BLOCKS), f"{' and '.join(DOWN_BLOCKS)} were expected"
    ),
    "downsample_padding": ConfigRule(1, lambda value: value in (0, 1) and not is_bool(value), "0 or 1 was expected"),
    "dropout": ConfigRule(
        0.0, lambda value: is_finite_number(value) and 0 <= value <= 1, "a number from 0 to 1 was expected"
    ),
    "flip_sin_to_cos": ConfigRule(True, is_bool, "true or false was expected"),
    "freq_shift": ConfigRule(0, is_finite_number, "a number was expected"),
    "in_channels": ConfigRule(
        4,
        lambda value: is_positive_int(value) and value <= MAX_CHANNELS,
        f"a whole number from 1 to {MAX_CHANNELS:,} was expected",
    ),
    "layers_per_block": ConfigRule(2, are_positive_ints, COUNTS_EXPECTED),
    "mid_block_scale_factor": ConfigRule(1, is_positive_number, "a number above zero was expected"),
    "mid_block_type": ConfigRule(MID_BLOCK, one_of(MID_BLOCK, None), f"{MID_BLOCK} or null was expected"),
    "norm_eps": ConfigRule(1e-5, is_positive_number, "a number above zero was expected"),
    "norm_num_groups": ConfigRule(32, is_positive_int, "a whole number above zero was expected"),
    "resnet_time_scale_shift": ConfigRule(
        "default", one_of("default", "scale_shift"), "default or scale_shift was expected"
    ),
    "reverse_transformer_layers_per_block": ConfigRule(None, are_positive_ints, COUNTS_EXPECTED),
    "time_embedding_dim": ConfigRule(None, is_positive_int, "a whole number above zero was expected"),
    "timestep_post_act": ConfigRule(
        None, one_of(*ACTIVATIONS), f"null or one of {', '.join(ACTIVATIONS)} was expected"
    ),
    "transformer_layers_per_block": ConfigRule(1, are_positive_ints, COUNTS_EXPECTED),
    "up_block_types": ConfigRule(
        [UP_BLOCKS[0]] + [UP_BLOCKS[1]] * 3, list_of(*UP_BLOCKS), f"{' and '.join(UP_BLOCKS)} were expected"
    ),
    "upcast_attention": ConfigRule(False, is_bool, "true or false was expected"),
    "use_linear_projection": ConfigRule(False, is_bool, "true or false was expected"),
    # Supported with SD v1's value only.
    "addition_embed_type": ConfigRule(None, meaning="an embedding in addition to the prompt's (SDXL, IP-Adapter)"),
    "attention_type": ConfigRule("default", meaning="attention to bounding boxes (GLIGEN)"),
    "center_input_sample": ConfigRule(False, meaning="centering the latents"),
    "class_embed_type": ConfigRule(None, meaning="a class embedding"),
    "class_embeddings_concat": ConfigRule(False, meaning="a class embedding"),
    "cross_attention_norm": ConfigRule(None, meaning="normalizing the prompt's embedding"),
    "dual_cross_attention": ConfigRule(False, meaning="attention to two prompts"),
    "encoder_hid_dim": ConfigRule(None, meaning="a projection of the prompt's embedding"),
    "encoder_hid_dim_type": ConfigRule(None, meaning="a projection of the prompt's embedding"),
    "num_attention_heads": ConfigRule(None, meaning="a number of heads in addition to attention_head_dim"),
    "num_class_embeds": ConfigRule(None, meaning="a class embedding"),
    "only_cross_attention": ConfigRule(False, meaning="cross-attention without self-attention"),
    "resnet_out_scale_factor": ConfigRule(1.0, meaning="scaling the output of resnets"),
    "resnet_skip_time_act": ConfigRule(False, meaning="resnets without an activation of the time embedding"),
    "time_cond_proj_dim": ConfigRule(None, meaning="the embedding of the guidance scale in few-step models (LCM)"),
    "time_embedding_act_fn": ConfigRule(None, meaning="an activation after the time embedding"),
    "time_embedding_type": ConfigRule("positional", meaning="another type of time embedding"),
}

ENCODER_BLOCK, DECODER_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"
VAE_RULES = {
    "act_fn": ConfigRule("silu"),
    "down_block_types": ConfigRule([ENCODER_BLOCK], list_of(ENCODER_BLOCK), f"{ENCODER_BLOCK} was expected"),
    "latents_mean": ConfigRule(None, meaning="shifted latents"),
    "latents_std": ConfigRule(None, meaning="scaled latents"),
    "layers_per_block": ConfigRule(1, is_positive_int, "a whole number above zero was expected"),
    "mid_block_add_attention": ConfigRule(True, is_bool, "true or false was expected"),
    "norm_num_groups": ConfigRule(32, is_positive_int, "a whole number above zero was expected"),
    "in_channels": ConfigRule(3),
    "out_channels": ConfigRule(3),
    "scaling_factor": ConfigRule(0.18215, is_positive_number, "a number above zero was expected"),
    "shift_factor": ConfigRule(None, meaning="shifted latents"),
    "up_block_types": ConfigRule([DECODER_BLOCK], list_of(DECODER_BLOCK), f"{DECODER_BLOCK} was expected"),
    "use_post_quant_conv": ConfigRule(True, is_bool, "true or false was expected"),
    "use_quant_conv": ConfigRule(True, is_bool, "true or false was expected"),
}

TEXT_MODEL_TYPES = ("clip_text_model", "clip")
TEXT_ENCODER_RULES = {
    "bos_token_id": ConfigRule(49406, is_token_id_or_null, ID_EXPECTED),
    "eos_token_id": ConfigRule(49407, is_token_id, ID_EXPECTED),
    "pad_token_id": ConfigRule(1, is_token_id_or_null, ID_EXPECTED),
    "hidden_act": ConfigRule("quick_gelu", one_of("quick_gelu", "gelu"), "quick_gelu or gelu was expected"),
    "layer_norm_eps": ConfigRule(1e-5, is_positive_number, "a number above zero was expected"),
    "model_type": ConfigRule(
        "clip_text_model", one_of(*TEXT_MODEL_TYPES), "CLIP's text encoder was expected", "another text encoder"
    ),
    "num_attention_heads": ConfigRule(12, is_positive_int, "a whole number above zero was expected"),
    "num_hidden_layers": ConfigRule(12, is_positive_int, "a whole number above zero was expected"),
    "vocab_size": ConfigRule(49408, is_positive_int, "a whole number above zero was expected"),
    "use_attention_mask": ConfigRule(False, one_of(None), meaning="masking padding tokens"),
}

SCHEDULER_RULES = {
    "beta_start": ConfigRule(0.00085),
    "beta_end": ConfigRule(0.012),
    "beta_schedule": ConfigRule("scaled_linear"),
    "num_train_timesteps": ConfigRule(1000),
    "prediction_type": ConfigRule("epsilon"),
    "rescale_betas_zero_snr": ConfigRule(False, one_of(None), meaning="a noise schedule with zero terminal SNR"),
    "thresholding": ConfigRule(False, one_of(None), meaning="clipping latents (dynamic thresholding)"),
    "trained_betas": ConfigRule(None, meaning="a custom noise schedule"),
    "use_flow_sigmas": ConfigRule(False, one_of(None), meaning="flow matching"),
    "variance_type": ConfigRule(
        None, lambda value: isinstance(value, str) and not value.startswith("learned"), meaning="a learned variance"
    ),
}
