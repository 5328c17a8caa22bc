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
from tinysd_batch.quantize.sources.formats import open_source
from tinysd_batch.storage.atomic import create_folder_atomically
from tinysd_batch.storage.filesystem import storage_errors

DEFAULT_SIZE = SizeTarget()
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A packed layer and how far it is from its float weight."""

    weight: PackedWeight
    shape: tuple[int, ...]  # of the float weight
    sqnr_db: float  # signal to quantization noise ratio of the weight


def quantize_unet(
    unet: SourceComponent, layouts: Mapping[str, Layout], on_progress: ProgressCallback = ignore_progress
) -> dict[str, QuantizedLayer]:
    """Quantize the layers of a UNet that `layouts` names, from their float weights alone."""
    layers: dict[str, QuantizedLayer] = {}
    weights = {name: unet.tensors[f"{name}.weight"].numel() for name in layouts}
    for name in iterate_with_progress(layouts, weights, "packing", on_progress):
        weight, layout = unet.tensors[f"{name}.weight"], layouts[name]
        matrix = to_matrix(weight)
        packed = quantize_matrix(matrix, layout.group_size_in(matrix.shape[1]), layout.bits)
        sqnr_db = measure_weight_sqnr_db(matrix, packed)
        layers[name] = QuantizedLayer(packed.convert_to(layout), tuple(weight.shape), sqnr_db)
        unet.release()
    return layers


def quantize_folder(source: Path, out: Path, preset: str = DEFAULT_PRESET) -> None:
    """Write `out`, a packed copy of a float model folder in diffusers' layout, with or without `model_index.json`.

    Raises:
        ModelError: a tensor is missing, unexpected or not finite, or `out` exists.
    """
    quantize_model(source, out, SourceOptions(), lambda _: None, SizeTarget(preset))


def quantize_model(
    source: Path,
    out: Path,
    options: SourceOptions,
    on_status: StatusCallback,
    size: SizeTarget = DEFAULT_SIZE,
    recipe: Recipe | None = None,
    device: torch.device = CPU,
    on_progress: ProgressCallback = ignore_progress,
) -> QuantizationResult:
    """Write `out`, a folder with the UNet of `source` packed and its other components as float16.

    Only one layer's floats are in memory at a time.

    Args:
        source: checkpoint file or model folder with floats.
        out: the folder to write; must not exist.
        options: how to read the source.
        on_status: receives lines about what is being done.
        size: preset or maximum size of the UNet's file.
        recipe: generate its held-out prompts with the float model, to evaluate the result. The weights do not change.
        device: where the float model generates.
        on_progress: receives how many layers are packed.

    Raises:
        ModelError: as `convert.convert_model` does.
        UsageError: the size cannot be met, or memory does not suffice.
        StorageError: the disk has too little space.
    """
    started_at = time.monotonic()
    check_not_existing(out)
    model = open_source(source, options)
    component = model.unet()
    unet = check_unet_tensors(component)
    if size.max_bytes is not None:
        check_target_size(unet, size.max_bytes)
    check_available_resources(estimate_data_free_resources(unet, model, size), out, CPU)
    if recipe is not None:
        check_available_resources(estimate_generation_resources(component, recipe), out, device)
        return_freed_memory_to_os(unet, size, device)
    held_out = None
    with storage_errors(out), create_folder_atomically(out) as folder:
        sqnr_db = pack_unet(component, unet, folder / "unet", size, on_status, on_progress)
        write_other_components(model, folder, torch.float16, on_status)
        if recipe is not None:
            on_status(
                f"generating {len(recipe.held_out):,} held-out prompts in {recipe.steps} steps with the float model"
            )
            float_unet = SegmentedUNet(component.config, component.tensors, device, component.release)
            held_out = generate_held_out_trajectories(float_unet, folder, recipe)
    report_ignored_tensors(model, on_status)
    return QuantizationResult(sqnr_db, held_out, time.monotonic() - started_at)


def pack_unet(
    component: SourceComponent,
    unet: nn.Module,
    folder: Path,
    size: SizeTarget,
    on_status: StatusCallback,
    on_progress: ProgressCallback = ignore_progress,
) -> dict[str, float]:
    """Write the packed UNet, and return the SQNR in dB of each packed layer's weight."""
    check_finite(component)
    if size.max_bytes is None:
        layouts = get_preset_layouts(unet, size.preset)
    else:
        on_status("unet: measuring what each layer gains from more bits")
        layouts = allocate_bits(unet, component.tensors, size.max_bytes, on_progress=on_progress)
    on_status(f"unet: packing, {size}: {describe_size(unet, layouts)}")
    layers = quantize_unet(component, layouts, on_progress)
    other_tensors = {
        name: convert_for_storage(name, tensor, torch.float16, component.path)
        for name, tensor in component.tensors.items()
        if name.removesuffix(".weight") not in layers
    }
    packed = {name: (layer.weight, layer.shape) for name, layer in layers.items()}
    write_packed_unet(folder, component.config, packed, other_tensors, {"level": "fast", **size.to_config()})
    return {name: layer.sqnr_db for name, layer in layers.items()}


def check_finite(component: SourceComponent) -> None:
    """Raise ModelError naming the first tensor that is not finite."""
    for name, tensor in component.tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{component.path}: tensor {name} is not finite")
        component.release()
