"""How long calibrating takes, told before it starts: work counted from shapes, by the speed of the device.

Meant to be right within a factor of two. Three kinds of work are told apart, since devices differ in how they are good
at each: products of matrices, operations on each number by itself, and the sending of operations, however small.
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

# What layers, attention and the factors of Hessians take over a large product of as many multiply-adds: a profile of
# calibration at SD v1's size on one core gives 1.8 for each, drawing on two 1.7.
MATMUL_SLOWDOWN = 1.7
# Of each weight by itself: numbers that a fit of its group goes over, and operations for its column.
FIT_ELEMENTWISE_OPS, FIT_OP_CALLS = 25, 20
GPTQ_OP_CALLS, SWEEP_OP_CALLS, GROUP_OP_CALLS = 16, 9, 40
SEGMENT_OP_CALLS = 40  # operations of a unit
PROBE_MATRIX_SIDE = {"cpu": 1024, "cuda": 4096}  # of the matrices that are multiplied to learn a device's speed
# On the CPU few enough for torch to keep to one core: where another program has one, threads that wait for each other
# are up to a thousand times as slow, which says little about the hours to come.
PROBE_ELEMENTS = {"cpu": 2**14, "cuda": 2**24}
PROBE_OP_CALLS = 100  # in a row
PROBE_REPEATS = 10


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Of a device, a second."""

    macs: float  # multiply-adds of float32
    elementwise_ops: float  # one operation on each of many
    op_calls: float


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """An amount of work."""

    macs: float = 0.0  # multiply-adds
    elementwise_ops: float = 0.0
    op_calls: float = 0.0

    def __add__(self, other: "ComputeCost") -> "ComputeCost":
        return ComputeCost(
            self.macs + other.macs, self.elementwise_ops + other.elementwise_ops, self.op_calls + other.op_calls
        )

    def scaled(self, count: float) -> "ComputeCost":
        return ComputeCost(count * self.macs, count * self.elementwise_ops, count * self.op_calls)

    def duration_s(self, speed: DeviceSpeed) -> float:
        return (
            MATMUL_SLOWDOWN * self.macs / speed.macs
            + self.elementwise_ops / speed.elementwise_ops
            + self.op_calls / speed.op_calls
        )


NO_COST = ComputeCost()


def sum_costs(efforts: Iterable[ComputeCost]) -> ComputeCost:
    return sum(efforts, NO_COST)


