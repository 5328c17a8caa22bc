"""How many bits each layer gets: presets by sort of layer, and the size of the file that comes of it."""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tinysd_batch.model.checkpoint.safetensors_mmap import size_of_file
from tinysd_batch.model.packed.format import Layout, group_size_for, to_matrix
from tinysd_batch.model.packed.layers import swap_packed_layers
from tinysd_batch.quantize.layers import layer_of

# First and last layer touch the latents themselves, the time embedding steers every block: few weights, much harm.
KEPT = ("conv_in", "conv_out", "time_embedding.")
# Sorts of layers by a part of the name; the first that fits decides.
SORTS = (
    ("time_emb", "time projections"), ("conv_in", "first and last"), ("conv_out", "first and last"),
    ("conv_shortcut", "shortcuts"), (".resnets.", "resnet convolutions"), ("samplers.", "resampling"),
    ("attn2.to_k", "text keys and values"), ("attn2.to_v", "text keys and values"), ("attn", "attention"),
    (".ff.", "feed-forward"), ("proj_", "block projections"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Preset:
    """Bits of a UNet's layers: 2, unless their sort or their place gets more."""

    sorts: dict[str, int]
    outer: int  # levels, from the largest maps on, whose layers get OUTER_BITS at least

    def bits(self, name: str, levels: int) -> int:
        """Of a layer in a UNet of so many levels."""
        return max(self.sorts.get(sort_of(name), LEAST_BITS), OUTER_BITS if level_of(name, levels) < self.outer else 0)


LEAST_BITS, OUTER_BITS = 2, 4
# Time and text projections steer all that is drawn, and work once a schedule and once a prompt. What else gets more is
# where that paid most for its bytes on the embedded model (`python -m benchmarks.quantize.layer_sensitivity`).
PROJECTIONS = {"time projections": 8, "text keys and values": 8}
OTHERS_AT_4 = {"resampling": 4, "block projections": 4, "attention": 4, "feed-forward": 4}
PRESETS = {
    "tiny": Preset({}, outer=0),
    "default": Preset({**PROJECTIONS, "shortcuts": 4}, outer=1),
    "quality": Preset({**PROJECTIONS, "shortcuts": 8, **OTHERS_AT_4}, outer=2),
}
DEFAULT, SMALLEST = "default", "tiny"


@dataclass(frozen=True, slots=True)
class Size:
    """What is asked of the UNet's file: a preset, or at most so many bytes."""

    preset: str = DEFAULT
    most: int | None = None

    def __str__(self) -> str:
        return f"preset {self.preset}" if self.most is None else f"at most {self.most / 1e6:,.1f} MB"

    def notes(self) -> dict[str, Any]:
        """What `config.json` keeps of it."""
        return {"preset": self.preset} if self.most is None else {"preset": SMALLEST, "target_size": self.most}


def sort_of(name: str) -> str:
    """A layer's sort."""
    return next((sort for part, sort in SORTS if part in name), "others")


def level_of(name: str, levels: int) -> int:
    """The level of a layer's block: 0 where maps are largest, the last in the middle."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if found is None:
        return levels - 1
    return int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])


def levels_of(unet: nn.Module) -> int:
    return len(list(unet.get_submodule("down_blocks").children()))


def layers_to_pack(unet: nn.Module, preset: str) -> dict[str, Layout]:
    """The linear and convolution layers that a preset packs, and how each is stored."""
    chosen, levels = {}, levels_of(unet)
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(KEPT):
            size = group_size_for(to_matrix(layer.weight).shape[1])
            if size is not None:
                chosen[name] = Layout(PRESETS[preset].bits(name, levels), size)
    return chosen


def unet_bytes(unet: nn.Module, layouts: Mapping[str, Layout]) -> int:
    """The size of the file that holds an empty UNet so packed, all else as float16."""
    packed = copy.deepcopy(unet)
    swap_packed_layers(packed, layouts)
    tensors = packed.state_dict()
    return size_of_file({name: one.half() if one.is_floating_point() else one for name, one in tensors.items()})


def size_in_words(unet: nn.Module, layouts: Mapping[str, Layout]) -> str:
    """Weights at each number of bits, and the size of the file."""
    weights: Counter[int] = Counter()
    for name, layout in layouts.items():
        weights[layout.bits] += layer_of(unet, name).weight.numel()
    shares = ", ".join(f"{count / 1e6:,.1f} M weights at {bits} bits" for bits, count in sorted(weights.items()))
    return f"{shares}: a file of {unet_bytes(unet, layouts) / 1e6:,.1f} MB"
