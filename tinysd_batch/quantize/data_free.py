"""Level `fast`: quantize a UNet without data, in seconds to minutes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.folder import write_packed_unet
from tinysd_batch.model.packed.format import Layout, PackedWeight, to_matrix
from tinysd_batch.quantize.bit_allocation import allocate_bits, check_target_size
from tinysd_batch.quantize.calibration.trajectories import generate_held_out_trajectories
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.convert import check_not_existing, report_ignored_tensors, write_other_components
from tinysd_batch.quantize.estimate.memory import (
    check_available_resources,
    estimate_data_free_resources,
    estimate_generation_resources,
    return_freed_memory_to_os,
)
from tinysd_batch.quantize.evaluate.summary import QuantizationResult
from tinysd_batch.quantize.layer_progress import ProgressCallback, ignore_progress, iterate_with_progress
from tinysd_batch.quantize.presets import DEFAULT_PRESET, SizeTarget, describe_size, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.affine import measure_weight_sqnr_db, quantize_matrix
from tinysd_batch.quantize.sources.checkpoint_source import (
    SourceComponent,
    SourceOptions,
    StatusCallback,
    check_unet_tensors,
    convert_for_storage,
)
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.storage.atomic import create_folder_atomically, storage_errors

DEFAULT_SIZE = SizeTarget()
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A layer."""

    weight: PackedWeight
    shape: tuple[int, ...]  # of the float weight
    sqnr_db: float  # of the weights


def quantize_unet(
    part: SourceComponent, layouts: Mapping[str, Layout], on_layers: ProgressCallback = ignore_progress
) -> dict[str, QuantizedLayer]:
    """Each layer, from a UNet's float tensors."""
    found: dict[str, QuantizedLayer] = {}
    weights = {name: part.tensors[f"{name}.weight"].numel() for name in layouts}
    for name in iterate_with_progress(layouts, weights, "packing", on_layers):
        weight, layout = part.tensors[f"{name}.weight"], layouts[name]
        matrix = to_matrix(weight)
        packed = quantize_matrix(matrix, layout.group_size_in(matrix.shape[1]), layout.bits)
        found[name] = QuantizedLayer(
            packed.convert_to(layout), tuple(weight.shape), measure_weight_sqnr_db(matrix, packed)
        )
        part.release()
    return found


def quantize_folder(source: Path, out: Path, preset: str = DEFAULT_PRESET) -> None:
    """Write `out`, a packed copy of the float model folder `source` (diffusers' layout, `model_index.json` or not).

    Raises ModelError when a tensor is missing, unexpected or not finite, or when `out` exists.
    """
    quantize_model(source, out, SourceOptions(), lambda _: None, SizeTarget(preset))


def quantize_model(
    source: Path, out: Path, options: SourceOptions, say: StatusCallback, size: SizeTarget = DEFAULT_SIZE, recipe: Recipe | None = None,
    device: torch.device = CPU, on_layers: ProgressCallback = ignore_progress,
) -> QuantizationResult:  # fmt: skip
    """Write `out`, a packed folder of the float model `source`: its UNet packed, the other parts as float16.

    A layer's floats are in memory at a time. A `recipe` changes nothing of that: its held-out prompts are drawn by the
    float model on `device`, to measure with. `say` is told what is being done, `on_layers` how far packing is.
    Raises ModelError as `folder.convert_model` does, and UsageError for a size that cannot be met.
    """
    started = time.monotonic()
    check_not_existing(out)
    model = open_source(source, options)
    part = model.unet()
    unet = check_unet_tensors(part)
    if size.max_bytes is not None:
        check_target_size(unet, size.max_bytes)
    check_available_resources(estimate_data_free_resources(unet, model, size), out, CPU)
    if recipe is not None:
        check_available_resources(estimate_generation_resources(part, recipe), out, device)
        return_freed_memory_to_os(unet, size, device)
    held_out = None
    with storage_errors(out), create_folder_atomically(out) as folder:
        layers = pack_unet(part, unet, folder / "unet", size, say, on_layers)
        write_other_components(model, folder, torch.float16, say)
        if recipe is not None:
            say(f"drawing {len(recipe.held_out):,} held-out prompts in {recipe.steps} steps by the float model")
            held_out = generate_held_out_trajectories(
                SegmentedUNet(part.config, part.tensors, device, part.release), folder, recipe
            )
    report_ignored_tensors(model, say)
    return QuantizationResult(layers, held_out, time.monotonic() - started)


def pack_unet(
    part: SourceComponent,
    unet: nn.Module,
    folder: Path,
    size: SizeTarget,
    say: StatusCallback,
    on_layers: ProgressCallback = ignore_progress,
) -> dict[str, float]:
    """Write the UNet; the SQNR in dB of each packed layer's weights is returned."""
    check_finite(part)
    if size.max_bytes is None:
        layouts = get_preset_layouts(unet, size.preset)
    else:
        say("unet: measuring what more bits gain each layer")
        layouts = allocate_bits(unet, part.tensors, size.max_bytes, on_layers=on_layers)
    say(f"unet: packing, {size}: {describe_size(unet, layouts)}")
    packed = quantize_unet(part, layouts, on_layers)
    others = {
        name: convert_for_storage(name, value, torch.float16, part.path)
        for name, value in part.tensors.items()
        if name.removesuffix(".weight") not in packed
    }
    stored = {name: (one.weight, one.shape) for name, one in packed.items()}
    write_packed_unet(folder, part.config, stored, others, {"level": "fast", **size.to_config()})
    return {name: one.sqnr_db for name, one in packed.items()}


def check_finite(part: SourceComponent) -> None:
    for name, tensor in part.tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{part.path}: tensor {name} is not finite")
        part.release()
