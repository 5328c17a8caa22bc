"""Meet a target size: start with 2 bits and whole rows, then give layers more bits where that gains most per byte."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinysd_batch.errors import UsageError
from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import (
    GROUP_SIZES,
    MAX_DEFAULT_GROUP_SIZE,
    SUPPORTED_BITS,
    WHOLE_ROW,
    Layout,
    choose_group_size,
    to_matrix,
)
from tinysd_batch.quantize.layer_progress import ProgressCallback, ignore_progress, iterate_with_progress
from tinysd_batch.quantize.layers import get_layer
from tinysd_batch.quantize.presets import (
    SMALLEST_PRESET,
    compute_unet_bytes,
    count_block_levels,
    get_block_level,
    get_layer_type,
    get_preset_layouts,
)
from tinysd_batch.quantize.solve.affine import quantize_matrix

SAMPLED_WEIGHTS = 2**16  # weights of a layer from which its error is estimated
# Error of the UNet's output per relative error of a layer, by layer type and block level (the last one for all inner
# levels), as `python -m benchmarks.quantize.layer_sensitivity` prints it for the embedded model.
SENSITIVITY_BY_LAYER_TYPE = {
    "attention": (0.0018, 0.0018, 0.0004),
    "block projections": (0.0114, 0.0114, 0.0033),
    "feed-forward": (0.0086, 0.0086, 0.0051),
    "resampling": (0.0194, 0.0291, 0.0172),
    "resnet convolutions": (0.0201, 0.0111, 0.0021),
    "shortcuts": (0.1844, 0.0270, 0.0042),
    "text keys and values": (0.0012, 0.0012, 0.0007),
    "time projections": (0.0023, 0.0023, 0.0023),
}


@dataclass(frozen=True, slots=True)
class LayoutCandidate:
    """One layout in which a layer can be stored."""

    layout: Layout
    nbytes: int
    error: float  # estimated error of the UNet's output that it adds


def check_target_size(unet: nn.Module, target_bytes: int, max_columns: int | None = None) -> None:
    """Raise UsageError, which names the smallest possible size, if no file is that small."""
    min_bytes = compute_unet_bytes(unet, select_smallest_layouts(unet, max_columns))
    if target_bytes < min_bytes:
        raise UsageError(
            f"--target-size {target_bytes / 1e6:,.1f} MB: for this UNet at least {min_bytes / 1e6:,.1f} MB are needed"
        )


def allocate_bits(
    unet: nn.Module,
    tensors: Mapping[str, Tensor],
    target_bytes: int,
    inputs: Iterable[tuple[str, Tensor]] | None = None,
    max_columns: int | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> dict[str, Layout]:
    """Choose the layouts for a file of at most `target_bytes`.

    The error of each layout is that of the layer's weights or, with `inputs`, that of its outputs, times the layer's
    sensitivity (`SENSITIVITY_BY_LAYER_TYPE`).

    Args:
        unet: may be on the meta device.
        tensors: the UNet's float tensors.
        target_bytes: maximum size of the UNet's file.
        inputs: each layer's name and its inputs [N, K] in the float model.
        max_columns: layers with more columns are calibrated in parts and keep a group size that allows it.
        on_progress: called as layers are measured without `inputs`.
    """
    names, levels = list(get_preset_layouts(unet, SMALLEST_PRESET)), count_block_levels(unet)
    weights = {name: tensors[f"{name}.weight"].numel() for name in names}
    without_inputs = ((name, None) for name in iterate_with_progress(names, weights, "measuring", on_progress))
    candidates = {
        name: list_layout_candidates(name, levels, to_matrix(tensors[f"{name}.weight"]), x, max_columns)
        for name, x in (without_inputs if inputs is None else inputs)
    }
    return select_layouts(unet, {name: candidates[name] for name in names}, target_bytes)


def select_smallest_layouts(unet: nn.Module, max_columns: int | None = None) -> dict[str, Layout]:
    """Return the layouts of the smallest possible file."""
    names = get_preset_layouts(unet, SMALLEST_PRESET)
    return {name: list_layouts(to_matrix(get_layer(unet, name).weight).shape[1], max_columns)[0] for name in names}


def list_layout_candidates(
    name: str, levels: int, weight: Tensor, x: Tensor | None, max_columns: int | None = None
) -> list[LayoutCandidate]:
    """List the layouts for a layer's weight [O, K], smallest first, with errors estimated from some of its rows.

    Args:
        name: of the layer.
        levels: number of the UNet's block levels.
        weight: float weight [O, K].
        x: inputs of the layer [N, K]; None measures the error of the weight itself.
        max_columns: as in `allocate_bits`.
    """
    rows = weight[:: max(1, weight.numel() // SAMPLED_WEIGHTS)].float()
    by_level = SENSITIVITY_BY_LAYER_TYPE.get(get_layer_type(name), SENSITIVITY_BY_LAYER_TYPE["feed-forward"])
    sensitivity = by_level[min(get_block_level(name, levels), len(by_level) - 1)]
    return [
        LayoutCandidate(layout, layout.nbytes(*weight.shape), sensitivity * measure_quantization_error(rows, layout, x))
        for layout in list_layouts(weight.shape[1], max_columns)
    ]


def list_layouts(columns: int, max_columns: int | None = None) -> list[Layout]:
    """List 2 bits with whole rows and with every group size that divides a row, then 4 and 8 bits with the default."""
    default_group_size = choose_group_size(columns)
    assert default_group_size is not None, columns
    is_split = max_columns is not None and columns > max_columns
    max_group_size = MAX_DEFAULT_GROUP_SIZE if is_split else columns - 1
    return [
        *([] if is_split else [Layout(SUPPORTED_BITS[0], WHOLE_ROW)]),
        *(Layout(SUPPORTED_BITS[0], size) for size in GROUP_SIZES if size <= max_group_size and columns % size == 0),
        *(Layout(bits, default_group_size) for bits in SUPPORTED_BITS[1:]),
    ]


def measure_quantization_error(rows: Tensor, layout: Layout, x: Tensor | None) -> float:
    """Measure the squared error of quantized rows [O, K], or of their outputs for inputs [N, K], over the power."""
    packed = quantize_matrix(rows, layout.group_size_in(rows.shape[1]), layout.bits)
    error = dequantize(packed, torch.empty(packed.shape)) - rows
    if x is not None:
        rows, error = x @ rows.T, x @ error.T
    return float(error.square().sum() / rows.square().sum().clamp(min=1e-20))


def select_layouts(
    unet: nn.Module, candidates: Mapping[str, Sequence[LayoutCandidate]], target_bytes: int
) -> dict[str, Layout]:
    """Select a layout per layer greedily: start with the smallest, then upgrade by error saved per added byte."""
    selected = dict.fromkeys(candidates, 0)
    size_bytes = compute_unet_bytes(unet, collect_selected_layouts(candidates, selected))
    upgrades = [upgrade for name in candidates if (upgrade := find_best_upgrade(name, candidates[name], 0))]
    heapq.heapify(upgrades)
    applied: list[tuple[str, int]] = []  # layer and its candidate before
    while upgrades:
        _, name, index = heapq.heappop(upgrades)
        new_bytes = size_bytes + candidates[name][index].nbytes - candidates[name][selected[name]].nbytes
        if new_bytes <= target_bytes:
            applied.append((name, selected[name]))
            selected[name], size_bytes = index, new_bytes
            if upgrade := find_best_upgrade(name, candidates[name], index):
                heapq.heappush(upgrades, upgrade)
    # Larger numbers may have made the file's header longer.
    while applied and compute_unet_bytes(unet, collect_selected_layouts(candidates, selected)) > target_bytes:
        name, index = applied.pop()
        selected[name] = index
    return collect_selected_layouts(candidates, selected)


def find_best_upgrade(name: str, candidates: Sequence[LayoutCandidate], index: int) -> tuple[float, str, int] | None:
    """Find the larger candidate that saves most error per added byte.

    Returns:
        Change of the error per byte (negative), name of the layer, index of the candidate; None if none is better.
    """
    current = candidates[index]
    upgrades = [
        ((candidate.error - current.error) / (candidate.nbytes - current.nbytes), name, new_index)
        for new_index, candidate in enumerate(candidates[index + 1 :], index + 1)
        if candidate.error < current.error
    ]
    return min(upgrades, default=None)


def collect_selected_layouts(
    candidates: Mapping[str, Sequence[LayoutCandidate]], selected: Mapping[str, int]
) -> dict[str, Layout]:
    return {name: candidates[name][index].layout for name, index in selected.items()}
