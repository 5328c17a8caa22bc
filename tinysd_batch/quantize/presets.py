"""How many bits each layer gets: presets by sort of layer, and the size of the file that comes of it."""

import copy
from collections import Counter
from collections.abc import Mapping

from torch import nn

from tinysd_batch.model.mapped import size_of_file
from tinysd_batch.model.packed import swap_packed_layers
from tinysd_batch.model.packing import Layout, group_size_for, to_matrix
from tinysd_batch.quantize.hessian import layer_of

# First and last layer touch the latents themselves, the time embedding steers every block: few weights, much harm.
KEPT = ("conv_in", "conv_out", "time_embedding.")
# Sorts of layers by a part of the name; the first that fits decides.
SORTS = (
    ("time_emb", "time projections"), ("conv_in", "first and last"), ("conv_out", "first and last"),
    ("conv_shortcut", "shortcuts"), (".resnets.", "resnet convolutions"), ("samplers.", "resampling"),
    ("attn2.to_k", "text keys and values"), ("attn2.to_v", "text keys and values"), ("attn", "attention"),
    (".ff.", "feed-forward"), ("proj_", "block projections"),
)  # fmt: skip
LEAST_BITS = 2
# Time and text projections steer all that is drawn, and work once a schedule and once a prompt.
PROJECTIONS = {"time projections": 8, "text keys and values": 8}
# Sorts that get more than the least. QUALITY_NOTE
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {},
    "default": PROJECTIONS,
    "quality": {
        **PROJECTIONS, "shortcuts": 4, "resampling": 4, "block projections": 4, "attention": 4, "feed-forward": 4,
    },
}  # fmt: skip
DEFAULT = "default"


def sort_of(name: str) -> str:
    """A layer's sort."""
    return next((sort for part, sort in SORTS if part in name), "others")


def layers_to_pack(unet: nn.Module, preset: str) -> dict[str, Layout]:
    """The linear and convolution layers that a preset packs, and how each is stored."""
    chosen = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(KEPT):
            size = group_size_for(to_matrix(layer.weight).shape[1])
            if size is not None:
                chosen[name] = Layout(PRESETS[preset].get(sort_of(name), LEAST_BITS), size)
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
