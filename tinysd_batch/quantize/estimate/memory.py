"""Memory and disk that quantizing takes, told from shapes before it starts, and whether they are there."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from tinysd_batch.errors import StorageError, UsageError
from tinysd_batch.model.checkpoint.folder import META_DEVICE
from tinysd_batch.model.checkpoint.info import SMALL_UNET_BYTES
from tinysd_batch.model.device.available_memory import get_available_memory_bytes
from tinysd_batch.model.device.malloc import set_mmap_threshold
from tinysd_batch.model.nn.chunked_attention import ChunkedAttnProcessor
from tinysd_batch.model.offload.peak_memory import PeakMemoryTracker
from tinysd_batch.model.offload.planner import UNET_MMAP_THRESHOLD_BYTES
from tinysd_batch.quantize.calibration.layerwise import EVALUATION_TOKENS
from tinysd_batch.quantize.calibration.unet_segments import ForwardState, SegmentedUNet, segment_batch_size
from tinysd_batch.quantize.layers import LinearOrConv, get_layer
from tinysd_batch.quantize.presets import SMALLEST_PRESET, SizeTarget, compute_unet_bytes, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import CheckpointSource, SourceComponent

FLOAT32_BYTES, FLOAT16_BYTES = 4, 2  # bytes
FLOAT16_STATES_ABOVE_BYTES = 1e9  # bytes of states: more are kept as float16 between two units
HESSIAN_COPIES = 3  # of a part's Hessian beside it: a factor, its inverse and one that is being made
RECORDED_MAP_COPIES = 3  # times a unit's maps: two UNets', and some in the order of tokens
SOLVER_MATRIX_COPIES = 2  # of a layer while it is solved: its weights in order and its codes
DATA_FREE_FLOAT_COPIES = 4  # float copies of a layer that is packed without data
HELD_OUT_POINTS = 1  # of each held-out trajectory, to measure layers with
CONTEXT_TOKENS = 77
SMALLER_RECIPE_ADVICE = "; a recipe with fewer prompts or points, or a smaller block or batch, needs less"


@dataclass(frozen=True, slots=True)
class ResourceEstimate:
    """Bytes, beside the program itself."""

    memory_bytes: int
    disk_bytes: int
    advice: str = ""  # for machines with less memory

    def __str__(self) -> str:
        return f"some {format_megabytes(self.memory_bytes)} of memory beside the program itself and {format_megabytes(self.disk_bytes)} of disk"


def format_megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def check_available_resources(needs: ResourceEstimate, out: Path, device: torch.device) -> None:
    """Raise UsageError where the device has too little memory, StorageError where OUT's disk is too small."""
    there = get_available_memory_bytes(device)
    if there is not None and there < needs.memory_bytes:
        raise UsageError(
            f"quantizing needs some {format_megabytes(needs.memory_bytes)} of memory, {format_megabytes(there)} are available{needs.advice}"
        )
    holder = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(holder).free) < needs.disk_bytes:
        raise StorageError(
            f"{out}: needs some {format_megabytes(needs.disk_bytes)} of disk, {format_megabytes(free)} are free"
        )


def estimate_unet_file_bytes(unet: nn.Module, size: SizeTarget) -> int:
    """Of the UNet's file."""
    return compute_unet_bytes(unet, get_preset_layouts(unet, size.preset)) if size.max_bytes is None else size.max_bytes


def estimate_other_files_bytes(source: CheckpointSource) -> int:
    """Of the other parts' files."""
    parts = (source.vae(), source.text_encoder())
    return sum(FLOAT16_BYTES * one.numel() for part in parts for one in part.tensors.values())


def return_freed_memory_to_os(unet: nn.Module, size: SizeTarget, device: torch.device) -> None:
    """On the CPU have maps and weights of models that are not small leave memory as soon as they are free.

    Otherwise glibc's heap keeps gigabytes of them while units of SD v1's size take turns. Holds for the whole process.
    """
    if device.type == "cpu" and estimate_unet_file_bytes(unet, size) >= SMALL_UNET_BYTES:
        set_mmap_threshold(UNET_MMAP_THRESHOLD_BYTES)


