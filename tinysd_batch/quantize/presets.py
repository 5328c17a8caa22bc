"""Presets: how many bits each layer gets, by its type, and how large the UNet's file becomes."""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tinysd_batch.model.checkpoint.safetensors_mmap import compute_file_bytes
from tinysd_batch.model.packed.format import Layout, choose_group_size, to_matrix
from tinysd_batch.model.packed.layers import swap_packed_layers
from tinysd_batch.quantize.layers import get_layer

# Layers that stay float16: the first and the last one work on the latents themselves, and the time embedding affects
# every block. They have few weights, and quantizing them costs much quality.
UNPACKED_PREFIXES = ("conv_in", "conv_out", "time_embedding.")
# Layer types by a part of the name; the first match decides. The types are stored in reports.
LAYER_TYPES = (
    ("time_emb", "time projections"),
    ("conv_in", "first and last"),
    ("conv_out", "first and last"),
    ("conv_shortcut", "shortcuts"),
    (".resnets.", "resnet convolutions"),
    ("samplers.", "resampling"),
    ("attn2.to_k", "text keys and values"),
    ("attn2.to_v", "text keys and values"),
    ("attn", "attention"),
    (".ff.", "feed-forward"),
    ("proj_", "block projections"),
)


@dataclass(frozen=True, slots=True)
class Preset:
    """How many bits a UNet's layers get: 2, unless their type or their block level gets more."""

    bits_by_layer_type: dict[str, int]
    outer_levels: int  # number of levels, from the largest feature maps on, that get at least OUTER_LEVEL_BITS

    def bits(self, name: str, levels: int) -> int:
        """Return the bits of a layer in a UNet with this number of block levels."""
        return max(
            self.bits_by_layer_type.get(get_layer_type(name), MIN_BITS),
            OUTER_LEVEL_BITS if get_block_level(name, levels) < self.outer_levels else 0,
        )


MIN_BITS, OUTER_LEVEL_BITS = 2, 4
# Time and text projections affect the whole image, and run only once per schedule and once per prompt. The other layer
# types with more bits are those that gained most per byte on the embedded model
# (`python -m benchmarks.quantize.layer_sensitivity`).
PROJECTION_BITS = {"time projections": 8, "text keys and values": 8}
QUALITY_BITS = {"resampling": 4, "block projections": 4, "attention": 4, "feed-forward": 4}
PRESETS = {
    "tiny": Preset({}, outer_levels=0),
    "default": Preset({**PROJECTION_BITS, "shortcuts": 4}, outer_levels=1),
    "quality": Preset({**PROJECTION_BITS, "shortcuts": 8, **QUALITY_BITS}, outer_levels=2),
}
DEFAULT_PRESET, SMALLEST_PRESET = "default", "tiny"


@dataclass(frozen=True, slots=True)
class SizeTarget:
    """The requested size of the UNet's file: that of a preset, or at most `max_bytes`."""

    preset: str = DEFAULT_PRESET
    max_bytes: int | None = None

    def __str__(self) -> str:
        return f"preset {self.preset}" if self.max_bytes is None else f"at most {self.max_bytes / 1e6:,.1f} MB"

    def to_config(self) -> dict[str, Any]:
        """Return the entries of `quantization_config` that record it."""
        if self.max_bytes is None:
            return {"preset": self.preset}
        return {"preset": SMALLEST_PRESET, "target_size": self.max_bytes}


def get_layer_type(name: str) -> str:
    """Return the layer type that the name of a layer says."""
    return next((layer_type for part, layer_type in LAYER_TYPES if part in name), "others")


def get_block_level(name: str, levels: int) -> int:
    """Return the level of a layer's block: 0 where feature maps are largest, `levels - 1` in the middle block."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if match is None:
        return levels - 1
    return int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])


def count_block_levels(unet: nn.Module) -> int:
    return len(list(unet.get_submodule("down_blocks").children()))


def get_preset_layouts(unet: nn.Module, preset: str) -> dict[str, Layout]:
    """Return the layout of each linear and convolution layer that a preset packs."""
    layouts, levels = {}, count_block_levels(unet)
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(UNPACKED_PREFIXES):
            group_size = choose_group_size(to_matrix(layer.weight).shape[1])
            if group_size is not None:
                layouts[name] = Layout(PRESETS[preset].bits(name, levels), group_size)
    return layouts


def compute_unet_bytes(unet: nn.Module, layouts: Mapping[str, Layout]) -> int:
    """Compute the size of the UNet's file with these layouts; all other tensors are float16.

    The UNet may be on the meta device.
    """
    packed = copy.deepcopy(unet)
    swap_packed_layers(packed, layouts)
    tensors = packed.state_dict()
    return compute_file_bytes(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    )


def describe_size(unet: nn.Module, layouts: Mapping[str, Layout]) -> str:
    """Say how many weights get each number of bits, and how large the file becomes."""
    weights_by_bits: Counter[int] = Counter()
    for name, layout in layouts.items():
        weights_by_bits[layout.bits] += get_layer(unet, name).weight.numel()
    shares = ", ".join(
        f"{count / 1e6:,.1f} M weights at {bits} bits" for bits, count in sorted(weights_by_bits.items())
    )
    return f"{shares}: a file of {compute_unet_bytes(unet, layouts) / 1e6:,.1f} MB"
