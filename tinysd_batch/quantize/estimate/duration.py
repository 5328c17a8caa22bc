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

from tinysd_batch.model.checkpoint.folder import KEEP_ON_META
from tinysd_batch.model.device.precision import wait_for
from tinysd_batch.model.packed.format import Layout
from tinysd_batch.quantize.calibration.activations import watch
from tinysd_batch.quantize.calibration.layerwise import groups_of
from tinysd_batch.quantize.calibration.trajectories import points_among, set_apart
from tinysd_batch.quantize.calibration.unet_segments import State, Unit, Walker, rows_at_once
from tinysd_batch.quantize.estimate.memory import CONTEXT_TOKENS, MAX_HELD_POINTS, latents_of, rows_of
from tinysd_batch.quantize.layers import layer_of
from tinysd_batch.quantize.presets import sort_of
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.gptq import ITERATIONS, NEAR, STARTS
from tinysd_batch.quantize.solve.hessian import RIDGES, column_parts, tokens_out
from tinysd_batch.quantize.sources.checkpoint_source import Part

# What layers, attention and the factors of Hessians take over a large product of as many multiply-adds: a profile of
# calibration at SD v1's size on one core gives 1.8 for each, drawing on two 1.7.
SLOWER = 1.7
# Of each weight by itself: numbers that a fit of its group goes over, and operations for its column.
FIT_NUMBERS, FIT_CALLS = 25, 20
GPTQ_CALLS, SWEEP_CALLS, GROUP_CALLS = 16, 9, 40
UNIT_CALLS = 40  # operations of a unit
SIDE = {"cpu": 1024, "cuda": 4096}  # of the matrices that are multiplied to learn a device's speed
# On the CPU few enough for torch to keep to one core: where another program has one, threads that wait for each other
# are up to a thousand times as slow, which says little about the hours to come.
NUMBERS = {"cpu": 2**14, "cuda": 2**24}
CALLS = 100  # in a row
TRIES = 10


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a device, a second."""

    products: float  # multiply-adds of float32
    numbers: float  # one operation on each of many
    calls: float


@dataclass(frozen=True, slots=True)
class Effort:
    """An amount of work."""

    products: float = 0.0  # multiply-adds
    numbers: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.products + other.products, self.numbers + other.numbers, self.calls + other.calls)

    def times(self, count: float) -> "Effort":
        return Effort(count * self.products, count * self.numbers, count * self.calls)

    def seconds(self, speed: Speed) -> float:
        return SLOWER * self.products / speed.products + self.numbers / speed.numbers + self.calls / speed.calls


NOTHING = Effort()


def total(efforts: Iterable[Effort]) -> Effort:
    return sum(efforts, NOTHING)


@cache
def speed_of(device: torch.device) -> Speed:
    """Measured in a fraction of a second: the best of some tries, so that what else is busy counts little."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    side, count = SIDE[kind], NUMBERS[kind]
    square, many, few = (torch.ones(*shape, device=device) for shape in ((side, side), (count,), (64,)))

    def go_over() -> Tensor:
        for _ in range(CALLS):
            many.mul_(1.0)
        return many

    def send() -> Tensor:
        for _ in range(CALLS):
            few.add_(1.0)
        return few

    return Speed(
        side**3 / quickest(lambda: square @ square, device), CALLS * count / quickest(go_over, device),
        CALLS / quickest(send, device),
    )  # fmt: skip


