"""A file of a wanted size: from 2 bits in whole rows, layers get more where that pays most for its bytes."""

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

SAMPLED_WEIGHTS = 2**16  # weights of a layer that its errors are told from
# The error of what the UNet says over a layer's relative error, by sort and level (the last for all further in), as
# `python -m benchmarks.quantize.layer_sensitivity` prints them for the embedded model.
SENSITIVITY_BY_LAYER_TYPE = {
    "attention": (0.0018, 0.0018, 0.0004), "block projections": (0.0114, 0.0114, 0.0033),
    "feed-forward": (0.0086, 0.0086, 0.0051), "resampling": (0.0194, 0.0291, 0.0172),
    "resnet convolutions": (0.0201, 0.0111, 0.0021), "shortcuts": (0.1844, 0.0270, 0.0042),
    "text keys and values": (0.0012, 0.0012, 0.0007), "time projections": (0.0023, 0.0023, 0.0023),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayoutCandidate:
    """A way to store a layer."""

    layout: Layout
    nbytes: int
    error: float  # that it adds to what the UNet says


def check_target_size(unet: nn.Module, target: int, widest: int | None = None) -> None:
    """Raise UsageError, with the least possible, where no file is so small."""
    least = compute_unet_bytes(unet, select_smallest_layouts(unet, widest))
    if target < least:
        raise UsageError(
            f"--target-size {target / 1e6:,.1f} MB: for this UNet at least {least / 1e6:,.1f} MB are needed"
        )


def allocate_bits(
    unet: nn.Module, tensors: Mapping[str, Tensor], target: int, inputs: Iterable[tuple[str, Tensor]] | None = None,
    widest: int | None = None, on_layers: ProgressCallback = ignore_progress,
) -> dict[str, Layout]:  # fmt: skip
    """The layouts of a file of at most `target` bytes.

    Layers' errors are told from their weights (`tensors`), or with `inputs`, tokens [N, K] of each layer in the float
    model, from their outputs; both weighed by HARM. Rows of over `widest` weights, which calibration takes apart, keep
    the groups that allow it.
    """
    names, levels = list(get_preset_layouts(unet, SMALLEST_PRESET)), count_block_levels(unet)
    weights = {name: tensors[f"{name}.weight"].numel() for name in names}
    unseen = ((name, None) for name in iterate_with_progress(names, weights, "measuring", on_layers))
    given = unseen if inputs is None else inputs
    choices = {
        name: list_layout_candidates(name, levels, to_matrix(tensors[f"{name}.weight"]), x, widest) for name, x in given
    }
    return select_layouts(unet, {name: choices[name] for name in names}, target)


def select_smallest_layouts(unet: nn.Module, widest: int | None = None) -> dict[str, Layout]:
    """The layouts of the smallest file that there can be."""
    names = get_preset_layouts(unet, SMALLEST_PRESET)
    return {name: list_layouts(to_matrix(get_layer(unet, name).weight).shape[1], widest)[0] for name in names}


def list_layout_candidates(
    name: str, levels: int, weight: Tensor, x: Tensor | None, widest: int | None = None
) -> list[LayoutCandidate]:
    """The ways to store a layer's weight [O, K], smallest first, with errors told from some of its rows."""
    rows = weight[:: max(1, weight.numel() // SAMPLED_WEIGHTS)].float()
    harms = SENSITIVITY_BY_LAYER_TYPE.get(get_layer_type(name), SENSITIVITY_BY_LAYER_TYPE["feed-forward"])
    harm = harms[min(get_block_level(name, levels), len(harms) - 1)]
    return [
        LayoutCandidate(layout, layout.nbytes(*weight.shape), harm * measure_quantization_error(rows, layout, x))
        for layout in list_layouts(weight.shape[1], widest)
    ]


def list_layouts(columns: int, widest: int | None = None) -> list[Layout]:
    """2 bits in whole rows and in groups of every size that divides one, then 4 and 8 bits in the largest usual."""
    usual = choose_group_size(columns)
    assert usual is not None, columns
    apart = widest is not None and columns > widest
    largest = MAX_DEFAULT_GROUP_SIZE if apart else columns - 1
    return [
        *([] if apart else [Layout(SUPPORTED_BITS[0], WHOLE_ROW)]),
        *(Layout(SUPPORTED_BITS[0], size) for size in GROUP_SIZES if size <= largest and columns % size == 0),
        *(Layout(bits, usual) for bits in SUPPORTED_BITS[1:]),
    ]


def measure_quantization_error(rows: Tensor, layout: Layout, x: Tensor | None) -> float:
    """Of rows [O, K] of a weight, or of what they make of tokens [N, K], as a share of its power."""
    packed = quantize_matrix(rows, layout.group_size_in(rows.shape[1]), layout.bits)
    wrong = dequantize(packed, torch.empty(packed.shape)) - rows
    if x is not None:
        rows, wrong = x @ rows.T, x @ wrong.T
    return float(wrong.square().sum() / rows.square().sum().clamp(min=1e-20))


def select_layouts(unet: nn.Module, choices: Mapping[str, Sequence[LayoutCandidate]], target: int) -> dict[str, Layout]:
    """Each layer's choice: the first, then larger ones by the error they save per byte, while the file stays small."""
    chosen = dict.fromkeys(choices, 0)
    size = compute_unet_bytes(unet, collect_selected_layouts(choices, chosen))
    steps = [step for name in choices if (step := find_best_upgrade(name, choices[name], 0))]
    heapq.heapify(steps)
    made: list[tuple[str, int]] = []
    while steps:
        _, name, to = heapq.heappop(steps)
        grown = size + choices[name][to].nbytes - choices[name][chosen[name]].nbytes
        if grown <= target:
            made.append((name, chosen[name]))
            chosen[name], size = to, grown
            if step := find_best_upgrade(name, choices[name], to):
                heapq.heappush(steps, step)
    while (
        made and compute_unet_bytes(unet, collect_selected_layouts(choices, chosen)) > target
    ):  # longer numbers in the file's header
        name, before = made.pop()
        chosen[name] = before
    return collect_selected_layouts(choices, chosen)


def find_best_upgrade(name: str, choices: Sequence[LayoutCandidate], at: int) -> tuple[float, str, int] | None:
    """Its gain per byte, negative, the layer, and which larger choice; None where none is better."""
    now = choices[at]
    gains = [
        ((one.error - now.error) / (one.nbytes - now.nbytes), name, to)
        for to, one in enumerate(choices[at + 1 :], at + 1)
        if one.error < now.error
    ]
    return min(gains, default=None)


def collect_selected_layouts(
    choices: Mapping[str, Sequence[LayoutCandidate]], chosen: Mapping[str, int]
) -> dict[str, Layout]:
    return {name: choices[name][at].layout for name, at in chosen.items()}
