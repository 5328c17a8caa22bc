"""How many bits each layer gets: presets by sort of layer, and the size of the file that comes of it."""

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

# First and last layer touch the latents themselves, the time embedding steers every block: few weights, much harm.
UNPACKED_PREFIXES = ("conv_in", "conv_out", "time_embedding.")
# Sorts of layers by a part of the name; the first that fits decides.
LAYER_TYPES = (
    ("time_emb", "time projections"), ("conv_in", "first and last"), ("conv_out", "first and last"),
    ("conv_shortcut", "shortcuts"), (".resnets.", "resnet convolutions"), ("samplers.", "resampling"),
    ("attn2.to_k", "text keys and values"), ("attn2.to_v", "text keys and values"), ("attn", "attention"),
    (".ff.", "feed-forward"), ("proj_", "block projections"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Preset:
    """Bits of a UNet's layers: 2, unless their sort or their place gets more."""

    bits_by_layer_type: dict[str, int]
    outer_levels: int  # levels, from the largest maps on, whose layers get OUTER_LEVEL_BITS at least

    def bits(self, name: str, levels: int) -> int:
        """Of a layer in a UNet of so many levels."""
        return max(
            self.bits_by_layer_type.get(get_layer_type(name), MIN_BITS),
            OUTER_LEVEL_BITS if get_block_level(name, levels) < self.outer_levels else 0,
        )


MIN_BITS, OUTER_LEVEL_BITS = 2, 4
# Time and text projections steer all that is drawn, and work once a schedule and once a prompt. What else gets more is
# where that paid most for its bytes on the embedded model (`python -m benchmarks.quantize.layer_sensitivity`).
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
    """What is asked of the UNet's file: a preset, or at most so many bytes."""

    preset: str = DEFAULT_PRESET
    max_bytes: int | None = None

    def __str__(self) -> str:
        return f"preset {self.preset}" if self.max_bytes is None else f"at most {self.max_bytes / 1e6:,.1f} MB"

    def to_config(self) -> dict[str, Any]:
        """What `config.json` keeps of it."""
        return (
            {"preset": self.preset}
            if self.max_bytes is None
            else {"preset": SMALLEST_PRESET, "target_size": self.max_bytes}
        )


def get_layer_type(name: str) -> str:
    """A layer's sort."""
    return next((sort for part, sort in LAYER_TYPES if part in name), "others")


def get_block_level(name: str, levels: int) -> int:
    """The level of a layer's block: 0 where maps are largest, the last in the middle."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if found is None:
        return levels - 1
    return int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])


def count_block_levels(unet: nn.Module) -> int:
    return len(list(unet.get_submodule("down_blocks").children()))


def get_preset_layouts(unet: nn.Module, preset: str) -> dict[str, Layout]:
    """The linear and convolution layers that a preset packs, and how each is stored."""
    chosen, levels = {}, count_block_levels(unet)
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(UNPACKED_PREFIXES):
            size = choose_group_size(to_matrix(layer.weight).shape[1])
            if size is not None:
                chosen[name] = Layout(PRESETS[preset].bits(name, levels), size)
    return chosen


def compute_unet_bytes(unet: nn.Module, layouts: Mapping[str, Layout]) -> int:
    """The size of the file that holds an empty UNet so packed, all else as float16."""
    packed = copy.deepcopy(unet)
    swap_packed_layers(packed, layouts)
    tensors = packed.state_dict()
    return compute_file_bytes({name: one.half() if one.is_floating_point() else one for name, one in tensors.items()})


def describe_size(unet: nn.Module, layouts: Mapping[str, Layout]) -> str:
    """Weights at each number of bits, and the size of the file."""
    weights: Counter[int] = Counter()
    for name, layout in layouts.items():
        weights[layout.bits] += get_layer(unet, name).weight.numel()
    shares = ", ".join(f"{count / 1e6:,.1f} M weights at {bits} bits" for bits, count in sorted(weights.items()))
    return f"{shares}: a file of {compute_unet_bytes(unet, layouts) / 1e6:,.1f} MB"
