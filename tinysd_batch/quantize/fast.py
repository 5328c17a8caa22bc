"""Level `fast`: quantize a UNet without data, in seconds to minutes."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint import (
    KEEP_ON_META,
    PIPELINE_INDEX,
    check_names,
    read_tensors,
    write_packed_unet,
    write_pipeline_index,
)
from tinysd_batch.model.info import WEIGHTS, read_json
from tinysd_batch.model.packing import PackedWeight, group_size_for, to_matrix
from tinysd_batch.quantize.affine import quantize_matrix

# First and last layer touch the latents themselves, the time embedding steers every block: few weights, much harm.
KEPT = ("conv_in", "conv_out", "time_embedding.")


def layers_to_pack(unet: nn.Module) -> dict[str, int]:
    """The linear and convolution layers that go to 2 bits, and the group size of each."""
    chosen = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(KEPT):
            size = group_size_for(to_matrix(layer.weight).shape[1])
            if size is not None:
                chosen[name] = size
    return chosen


def quantize_unet(unet: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[PackedWeight, tuple[int, ...]]]:
    """Each packed layer's weight and original shape, from the UNet (for its structure) and its float tensors."""
    return {
        name: (quantize_matrix(to_matrix(tensors[f"{name}.weight"]), size), tuple(tensors[f"{name}.weight"].shape))
        for name, size in layers_to_pack(unet).items()
    }


def quantize_folder(source: Path, out: Path) -> None:
    """Write `out`, a packed copy of the float model folder `source` (diffusers' layout, `model_index.json` or not).

    Raises ModelError when a tensor is missing, unexpected or not finite, or when `out` exists.
    """
    if out.exists():
        raise ModelError(f"{out}: exists; name a folder that does not")
    config = read_json(source / "unet" / "config.json")
    tensors = read_tensors(source / "unet" / WEIGHTS)
    with KEEP_ON_META:
        unet = UNet2DConditionModel.from_config(config)
    check_names(unet, tensors, source / "unet" / WEIGHTS)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{source}: tensor {name} is not finite")
    packed = quantize_unet(unet, tensors)
    others = {name: value.half() for name, value in tensors.items() if name.removesuffix(".weight") not in packed}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("unet"))
    write_packed_unet(out / "unet", config, packed, others, {"level": "fast"})
    if not (out / PIPELINE_INDEX).exists():
        write_pipeline_index(out)