def quickest(work: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds."""
    found = []
    for _ in range(TRIES):
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        found.append(time.perf_counter() - started)
    return min(found)


# Counting


@dataclass(frozen=True, slots=True)
class Walked:
    """What one row takes in a unit of the UNet, in multiply-adds."""

    all: float
    groups: dict[str, float]  # of the layers to be packed: as far as the last with the same input, shared among these
    tokens: dict[str, int]  # a row's tokens in each


@dataclass(frozen=True, slots=True)
class Foretold:
    """The work of calibrating, by its parts."""

    drawing: Effort
    layers: dict[str, Effort]  # with what the walk through its unit takes
    measuring: Effort  # a noise correction and sorts of layers alone, too

    @property
    def all(self) -> Effort:
        return self.drawing + total(self.layers.values()) + self.measuring


def foretell(
    part: Part, vae: Part, layouts: Mapping[str, Layout], recipe: Recipe, *, noise_correction: bool = True
) -> Foretold:
    """The work of level `calib`."""
    walked = walk(part, layouts)
    weights = sum(one.numel() for one in part.tensors.values())
    row, units = sum(one.all for one in walked.values()), len(walked)
    together = rows_at_once(latents_of(part))

    def calls(prompts: int) -> Effort:
        """Of the UNet, with and without text, one time."""
        return Effort(2 * prompts * row, 2 * weights, units * UNIT_CALLS * (1 + 2 * prompts / together))

    held, apart = len(recipe.held_out), int(set_apart(torch.arange(len(recipe.prompts))).sum())
    drawing = (calls(len(recipe.prompts)) + calls(held)).times(recipe.steps)
    again = 2 + 3 * noise_correction  # times over held-out drawings, three of them to judge a correction
    measuring = calls(held).times(again * recipe.steps) + calls(apart if noise_correction else 0).times(recipe.steps)
    passes = 1 + len({sort_of(name) for name in layouts})
    measuring += calls(points_among(held, together)).times(passes)
    measuring += Effort(2 * held * decoding(vae, latents_of(part)))
    return Foretold(drawing, layer_efforts(part, layouts, recipe, walked), measuring)


def layer_efforts(
    part: Part, layouts: Mapping[str, Layout], recipe: Recipe, walked: Mapping[str, Walked] | None = None
) -> dict[str, Effort]:
    """Of each layer: the two UNets as far as it for all rows, and solving it; of a unit's first their way on, too."""
    unet = Walker(part.config, {}, KEEP_ON_META).unet
    rows, efforts = rows_of(recipe), {}
    calibrating = rows - 2 * MAX_HELD_POINTS * len(recipe.held_out)
    calls = UNIT_CALLS * rows / rows_at_once(latents_of(part))
    for one in (walked or walk(part, layouts)).values():
        on = Effort(2 * rows * one.all, 0, 2 * calls)
        for name, products in one.groups.items():
            tokens = min(recipe.tokens, calibrating * one.tokens[name])
            gathering = Effort(2 * rows * products, 0, 2 * calls)
            efforts[name] = gathering + solving(unet, name, layouts[name], recipe, tokens) + on
            on = NOTHING
    return efforts


def solving(unet: nn.Module, name: str, layout: Layout, recipe: Recipe, tokens: int) -> Effort:
    """Moments of so many tokens, factors of Hessians, GPTQ and coordinate descent."""
    layer = layer_of(unet, name)
    rows, columns = len(layer.weight), layer.weight[0].numel()
    size, sweeps = layout.group_in(columns), 1 + max(recipe.sweeps - 1, 1)
    widths = [len(part) * size for part in column_parts(layer, size, recipe.block)]
    ridges = len(RIDGES) if len(widths) == 1 else 0
    products = sum(
        tokens * width * (width / 2 + rows)
        + width**3 * (ridges / 6 + 2 / 3)  # a third for each triangular half's own solution
        + width**2 * rows * (ridges + 0.5 + 1.5 * sweeps)
        for width in widths
    )
    inner = len(STARTS) * ITERATIONS  # steps of a group's fit
    near = min(size, NEAR)
    numbers = inner * FIT_NUMBERS + near / 2 + GPTQ_CALLS + sweeps * (near + SWEEP_CALLS)
    a_column, a_group = GPTQ_CALLS + sweeps * SWEEP_CALLS, inner * FIT_CALLS + sweeps * GROUP_CALLS
    calls = columns * (a_column + a_group / size)
    return Effort(products, rows * columns * numbers, calls)


def walk(part: Part, layouts: Mapping[str, Layout]) -> dict[str, Walked]:
    """Each unit's, counted on a row without numbers."""
    walker, found = Walker(part.config, {}, KEEP_ON_META), {}
    latents = latents_of(part)
    context = torch.empty(1, CONTEXT_TOKENS, walker.unet.config.cross_attention_dim, device="meta")
    state = State.of(latents, torch.empty(1, device="meta"), context)
    with KEEP_ON_META, torch.no_grad():
        for unit in walker.units:
            groups, tokens = count_groups(walker, unit, state, layouts)
            found[unit.name] = Walked(multiply_adds(lambda: unit.run(walker.unet, state)), groups, tokens)  # noqa: B023
    return found


def count_groups(
    walker: Walker, unit: Unit, state: State, layouts: Mapping[str, Layout]
) -> tuple[dict[str, float], dict[str, int]]:
    """Multiply-adds and tokens of `Walked`."""
    products: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for names in groups_of(walker, unit, state, layouts):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        count = multiply_adds(lambda: seen.update(watch(walker.unet, unit, state, set(names), names[-1])))  # noqa: B023
        products |= dict.fromkeys(names, count / len(names))
        tokens |= {name: len(tokens_out(output)) for name, (_, output) in seen.items()}
    return products, tokens


def multiply_adds(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops() / 2)


def decoding(vae: Part, latents: Tensor) -> float:
    """Multiply-adds of a picture by the decoder."""
    with KEEP_ON_META, torch.no_grad():
        model = AutoencoderKL.from_config(dict(vae.config))
        return multiply_adds(lambda: model.decode(latents))