def estimate_data_free_resources(unet: nn.Module, source: CheckpointSource, size: SizeTarget) -> ResourceEstimate:
    """All packed layers are in memory at last, and the floats of one."""
    largest = max(get_layer(unet, name).weight.numel() for name in get_preset_layouts(unet, SMALLEST_PRESET))
    packed = estimate_unet_file_bytes(unet, size)
    return ResourceEstimate(
        packed + DATA_FREE_FLOAT_COPIES * FLOAT32_BYTES * largest, packed + estimate_other_files_bytes(source)
    )


# Calibration


@dataclass(frozen=True, slots=True)
class SegmentMemory:
    """What a row takes at a unit of the UNet, told from a walk without numbers, in floats."""

    state_floats: int  # while it waits before the unit or after it, the larger
    activation_floats: int  # besides, while it passes
    weight_floats: int  # of the unit
    layers: list[LinearOrConv]  # that may be packed


def trace_segment_memory(part: SourceComponent) -> list[SegmentMemory]:
    walker = SegmentedUNet(part.config, {}, META_DEVICE)
    walker.unet.set_attn_processor(ChunkedAttnProcessor(fused=True))  # counts no scores, as torch's kernels hold none
    config, unet = walker.unet.config, walker.unet
    latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    context = torch.empty(1, 8, config.cross_attention_dim, device="meta")
    state = ForwardState.from_inputs(latents, torch.empty(1, device="meta"), context)
    places, names = [], list(get_preset_layouts(unet, SMALLEST_PRESET))
    for unit in walker.segments:
        before = state.nbytes()
        with META_DEVICE, torch.no_grad(), PeakMemoryTracker() as live:
            live.exclude([*unet.parameters(), state.hidden_states, *state.skips])
            unit.run(unet, state)
        layers = [get_layer(unet, name) for name in names if unit.contains(name)]
        weights = sum(layer.weight.numel() for layer in layers)
        places.append(
            SegmentMemory(
                max(before, state.nbytes()) // FLOAT32_BYTES, live.peak_bytes // FLOAT32_BYTES, weights, layers
            )
        )
    return places


def largest_state_floats(places: Sequence[SegmentMemory]) -> int:
    return max(place.state_floats for place in places)


def count_unet_inputs(recipe: Recipe) -> int:
    """Calls of the UNet, with text and without."""
    return 2 * recipe.points * len(recipe.prompts) + 2 * HELD_OUT_POINTS * len(recipe.held_out)


def choose_state_dtype(part: SourceComponent, recipe: Recipe) -> torch.dtype:
    """In which the rows wait between two units of the UNet."""
    return (
        torch.float16
        if 2 * count_unet_inputs(recipe) * FLOAT32_BYTES * largest_state_floats(trace_segment_memory(part))
        > FLOAT16_STATES_ABOVE_BYTES
        else torch.float32
    )


def estimate_trajectory_bytes(part: SourceComponent, recipe: Recipe, prompts: int) -> int:
    """Of trajectories: what the UNet was given, and what it said with the text and without."""
    return 3 * FLOAT32_BYTES * recipe.steps * prompts * make_meta_latents(part).numel()


def make_meta_latents(part: SourceComponent) -> Tensor:
    """A row's, [1, 4, h, w], without numbers."""
    channels, side = part.config["in_channels"], part.config["sample_size"]
    return torch.empty(1, channels, side, side, device="meta")


def estimate_generation_resources(part: SourceComponent, recipe: Recipe) -> ResourceEstimate:
    """The held-out prompts' states between two units of the UNet, and a unit's floats."""
    places, count = trace_segment_memory(part), len(recipe.held_out)
    return ResourceEstimate(
        estimate_generation_bytes(part, places, count) + estimate_trajectory_bytes(part, recipe, count),
        0,
        SMALLER_RECIPE_ADVICE,
    )


