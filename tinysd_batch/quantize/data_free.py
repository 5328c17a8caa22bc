"""Level `fast`: quantize a UNet without data, in seconds to minutes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.folder import write_packed_unet
from tinysd_batch.model.packed.format import Layout, Weight, to_matrix
from tinysd_batch.quantize.bit_allocation import allocate, check_target
from tinysd_batch.quantize.calibration.trajectories import draw_held_out
from tinysd_batch.quantize.calibration.unet_segments import Walker
from tinysd_batch.quantize.convert import refuse_existing, tell_left_out, write_others
from tinysd_batch.quantize.estimate.memory import check_room, hand_back_memory, needs_of_drawing, needs_of_fast
from tinysd_batch.quantize.evaluate.summary import Made
from tinysd_batch.quantize.layer_progress import OnLayers, ignore_layers, watched
from tinysd_batch.quantize.presets import DEFAULT, Size, layers_to_pack, size_in_words
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.affine import quantize_matrix, weights_sqnr_db
from tinysd_batch.quantize.sources.checkpoint_source import Options, Part, Say, as_stored, check_unet
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.storage.atomic import new_folder, storage_errors

SIZE = Size()
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Packed:
    """A layer."""

    weight: Weight
    shape: tuple[int, ...]  # of the float weight
    sqnr_db: float  # of the weights


def quantize_unet(part: Part, layouts: Mapping[str, Layout], on_layers: OnLayers = ignore_layers) -> dict[str, Packed]:
    """Each layer, from a UNet's float tensors."""
    found: dict[str, Packed] = {}
    weights = {name: part.tensors[f"{name}.weight"].numel() for name in layouts}
    for name in watched(layouts, weights, "packing", on_layers):
        weight, layout = part.tensors[f"{name}.weight"], layouts[name]
        matrix = to_matrix(weight)
        packed = quantize_matrix(matrix, layout.group_in(matrix.shape[1]), layout.bits)
        found[name] = Packed(packed.stored_as(layout), tuple(weight.shape), weights_sqnr_db(matrix, packed))
        part.release()
    return found


def quantize_folder(source: Path, out: Path, preset: str = DEFAULT) -> None:
    """Write `out`, a packed copy of the float model folder `source` (diffusers' layout, `model_index.json` or not).

    Raises ModelError when a tensor is missing, unexpected or not finite, or when `out` exists.
    """
    quantize_model(source, out, Options(), lambda _: None, Size(preset))


def quantize_model(
    source: Path, out: Path, options: Options, say: Say, size: Size = SIZE, recipe: Recipe | None = None,
    device: torch.device = CPU, on_layers: OnLayers = ignore_layers,
) -> Made:  # fmt: skip
    """Write `out`, a packed folder of the float model `source`: its UNet packed, the other parts as float16.

    A layer's floats are in memory at a time. A `recipe` changes nothing of that: its held-out prompts are drawn by the
    float model on `device`, to measure with. `say` is told what is being done, `on_layers` how far packing is.
    Raises ModelError as `folder.convert_model` does, and UsageError for a size that cannot be met.
    """
    started = time.monotonic()
    refuse_existing(out)
    model = open_source(source, options)
    part = model.unet()
    unet = check_unet(part)
    if size.most is not None:
        check_target(unet, size.most)
    check_room(needs_of_fast(unet, model, size), out, CPU)
    if recipe is not None:
        check_room(needs_of_drawing(part, recipe), out, device)
        hand_back_memory(unet, size, device)
    held_out = None
    with storage_errors(out), new_folder(out) as folder:
        layers = pack_unet(part, unet, folder / "unet", size, say, on_layers)
        write_others(model, folder, torch.float16, say)
        if recipe is not None:
            say(f"drawing {len(recipe.held_out):,} held-out prompts in {recipe.steps} steps by the float model")
            held_out = draw_held_out(Walker(part.config, part.tensors, device, part.release), folder, recipe)
    tell_left_out(model, say)
    return Made(layers, held_out, time.monotonic() - started)


def pack_unet(
    part: Part, unet: nn.Module, folder: Path, size: Size, say: Say, on_layers: OnLayers = ignore_layers
) -> dict[str, float]:
    """Write the UNet; the SQNR in dB of each packed layer's weights is returned."""
    check_finite(part)
    if size.most is None:
        layouts = layers_to_pack(unet, size.preset)
    else:
        say("unet: measuring what more bits gain each layer")
        layouts = allocate(unet, part.tensors, size.most, on_layers=on_layers)
    say(f"unet: packing, {size}: {size_in_words(unet, layouts)}")
    packed = quantize_unet(part, layouts, on_layers)
    others = {
        name: as_stored(name, value, torch.float16, part.where)
        for name, value in part.tensors.items()
        if name.removesuffix(".weight") not in packed
    }
    stored = {name: (one.weight, one.shape) for name, one in packed.items()}
    write_packed_unet(folder, part.config, stored, others, {"level": "fast", **size.notes()})
    return {name: one.sqnr_db for name, one in packed.items()}


def check_finite(part: Part) -> None:
    for name, tensor in part.tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{part.where}: tensor {name} is not finite")
        part.release()