@cache
def measure_device_speed(device: torch.device) -> DeviceSpeed:
    """Measured in a fraction of a second: the best of some tries, so that what else is busy counts little."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    side, count = PROBE_MATRIX_SIDE[kind], PROBE_ELEMENTS[kind]
    square, many, few = (torch.ones(*shape, device=device) for shape in ((side, side), (count,), (64,)))

    def go_over() -> Tensor:
        for _ in range(PROBE_OP_CALLS):
            many.mul_(1.0)
        return many

    def send() -> Tensor:
        for _ in range(PROBE_OP_CALLS):
            few.add_(1.0)
        return few

    return DeviceSpeed(
        side**3 / measure_best_time_s(lambda: square @ square, device), PROBE_OP_CALLS * count / measure_best_time_s(go_over, device),
        PROBE_OP_CALLS / measure_best_time_s(send, device),
    )  # fmt: skip


def measure_best_time_s(work: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds."""
    found = []
    for _ in range(PROBE_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


# Counting


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """What one row takes in a unit of the UNet, in multiply-adds."""

    total: float
    layer_macs: dict[
        str, float
    ]  # of the layers to be packed: as far as the last with the same input, shared among these
    tokens: dict[str, int]  # a row's tokens in each


@dataclass(frozen=True, slots=True)
class CalibrationCost:
    """The work of calibrating, by its parts."""

    generation: ComputeCost
    layers: dict[str, ComputeCost]  # with what the walk through its unit takes
    evaluation: ComputeCost  # a noise correction and sorts of layers alone, too

    @property
    def total(self) -> ComputeCost:
        return self.generation + sum_costs(self.layers.values()) + self.evaluation


def estimate_calibration_cost(
    part: SourceComponent,
    vae: SourceComponent,
    layouts: Mapping[str, Layout],
    recipe: Recipe,
    *,
    noise_correction: bool = True,
) -> CalibrationCost:
    """The work of level `calib`."""
    walked = count_segment_costs(part, layouts)
    weights = sum(one.numel() for one in part.tensors.values())
    row, units = sum(one.total for one in walked.values()), len(walked)
    together = segment_batch_size(make_meta_latents(part))

    def calls(prompts: int) -> ComputeCost:
        """Of the UNet, with and without text, one time."""
        return ComputeCost(2 * prompts * row, 2 * weights, units * SEGMENT_OP_CALLS * (1 + 2 * prompts / together))

    held, apart = len(recipe.held_out), int(tuning_prompt_mask(torch.arange(len(recipe.prompts))).sum())
    drawing = (calls(len(recipe.prompts)) + calls(held)).scaled(recipe.steps)
    again = 2 + 3 * noise_correction  # times over held-out drawings, three of them to judge a correction
    measuring = calls(held).scaled(again * recipe.steps) + calls(apart if noise_correction else 0).scaled(recipe.steps)
    passes = 1 + len({get_layer_type(name) for name in layouts})
    measuring += calls(count_sensitivity_points(held, together)).scaled(passes)
    measuring += ComputeCost(2 * held * count_decoder_macs(vae, make_meta_latents(part)))
    return CalibrationCost(drawing, estimate_layer_costs(part, layouts, recipe, walked), measuring)


def estimate_layer_costs(
    part: SourceComponent,
    layouts: Mapping[str, Layout],
    recipe: Recipe,
    walked: Mapping[str, SegmentCost] | None = None,
) -> dict[str, ComputeCost]:
    """Of each layer: the two UNets as far as it for all rows, and solving it; of a unit's first their way on, too."""
    unet = SegmentedUNet(part.config, {}, META_DEVICE).unet
    rows, efforts = count_unet_inputs(recipe), {}
    calibrating = rows - 2 * HELD_OUT_POINTS * len(recipe.held_out)
    calls = SEGMENT_OP_CALLS * rows / segment_batch_size(make_meta_latents(part))
    for one in (walked or count_segment_costs(part, layouts)).values():
        on = ComputeCost(2 * rows * one.total, 0, 2 * calls)
        for name, products in one.layer_macs.items():
            tokens = min(recipe.tokens, calibrating * one.tokens[name])
            gathering = ComputeCost(2 * rows * products, 0, 2 * calls)
            efforts[name] = gathering + estimate_solver_cost(unet, name, layouts[name], recipe, tokens) + on
            on = NO_COST
    return efforts


def estimate_solver_cost(unet: nn.Module, name: str, layout: Layout, recipe: Recipe, tokens: int) -> ComputeCost:
    """Moments of so many tokens, factors of Hessians, GPTQ and coordinate descent."""
    layer = get_layer(unet, name)
    rows, columns = len(layer.weight), layer.weight[0].numel()
    size, sweeps = layout.group_size_in(columns), 1 + max(recipe.sweeps - 1, 1)
    widths = [len(part) * size for part in split_columns(layer, size, recipe.block)]
    ridges = len(RIDGE_FACTORS) if len(widths) == 1 else 0
    products = sum(
        tokens * width * (width / 2 + rows)
        + width**3 * (ridges / 6 + 2 / 3)  # a third for each triangular half's own solution
        + width**2 * rows * (ridges + 0.5 + 1.5 * sweeps)
        for width in widths
    )
    inner = len(INITIAL_RANGE_SHARES) * FIT_ITERATIONS  # steps of a group's fit
    near = min(size, INNER_BLOCK_COLUMNS)
    numbers = inner * FIT_ELEMENTWISE_OPS + near / 2 + GPTQ_OP_CALLS + sweeps * (near + SWEEP_OP_CALLS)
    a_column, a_group = GPTQ_OP_CALLS + sweeps * SWEEP_OP_CALLS, inner * FIT_OP_CALLS + sweeps * GROUP_OP_CALLS
    calls = columns * (a_column + a_group / size)
    return ComputeCost(products, rows * columns * numbers, calls)


def count_segment_costs(part: SourceComponent, layouts: Mapping[str, Layout]) -> dict[str, SegmentCost]:
    """Each unit's, counted on a row without numbers."""
    walker, found = SegmentedUNet(part.config, {}, META_DEVICE), {}
    latents = make_meta_latents(part)
    context = torch.empty(1, CONTEXT_TOKENS, walker.unet.config.cross_attention_dim, device="meta")
    state = ForwardState.from_inputs(latents, torch.empty(1, device="meta"), context)
    with META_DEVICE, torch.no_grad():
        for unit in walker.segments:
            groups, tokens = count_layer_macs(walker, unit, state, layouts)
            found[unit.name] = SegmentCost(count_macs(lambda: unit.run(walker.unet, state)), groups, tokens)  # noqa: B023
    return found


def count_layer_macs(
    walker: SegmentedUNet, unit: Segment, state: ForwardState, layouts: Mapping[str, Layout]
) -> tuple[dict[str, float], dict[str, int]]:
    """Multiply-adds and tokens of `Walked`."""
    products: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for names in group_layers_by_input(walker, unit, state, layouts):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        count = count_macs(lambda: seen.update(record_activations(walker.unet, unit, state, set(names), names[-1])))  # noqa: B023
        products |= dict.fromkeys(names, count / len(names))
        tokens |= {name: len(flatten_output_tokens(output)) for name, (_, output) in seen.items()}
    return products, tokens


def count_macs(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops() / 2)


def count_decoder_macs(vae: SourceComponent, latents: Tensor) -> float:
    """Multiply-adds of a picture by the decoder."""
    with META_DEVICE, torch.no_grad():
        model = AutoencoderKL.from_config(dict(vae.config))
        return count_macs(lambda: model.decode(latents))
