"""Estimate how long calibration will take.

Counts the work from tensor shapes and divides it by speeds measured on the device. The estimate is accurate to about a
factor of two. Three types of work are counted separately, because devices differ in their relative speeds:
multiply-adds of matrix products (MACs), elementwise operations, and calls of torch operations, each of which has a
fixed cost however small its tensors are.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tinysd_batch.model.checkpoint.folder import META_DEVICE
from tinysd_batch.model.device.precision import synchronize
from tinysd_batch.model.packed.format import Layout
from tinysd_batch.quantize.calibration.activations import record_activations
from tinysd_batch.quantize.calibration.layerwise import group_layers_by_input
from tinysd_batch.quantize.calibration.trajectories import count_sensitivity_points, tuning_prompt_mask
from tinysd_batch.quantize.calibration.unet_segments import ForwardState, Segment, SegmentedUNet, segment_batch_size
from tinysd_batch.quantize.estimate.memory import CONTEXT_TOKENS, HELD_OUT_POINTS, count_unet_inputs, make_meta_latents
from tinysd_batch.quantize.layers import get_layer
from tinysd_batch.quantize.presets import get_layer_type
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.gptq import FIT_ITERATIONS, INITIAL_RANGE_SHARES, INNER_BLOCK_COLUMNS
from tinysd_batch.quantize.solve.hessian import RIDGE_FACTORS, flatten_output_tokens, split_columns
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent

# Time of layers, attention and Hessian factors over that of one large matrix product with as many MACs. A profile of
# calibration at SD v1's size on one core gives 1.8 for each of them; generating on two cores gives 1.7.
MATMUL_SLOWDOWN = 1.7
# Of one step of a group's fit: elementwise operations for each weight, and calls of operations for the group.
FIT_ELEMENTWISE_OPS, FIT_OP_CALLS = 25, 20
GPTQ_OP_CALLS, SWEEP_OP_CALLS = 16, 9  # for each column, in GPTQ and in each sweep of coordinate descent
GROUP_OP_CALLS = 40  # for each group, in each sweep
SEGMENT_OP_CALLS = 40  # for each batch that runs through a segment
PROBE_MATRIX_SIDE = {"cpu": 1024, "cuda": 4096}  # of the matrices that are multiplied to measure a device's speed
# On the CPU few enough elements for torch to use one thread only. Beside another busy program, threads that wait for
# each other can be a thousand times slower for a moment, which would say little about the hours to come.
PROBE_ELEMENTS = {"cpu": 2**14, "cuda": 2**24}
PROBE_OP_CALLS = 100  # of each measurement
PROBE_REPEATS = 10


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """What a device does in one second."""

    macs_per_s: float  # in float32
    elementwise_ops_per_s: float
    op_calls_per_s: float


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """An amount of work."""

    macs: float = 0.0
    elementwise_ops: float = 0.0
    op_calls: float = 0.0

    def __add__(self, other: "ComputeCost") -> "ComputeCost":
        return ComputeCost(
            self.macs + other.macs, self.elementwise_ops + other.elementwise_ops, self.op_calls + other.op_calls
        )

    def scaled(self, factor: float) -> "ComputeCost":
        return ComputeCost(factor * self.macs, factor * self.elementwise_ops, factor * self.op_calls)

    def duration_s(self, speed: DeviceSpeed) -> float:
        """Return how long the work takes at this speed."""
        return (
            MATMUL_SLOWDOWN * self.macs / speed.macs_per_s
            + self.elementwise_ops / speed.elementwise_ops_per_s
            + self.op_calls / speed.op_calls_per_s
        )


NO_COST = ComputeCost()


def sum_costs(costs: Iterable[ComputeCost]) -> ComputeCost:
    return sum(costs, NO_COST)


@cache
def measure_device_speed(device: torch.device) -> DeviceSpeed:
    """Measure a device's speed in a fraction of a second.

    Each measurement is the fastest of several, so that other load on the machine has little influence.
    """
    device_type = "cuda" if device.type == "cuda" else "cpu"
    side, count = PROBE_MATRIX_SIDE[device_type], PROBE_ELEMENTS[device_type]
    matrix, large, small = (torch.ones(*shape, device=device) for shape in ((side, side), (count,), (64,)))

    def multiply_elements() -> Tensor:
        for _ in range(PROBE_OP_CALLS):
            large.mul_(1.0)
        return large

    def call_operations() -> Tensor:
        for _ in range(PROBE_OP_CALLS):
            small.add_(1.0)
        return small

    return DeviceSpeed(
        macs_per_s=side**3 / measure_best_time_s(lambda: matrix @ matrix, device),
        elementwise_ops_per_s=PROBE_OP_CALLS * count / measure_best_time_s(multiply_elements, device),
        op_calls_per_s=PROBE_OP_CALLS / measure_best_time_s(call_operations, device),
    )


def measure_best_time_s(work: Callable[[], Tensor], device: torch.device) -> float:
    """Run `work` several times, and return the shortest duration."""
    durations = []
    for _ in range(PROBE_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        durations.append(time.perf_counter() - started)
    return min(durations)


# Counting


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """MACs of one UNet input in a segment of the UNet."""

    total: float
    # For each layer to be quantized: the MACs up to the last layer with the same input, divided among these layers.
    layer_macs: dict[str, float]
    layer_tokens: dict[str, int]  # tokens of one UNet input in each layer


@dataclass(frozen=True, slots=True)
class CalibrationCost:
    """The work of calibration."""

    generation: ComputeCost  # of all trajectories
    layers: dict[str, ComputeCost]  # solving each layer, and its share of running both UNets
    evaluation: ComputeCost  # of the result, of a noise correction, and of each layer type's sensitivity

    @property
    def total(self) -> ComputeCost:
        return self.generation + sum_costs(self.layers.values()) + self.evaluation


def estimate_calibration_cost(
    component: SourceComponent,
    vae: SourceComponent,
    layouts: Mapping[str, Layout],
    recipe: Recipe,
    *,
    noise_correction: bool = True,
) -> CalibrationCost:
    """Count the work of level `calib`."""
    segment_costs = count_segment_costs(component, layouts)
    weights = sum(tensor.numel() for tensor in component.tensors.values())
    unet_macs, segments = sum(segment.total for segment in segment_costs.values()), len(segment_costs)
    batch_size = segment_batch_size(make_meta_latents(component))

    def unet_call(prompts: int) -> ComputeCost:
        """Return the work of one UNet call for all prompts, with and without the prompt."""
        op_calls = segments * SEGMENT_OP_CALLS * (1 + 2 * prompts / batch_size)
        return ComputeCost(2 * prompts * unet_macs, 2 * weights, op_calls)

    held_out = len(recipe.held_out)
    tuning = int(tuning_prompt_mask(torch.arange(len(recipe.prompts))).sum())
    generation = (unet_call(len(recipe.prompts)) + unet_call(held_out)).scaled(recipe.steps)
    # The packed model generates the held-out prompts and predicts along their trajectories; judging a noise correction
    # generates them three more times.
    passes = 2 + 3 * noise_correction
    evaluation = unet_call(held_out).scaled(passes * recipe.steps)
    evaluation += unet_call(tuning if noise_correction else 0).scaled(recipe.steps)
    sensitivity_passes = 1 + len({get_layer_type(name) for name in layouts})
    evaluation += unet_call(count_sensitivity_points(held_out, batch_size)).scaled(sensitivity_passes)
    evaluation += ComputeCost(2 * held_out * count_decoder_macs(vae, make_meta_latents(component)))
    layer_costs = estimate_layer_costs(component, layouts, recipe, segment_costs)
    return CalibrationCost(generation, layer_costs, evaluation)


def estimate_layer_costs(
    component: SourceComponent,
    layouts: Mapping[str, Layout],
    recipe: Recipe,
    segment_costs: Mapping[str, SegmentCost] | None = None,
) -> dict[str, ComputeCost]:
    """Count the work of calibrating each layer.

    That is running both UNets up to the layer for all inputs, and solving it. The first layer of a segment also carries
    the work of advancing all states by the segment.
    """
    unet = SegmentedUNet(component.config, {}, META_DEVICE).unet
    inputs, costs = count_unet_inputs(recipe), {}
    calibration_inputs = inputs - 2 * HELD_OUT_POINTS * len(recipe.held_out)
    op_calls = SEGMENT_OP_CALLS * inputs / segment_batch_size(make_meta_latents(component))
    for segment in (segment_costs or count_segment_costs(component, layouts)).values():
        advance = ComputeCost(2 * inputs * segment.total, 0, 2 * op_calls)
        for name, macs in segment.layer_macs.items():
            tokens = min(recipe.tokens, calibration_inputs * segment.layer_tokens[name])
            collect = ComputeCost(2 * inputs * macs, 0, 2 * op_calls)
            costs[name] = collect + estimate_solver_cost(unet, name, layouts[name], recipe, tokens) + advance
            advance = NO_COST
    return costs


def estimate_solver_cost(unet: nn.Module, name: str, layout: Layout, recipe: Recipe, tokens: int) -> ComputeCost:
    """Count the work of solving a layer: moments of `tokens` inputs, Hessian factors, GPTQ and coordinate descent."""
    layer = get_layer(unet, name)
    rows, columns = len(layer.weight), layer.weight[0].numel()
    group_size, sweeps = layout.group_size_in(columns), 1 + max(recipe.sweeps - 1, 1)
    widths = [len(groups) * group_size for groups in split_columns(layer, group_size, recipe.block)]
    ridges = len(RIDGE_FACTORS) if len(widths) == 1 else 0
    macs = sum(
        tokens * width * (width / 2 + rows)
        + width**3 * (ridges / 6 + 2 / 3)  # a third for solving each triangular half
        + width**2 * rows * (ridges + 0.5 + 1.5 * sweeps)
        for width in widths
    )
    fit_steps = len(INITIAL_RANGE_SHARES) * FIT_ITERATIONS
    inner_block = min(group_size, INNER_BLOCK_COLUMNS)
    gptq_ops = fit_steps * FIT_ELEMENTWISE_OPS + inner_block / 2 + GPTQ_OP_CALLS
    sweep_ops = sweeps * (inner_block + SWEEP_OP_CALLS)
    column_calls = GPTQ_OP_CALLS + sweeps * SWEEP_OP_CALLS
    group_calls = fit_steps * FIT_OP_CALLS + sweeps * GROUP_OP_CALLS
    return ComputeCost(
        macs, rows * columns * (gptq_ops + sweep_ops), columns * (column_calls + group_calls / group_size)
    )


def count_segment_costs(component: SourceComponent, layouts: Mapping[str, Layout]) -> dict[str, SegmentCost]:
    """Count the MACs of each segment, by name, for one UNet input on the meta device."""
    segmented, costs = SegmentedUNet(component.config, {}, META_DEVICE), {}
    unet, latents = segmented.unet, make_meta_latents(component)
    context = torch.empty(1, CONTEXT_TOKENS, unet.config.cross_attention_dim, device="meta")
    state = ForwardState.from_inputs(latents, torch.empty(1, device="meta"), context)
    with META_DEVICE, torch.no_grad():
        for segment in segmented.segments:
            layer_macs, layer_tokens = count_layer_macs(segmented, segment, state, layouts)
            total = count_macs(lambda: segment.run(unet, state))  # noqa: B023 - called at once
            costs[segment.name] = SegmentCost(total, layer_macs, layer_tokens)
    return costs


def count_layer_macs(
    segmented: SegmentedUNet, segment: Segment, state: ForwardState, layouts: Mapping[str, Layout]
) -> tuple[dict[str, float], dict[str, int]]:
    """Count MACs and tokens of the segment's layers, as `SegmentCost` has them."""
    layer_macs: dict[str, float] = {}
    layer_tokens: dict[str, int] = {}
    for names in group_layers_by_input(segmented, segment, state, layouts):
        records: dict[str, tuple[Tensor, Tensor]] = {}
        macs = count_macs(
            lambda: records.update(record_activations(segmented.unet, segment, state, set(names), names[-1]))  # noqa: B023
        )
        layer_macs |= dict.fromkeys(names, macs / len(names))
        layer_tokens |= {name: len(flatten_output_tokens(output)) for name, (_, output) in records.items()}
    return layer_macs, layer_tokens


def count_macs(work: Callable[[], Any]) -> float:
    """Run `work`, and return its multiply-adds."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops() / 2)


def count_decoder_macs(vae: SourceComponent, latents: Tensor) -> float:
    """Return the multiply-adds of decoding latents [1, 4, h, w]."""
    with META_DEVICE, torch.no_grad():
        model = AutoencoderKL.from_config(dict(vae.config))
        return count_macs(lambda: model.decode(latents))
