"""Estimate the memory and disk space that quantization needs, and check that they are available.

The estimates come from tensor shapes: segments run on the meta device, which allocates nothing.
"""

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

FLOAT32_BYTES, FLOAT16_BYTES = 4, 2
FLOAT16_STATES_ABOVE_BYTES = 1e9  # states that take more are stored as float16 between two segments
HESSIAN_COPIES = 3  # beside a column block's Hessian: a factor, its inverse, and one in progress
RECORDED_MAP_COPIES = 3  # of a segment's feature maps: of both UNets, and some in token order
SOLVER_MATRIX_COPIES = 2  # of a layer while it is solved: its reordered weights and its codes
DATA_FREE_FLOAT_COPIES = 4  # float copies of a layer that is quantized without data
HELD_OUT_POINTS = 1  # of each held-out trajectory, to measure layers on
CONTEXT_TOKENS = 77
SMALLER_RECIPE_ADVICE = "; use a recipe with fewer prompts or points, or a smaller block or batch, to need less"


@dataclass(frozen=True, slots=True)
class ResourceEstimate:
    """Bytes needed in addition to the program itself."""

    memory_bytes: int
    disk_bytes: int
    advice: str = ""  # for machines with less memory

    def __str__(self) -> str:
        memory, disk = format_megabytes(self.memory_bytes), format_megabytes(self.disk_bytes)
        return f"about {memory} of memory in addition to the program itself, and {disk} of disk space"


def format_megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def check_available_resources(needed: ResourceEstimate, out: Path, device: torch.device) -> None:
    """Check that memory and disk suffice.

    Raises:
        UsageError: The device has too little memory.
        StorageError: The disk of `out` has too little free space.
    """
    available = get_available_memory_bytes(device)
    if available is not None and available < needed.memory_bytes:
        raise UsageError(
            f"quantizing needs about {format_megabytes(needed.memory_bytes)} of memory, "
            f"{format_megabytes(available)} are available{needed.advice}"
        )
    existing_parent = next(parent for parent in out.absolute().parents if parent.exists())
    if (free_bytes := shutil.disk_usage(existing_parent).free) < needed.disk_bytes:
        raise StorageError(
            f"{out}: needs about {format_megabytes(needed.disk_bytes)} of disk space, "
            f"{format_megabytes(free_bytes)} are free"
        )


def estimate_unet_file_bytes(unet: nn.Module, size: SizeTarget) -> int:
    """Return the size of the packed UNet's file; for a size target, that is the target."""
    return compute_unet_bytes(unet, get_preset_layouts(unet, size.preset)) if size.max_bytes is None else size.max_bytes


def estimate_other_files_bytes(source: CheckpointSource) -> int:
    """Return the size of the VAE's and the text encoder's files."""
    components = (source.vae(), source.text_encoder())
    return sum(FLOAT16_BYTES * tensor.numel() for component in components for tensor in component.tensors.values())


def return_freed_memory_to_os(unet: nn.Module, size: SizeTarget, device: torch.device) -> None:
    """Make malloc return large blocks to the operating system when they are freed, if the model is large.

    Otherwise glibc's heap holds on to gigabytes while segments of SD v1's size are loaded one after the other. The
    setting applies to the whole process, and does nothing on a GPU.
    """
    if device.type == "cpu" and estimate_unet_file_bytes(unet, size) >= SMALL_UNET_BYTES:
        set_mmap_threshold(UNET_MMAP_THRESHOLD_BYTES)


def estimate_data_free_resources(unet: nn.Module, source: CheckpointSource, size: SizeTarget) -> ResourceEstimate:
    """Estimate level `fast`: at the end all packed layers are in memory, and the floats of the last one."""
    largest = max(get_layer(unet, name).weight.numel() for name in get_preset_layouts(unet, SMALLEST_PRESET))
    packed_bytes = estimate_unet_file_bytes(unet, size)
    return ResourceEstimate(
        packed_bytes + DATA_FREE_FLOAT_COPIES * FLOAT32_BYTES * largest,
        packed_bytes + estimate_other_files_bytes(source),
    )


