"""Level `fast`: quantize a UNet without data, in seconds to minutes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint import write_packed_unet
from tinysd_batch.model.packing import PackedWeight, group_size_for, to_matrix
from tinysd_batch.quantize.affine import quantize_matrix
from tinysd_batch.quantize.folder import open_source, refuse_existing, tell_left_out, write_others
from tinysd_batch.quantize.sources import Options, Part, Say, as_stored, check_unet
from tinysd_batch.storage import new_folder, storage_errors

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
    quantize_model(source, out, Options(), lambda _: None)


def quantize_model(source: Path, out: Path, options: Options, say: Say) -> None:
    """Write `out`, a packed folder of the float model `source`: its UNet at 2 bits, the other parts as float16.

    A layer's floats are in memory at a time. `say` is told what is being done. Raises ModelError as
    `folder.convert_model` does.
    """
    refuse_existing(out)
    model = open_source(source, options)
    with storage_errors(out), new_folder(out) as folder:
        pack_unet(model.unet(), folder / "unet", say)
        write_others(model, folder, torch.float16, say)
    tell_left_out(model, say)


def pack_unet(part: Part, folder: Path, say: Say) -> None:
    unet = check_unet(part)
    check_finite(part)
    say(f"unet: packing {sum(value.numel() for value in part.tensors.values()) / 1e6:,.1f} M weights")
    packed = quantize_unet(unet, part.tensors)
    others = {
        name: as_stored(name, value, torch.float16, part.where)
        for name, value in part.tensors.items()
        if name.removesuffix(".weight") not in packed
    }
    write_packed_unet(folder, part.config, packed, others, {"level": "fast"})


def check_finite(part: Part) -> None:
    for name, tensor in part.tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{part.where}: tensor {name} is not finite")