def estimate_generation_bytes(part: SourceComponent, places: Sequence[SegmentMemory], prompts: int) -> int:
    """The prompts' states, with text and without, and at a unit its floats, as they are made, and some rows' maps."""
    together = segment_batch_size(make_meta_latents(part))
    return FLOAT32_BYTES * max(
        2 * prompts * one.state_floats + 2 * one.weight_floats + together * one.activation_floats for one in places
    )


def estimate_distillation_bytes(part: SourceComponent, recipe: Recipe) -> int:
    """What a step of tuning takes: a batch's activations and gradients, told from one without numbers; and weights.

    Those are there as codes, as floats, and as floats in the order of convolutions.
    """
    with META_DEVICE, PeakMemoryTracker() as live:
        unet = UNet2DConditionModel.from_config(dict(part.config)).eval()
        unet.set_attn_processor(AttnProcessor())
        config, rows = unet.config, recipe.batch
        latents = torch.empty(rows, config.in_channels, config.sample_size, config.sample_size)
        context = torch.empty(rows, CONTEXT_TOKENS, config.cross_attention_dim)
        unet(latents, torch.empty(rows), context).sample.square().mean().backward()
    weights = sum(one.numel() for one in unet.parameters())
    return int(live.peak_bytes + (1 + 2 * FLOAT32_BYTES) * weights)


def estimate_calibration_resources(
    part: SourceComponent,
    unet: nn.Module,
    source: CheckpointSource,
    size: SizeTarget,
    recipe: Recipe,
    *,
    tune: bool = False,
) -> ResourceEstimate:
    """The most of these: all prompts while they are drawn; the rows in two UNets, a unit's floats, a layer's moments;
    with `tune` a step of that.
    """
    places = trace_segment_memory(part)
    drawn = estimate_trajectory_bytes(part, recipe, len(recipe.prompts) + len(recipe.held_out))
    packed = estimate_unet_file_bytes(unet, size)
    most = max(
        estimate_generation_bytes(part, places, max(len(recipe.prompts), len(recipe.held_out))),
        estimate_calibration_bytes(part, places, recipe),
        estimate_distillation_bytes(part, recipe) if tune else 0,
    )
    return ResourceEstimate(
        most + packed + drawn, 2 * packed + drawn + estimate_other_files_bytes(source), SMALLER_RECIPE_ADVICE
    )


def estimate_calibration_bytes(part: SourceComponent, places: Sequence[SegmentMemory], recipe: Recipe) -> int:
    """All rows in two UNets, and at a unit both UNets' floats, and maps of some rows or a layer that is solved."""
    row, together = (
        2 * count_unet_inputs(recipe) * choose_state_dtype(part, recipe).itemsize,
        segment_batch_size(make_meta_latents(part)),
    )
    return max(
        row * place.state_floats
        + FLOAT32_BYTES * 2 * place.weight_floats
        + FLOAT32_BYTES
        * max(
            RECORDED_MAP_COPIES * together * place.activation_floats,
            *(estimate_solver_floats(layer, recipe) for layer in place.layers),
            0,
        )
        for place in places
    )


def estimate_solver_floats(layer: LinearOrConv, recipe: Recipe) -> int:
    """Moments of all parts of its columns, factors of one, tokens that are kept, and copies of the matrix."""
    rows, columns = len(layer.weight), layer.weight[0].numel()
    parts = -(-columns // recipe.block)
    width = -(-columns // parts)
    kept = (2 if parts == 1 else 1) * EVALUATION_TOKENS
    return (
        (parts + HESSIAN_COPIES) * width**2 + columns * rows * (1 + SOLVER_MATRIX_COPIES) + 2 * kept * (columns + rows)
    )