# Calibration


@dataclass(frozen=True, slots=True)
class SegmentMemory:
    """Numbers of floats that one UNet input takes at a segment of the UNet."""

    state_floats: int  # of the state before or after the segment, whichever is larger
    activation_floats: int  # beyond the state, while the segment runs
    weight_floats: int  # of the segment
    layers: list[LinearOrConv]  # that may be quantized


def trace_segment_memory(component: SourceComponent) -> list[SegmentMemory]:
    """Run all segments on the meta device, and count what one UNet input takes at each."""
    segmented = SegmentedUNet(component.config, {}, META_DEVICE)
    # Fused attention does not materialize the scores, so they are not counted.
    segmented.unet.set_attn_processor(ChunkedAttnProcessor(fused=True))
    config, unet = segmented.unet.config, segmented.unet
    latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    context = torch.empty(1, 8, config.cross_attention_dim, device="meta")
    state = ForwardState.from_inputs(latents, torch.empty(1, device="meta"), context)
    traced, names = [], list(get_preset_layouts(unet, SMALLEST_PRESET))
    for segment in segmented.segments:
        bytes_before = state.nbytes()
        with META_DEVICE, torch.no_grad(), PeakMemoryTracker() as tracker:
            tracker.exclude([*unet.parameters(), state.hidden_states, *state.skips])
            segment.run(unet, state)
        state_floats = max(bytes_before, state.nbytes()) // FLOAT32_BYTES
        layers = [get_layer(unet, name) for name in names if segment.contains(name)]
        weight_floats = sum(layer.weight.numel() for layer in layers)
        traced.append(SegmentMemory(state_floats, tracker.peak_bytes // FLOAT32_BYTES, weight_floats, layers))
    return traced


def largest_state_floats(segments: Sequence[SegmentMemory]) -> int:
    return max(segment.state_floats for segment in segments)


def count_unet_inputs(recipe: Recipe) -> int:
    """Count the UNet calls that calibration uses, with and without the prompt."""
    return 2 * recipe.points * len(recipe.prompts) + 2 * HELD_OUT_POINTS * len(recipe.held_out)


def choose_state_dtype(component: SourceComponent, recipe: Recipe) -> torch.dtype:
    """Choose the type in which states are stored between two segments: float16 where float32 would take too much."""
    state_bytes = FLOAT32_BYTES * largest_state_floats(trace_segment_memory(component))
    is_large = 2 * count_unet_inputs(recipe) * state_bytes > FLOAT16_STATES_ABOVE_BYTES
    return torch.float16 if is_large else torch.float32


def estimate_trajectory_bytes(component: SourceComponent, recipe: Recipe, prompts: int) -> int:
    """Return the bytes of trajectories: latents, and noise predictions with and without the prompt."""
    return 3 * FLOAT32_BYTES * recipe.steps * prompts * make_meta_latents(component).numel()


def make_meta_latents(component: SourceComponent) -> Tensor:
    """Return latents of one image on the meta device, [1, 4, h, w]."""
    channels, side = component.config["in_channels"], component.config["sample_size"]
    return torch.empty(1, channels, side, side, device="meta")


def estimate_generation_resources(component: SourceComponent, recipe: Recipe) -> ResourceEstimate:
    """Estimate what generating the held-out prompts with the float model takes."""
    segments, count = trace_segment_memory(component), len(recipe.held_out)
    memory_bytes = estimate_generation_bytes(component, segments, count)
    memory_bytes += estimate_trajectory_bytes(component, recipe, count)
    return ResourceEstimate(memory_bytes, 0, SMALLER_RECIPE_ADVICE)


def estimate_generation_bytes(component: SourceComponent, segments: Sequence[SegmentMemory], prompts: int) -> int:
    """Return the peak of a UNet call for all prompts.

    At each segment this is: the states with and without the prompt, the segment's weights twice while they are loaded,
    and the feature maps of one batch.
    """
    batch_size = segment_batch_size(make_meta_latents(component))
    return FLOAT32_BYTES * max(
        2 * prompts * segment.state_floats + 2 * segment.weight_floats + batch_size * segment.activation_floats
        for segment in segments
    )


def estimate_distillation_bytes(component: SourceComponent, recipe: Recipe) -> int:
    """Return the peak of a training step: activations and gradients, traced on the meta device, and the weights.

    Weights are in memory as codes, as floats, and as floats in the order that convolutions need.
    """
    with META_DEVICE, PeakMemoryTracker() as tracker:
        unet = UNet2DConditionModel.from_config(dict(component.config)).eval()
        unet.set_attn_processor(AttnProcessor())
        config, batch = unet.config, recipe.batch
        latents = torch.empty(batch, config.in_channels, config.sample_size, config.sample_size)
        context = torch.empty(batch, CONTEXT_TOKENS, config.cross_attention_dim)
        unet(latents, torch.empty(batch), context).sample.square().mean().backward()
    weights = sum(parameter.numel() for parameter in unet.parameters())
    return int(tracker.peak_bytes + (1 + 2 * FLOAT32_BYTES) * weights)


def estimate_calibration_resources(
    component: SourceComponent,
    unet: nn.Module,
    source: CheckpointSource,
    size: SizeTarget,
    recipe: Recipe,
    *,
    distill: bool = False,
) -> ResourceEstimate:
    """Estimate levels `calib` and, with `distill`, `distill`.

    Memory is the largest of three: generating all prompts; calibrating; with `distill`, a training step. Packed layers
    and trajectories come on top.
    """
    segments = trace_segment_memory(component)
    trajectory_bytes = estimate_trajectory_bytes(component, recipe, len(recipe.prompts) + len(recipe.held_out))
    packed_bytes = estimate_unet_file_bytes(unet, size)
    peak_bytes = max(
        estimate_generation_bytes(component, segments, max(len(recipe.prompts), len(recipe.held_out))),
        estimate_calibration_bytes(component, segments, recipe),
        estimate_distillation_bytes(component, recipe) if distill else 0,
    )
    return ResourceEstimate(
        peak_bytes + packed_bytes + trajectory_bytes,
        2 * packed_bytes + trajectory_bytes + estimate_other_files_bytes(source),
        SMALLER_RECIPE_ADVICE,
    )


def estimate_calibration_bytes(component: SourceComponent, segments: Sequence[SegmentMemory], recipe: Recipe) -> int:
    """Return the peak of layer-wise calibration.

    At each segment this is: all states of both UNets, both UNets' weights, and either the recorded feature maps of one
    batch or what solving a layer takes.
    """
    state_itemsize = choose_state_dtype(component, recipe).itemsize
    bytes_per_state_float = 2 * count_unet_inputs(recipe) * state_itemsize
    batch_size = segment_batch_size(make_meta_latents(component))
    return max(
        bytes_per_state_float * segment.state_floats
        + FLOAT32_BYTES * 2 * segment.weight_floats
        + FLOAT32_BYTES
        * max(
            RECORDED_MAP_COPIES * batch_size * segment.activation_floats,
            *(estimate_solver_floats(layer, recipe) for layer in segment.layers),
            0,
        )
        for segment in segments
    )


def estimate_solver_floats(layer: LinearOrConv, recipe: Recipe) -> int:
    """Count the floats that solving a layer takes.

    These are the moments of all its column blocks, the factors of one block's Hessian, the tokens of the other splits,
    and copies of its matrix.
    """
    rows, columns = len(layer.weight), layer.weight[0].numel()
    blocks = -(-columns // recipe.block)
    width = -(-columns // blocks)
    evaluation_tokens = (2 if blocks == 1 else 1) * EVALUATION_TOKENS
    hessians = (blocks + HESSIAN_COPIES) * width**2
    matrices = columns * rows * (1 + SOLVER_MATRIX_COPIES)
    return hessians + matrices + 2 * evaluation_tokens * (columns + rows)
