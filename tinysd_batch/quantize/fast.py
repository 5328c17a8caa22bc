"""Level `fast`: quantize a UNet without data, in seconds to minutes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint import write_packed_unet
from tinysd_batch.model.packing import Layout, Weight, to_matrix
from tinysd_batch.quantize.affine import quantize_matrix
from tinysd_batch.quantize.allocate import allocate, check_target
from tinysd_batch.quantize.folder import open_source, refuse_existing, tell_left_out, write_others
from tinysd_batch.quantize.presets import DEFAULT, Size, layers_to_pack, size_in_words
from tinysd_batch.quantize.resources import check_room, needs_of_fast
from tinysd_batch.quantize.sources import Options, Part, Say, as_stored, check_unet
from tinysd_batch.storage import new_folder, storage_errors

SIZE = Size()


def quantize_unet(part: Part, layouts: Mapping[str, Layout]) -> dict[str, tuple[Weight, tuple[int, ...]]]:
    """Each packed layer's weight and original shape, from a UNet's float tensors."""
    found: dict[str, tuple[Weight, tuple[int, ...]]] = {}
    for name, layout in layouts.items():
        weight = part.tensors[f"{name}.weight"]
        matrix = to_matrix(weight)
        packed = quantize_matrix(matrix, layout.group_in(matrix.shape[1]), layout.bits)
        found[name] = packed.stored_as(layout), tuple(weight.shape)
        part.release()
    return found


def quantize_folder(source: Path, out: Path, preset: str = DEFAULT) -> None:
    """Write `out`, a packed copy of the float model folder `source` (diffusers' layout, `model_index.json` or not).

    Raises ModelError when a tensor is missing, unexpected or not finite, or when `out` exists.
    """
    quantize_model(source, out, Options(), lambda _: None, Size(preset))


def quantize_model(source: Path, out: Path, options: Options, say: Say, size: Size = SIZE) -> None:
    """Write `out`, a packed folder of the float model `source`: its UNet packed, the other parts as float16.

    A layer's floats are in memory at a time. `say` is told what is being done. Raises ModelError as
    `folder.convert_model` does, and UsageError for a size that cannot be met.
    """
    refuse_existing(out)
    model = open_source(source, options)
    part = model.unet()
    unet = check_unet(part)
    if size.most is not None:
        check_target(unet, size.most)
    check_room(needs_of_fast(unet, model, size), out, torch.device("cpu"))
    with storage_errors(out), new_folder(out) as folder:
        pack_unet(part, unet, folder / "unet", size, say)
        write_others(model, folder, torch.float16, say)
    tell_left_out(model, say)


def pack_unet(part: Part, unet: nn.Module, folder: Path, size: Size, say: Say) -> None:
    check_finite(part)
    layouts = layers_to_pack(unet, size.preset) if size.most is None else allocate(unet, part.tensors, size.most)
    say(f"unet: packing, {size}: {size_in_words(unet, layouts)}")
    packed = quantize_unet(part, layouts)
    others = {
        name: as_stored(name, value, torch.float16, part.where)
        for name, value in part.tensors.items()
        if name.removesuffix(".weight") not in packed
    }
    write_packed_unet(folder, part.config, packed, others, {"level": "fast", **size.notes()})


def check_finite(part: Part) -> None:
    for name, tensor in part.tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{part.where}: tensor {name} is not finite")
        part.release()
