"""Level `calib`: layers in forward order, each fitted to what the layers before it, already packed, give it.

Two UNets walk side by side over the calibration rows, the float one and the packed one. Of layers with the same
input the second moments of that input are gathered, and how far the output is from the float model's; then the
layer is solved: its weights are moved to make up for what earlier layers got wrong, brought to few bits by GPTQ, and
refined by coordinate descent; its bias takes up what is left of the mean.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tinysd_batch.model.packed.dequantize import unpack
from tinysd_batch.model.packed.format import Layout, PackedWeight, from_matrix, to_matrix
from tinysd_batch.quantize.calibration.activations import watch
from tinysd_batch.quantize.calibration.trajectories import Rows
from tinysd_batch.quantize.calibration.unet_segments import State, Unit, Walker, rows_at_once
from tinysd_batch.quantize.layers import Layer, layer_of
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.coordinate_descent import refine
from tinysd_batch.quantize.solve.gptq import Part, gptq
from tinysd_batch.quantize.solve.hessian import Moments, Tokens, column_parts, tokens_of, tokens_out

INPUT_TOKENS = 512  # of each layer, where only their sort matters
OTHER_TOKENS = 1024  # of the rows that tune and of those that are held out
# Layers that close a residual connection, and the module whose input is the stream that they are added to. That of
# `proj_out` passes by the other units of its attention block.
CLOSING = {"attn1.to_out.0": "norm1", "attn2.to_out.0": "norm2", "ff.net.2": "norm3"}


Use = Literal["moments", "tuning", "held out"]


@dataclass(frozen=True, slots=True)
class Solved:
    """A packed layer."""

    weight: PackedWeight
    bias: Tensor | None  # float16 [O]
    sqnr_db: float  # of its output on held-out rows, against the float model's


@dataclass(slots=True)
class Pair:
    """The same rows in both UNets."""

    floats: State
    packed: State
    use: Use
    dtype: torch.dtype = torch.float32  # in which they wait between two units


class Calibration:
    """One run over a UNet. `known` holds layers that were solved before a stop; `keep` is told each new one."""

    def __init__(
        self, source: Walker, target: Walker, layouts: Mapping[str, Layout], recipe: Recipe,
        known: dict[str, Solved], keep: Callable[[str, Solved], None],
    ) -> None:  # fmt: skip
        self.source = source
        self.target = target
        self.layouts = layouts
        self.recipe = recipe
        self.solved = known
        self.keep = keep

    @torch.no_grad()
    def run(self, pairs: list[Pair]) -> None:
        """All units. Afterwards the pairs hold the predictions of both."""
        for unit in self.source.units:
            self.source.load(unit)
            self.target.load(unit)
            for names in groups_of(self.target, unit, pairs[0].packed, self.layouts):
                self.solve_group(unit, names, pairs)
            for pair in pairs:
                pair.floats = after(unit, self.source.unet, pair.floats, pair.dtype)
                pair.packed = after(unit, self.target.unet, pair.packed, pair.dtype)
            self.source.unload(unit)
            self.target.unload(unit)

    def solve_group(self, unit: Unit, names: list[str], pairs: list[Pair]) -> None:
        missing = [name for name in names if name not in self.solved]
        if missing:
            gathered = self.gather(unit, missing, pairs)
            for name in missing:
                self.solved[name] = self.solve(name, gathered.pop(name))
                self.keep(name, self.solved[name])
        for name in names:
            self.put(name)

    def put(self, name: str) -> None:
        """Give the target UNet the layer as it was solved."""
        layer, solved = layer_of(self.target.unet, name), self.solved[name]
        matrix = unpack(solved.weight, torch.empty(solved.weight.shape)).to(self.target.device)
        layer.weight = nn.Parameter(from_matrix(matrix, layer.weight.shape), requires_grad=False)
        if solved.bias is not None:
            layer.bias = nn.Parameter(solved.bias.float().to(self.target.device), requires_grad=False)

    def gather(self, unit: Unit, names: list[str], pairs: list[Pair]) -> dict[str, "Gathered"]:
        """Moments and held-out tokens of layers with the same input."""
        found = {name: Gathered.of(layer_of(self.source.unet, name), self.layouts[name], self.recipe) for name in names}
        shares = Counter(pair.use for pair in pairs)
        draw = torch.Generator().manual_seed(self.recipe.seed)
        for pair in pairs:
            if not any(one.needs(pair.use) for one in found.values()):
                continue
            limit = (self.recipe.tokens if pair.use == "moments" else OTHER_TOKENS) // shares[pair.use]
            for name, x, gap in self.tokens(unit, names, pair, max(limit, 1), draw):
                found[name].add(x, gap, pair.use)
        return found

    def tokens(
        self, unit: Unit, names: list[str], pair: Pair, count: int, draw: torch.Generator
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """So many of each layer's inputs [N, K] in the target UNet, and gaps [N, O] to what it should make of them."""
        streams = {name: stream_of(name) for name in names}
        wanted = {*names, *(stream for stream in streams.values() if stream)}
        outputs = watch(self.source.unet, unit, pair.floats, wanted, names[-1])
        inputs = watch(self.target.unet, unit, pair.packed, wanted, names[-1])
        for name in names:
            layer, said = layer_of(self.source.unet, name), tokens_out(outputs[name][1])
            some = torch.randperm(len(said), generator=draw)[:count].to(said.device)
            x = tokens_of(layer, inputs[name][0], some)
            gap = said[some] - F.linear(x, to_matrix(layer.weight), layer.bias)
            if name.endswith(".proj_out"):
                gap += outer_tokens(pair.floats)[some] - outer_tokens(pair.packed)[some]
            if stream := streams[name]:
                gap += tokens_out(self.stream(self.source, name, outputs[stream][0]))[some]
                gap -= tokens_out(self.stream(self.target, name, inputs[stream][0]))[some]
            yield name, x, gap

    def stream(self, walker: Walker, name: str, x: Tensor) -> Tensor:
        """What a closing layer's output is added to: a resnet's may pass a convolution first."""
        holder = walker.unet.get_submodule(name.rpartition(".")[0])
        shortcut = getattr(holder, "conv_shortcut", None) if name.endswith(".conv2") else None
        return x if shortcut is None else shortcut(x)

    def solve(self, name: str, gathered: "Gathered") -> Solved:
        layer = layer_of(self.source.unet, name)
        weight, bits = to_matrix(layer.weight), self.layouts[name].bits
        size = self.layouts[name].group_in(weight.shape[1])
        parts, means = [], torch.zeros(weight.shape[1], device=weight.device)
        tuning = gathered.tokens("tuning") if gathered.needs("tuning") else None
        while gathered.parts:  # of a part that is solved only the Hessian stays
            groups, columns, moments = gathered.parts.pop(0)
            problem = moments.problem(
                weight[:, columns], tuning, has_bias=layer.bias is not None, damping=self.recipe.damping
            )
            del moments
            means[columns], gap = problem.mean_x, problem.mean_gap
            fit = gptq(problem.target, problem.hessian, size, bits)
            parts.append(Part(groups, problem.target, problem.hessian, fit))
        packed = refine(parts, self.recipe.sweeps).on("cpu")
        del parts
        changed = unpack(packed, torch.empty(packed.shape)).to(weight.device) - weight
        # The output's mean is the float model's again.
        if layer.bias is None:
            return Solved(packed, None, gathered.sqnr_db(weight, changed, torch.zeros_like(gap)))
        bias = (layer.bias + gap - changed @ means).half()
        return Solved(packed, bias.cpu(), gathered.sqnr_db(weight, changed, bias.float() - layer.bias))


@dataclass(frozen=True, slots=True)
class Gathered:
    """What is known of a layer's inputs: moments of its columns' parts, and some tokens for other uses."""

    parts: list[tuple[Tensor, Tensor, Moments]]  # groups, columns, moments
    others: dict[Use, list[Tokens]]

    @classmethod
    def of(cls, layer: Layer, layout: Layout, recipe: Recipe) -> Self:
        rows, device = len(layer.weight), layer.weight.device
        group_size, parts = layout.group_in(layer.weight[0].numel()), []
        for groups in column_parts(layer, group_size, recipe.block):
            columns = (groups[:, None] * group_size + torch.arange(group_size)).flatten().to(device)
            parts.append((groups.to(device), columns, Moments(len(columns), rows, device)))
        return cls(parts, {})

    def needs(self, use: Use) -> bool:
        """Whether tokens of this use say anything: a part of the columns cannot tell its own share of the gap."""
        return use != "tuning" or len(self.parts) == 1

    def add(self, x: Tensor, gap: Tensor, use: Use) -> None:
        if use != "moments":
            self.others.setdefault(use, []).append((x, gap))
            return
        for _, columns, moments in self.parts:
            moments.add(x if len(self.parts) == 1 else x[:, columns], gap)

    def tokens(self, use: Use) -> Tokens | None:
        """All of them; None where there are none."""
        if use not in self.others:
            return None
        x, gap = zip(*self.others[use], strict=True)
        return torch.cat(x), torch.cat(gap)

    def sqnr_db(self, weight: Tensor, changed: Tensor, bias_changed: Tensor) -> float:
        """Of held-out rows: what the layer should say, around its mean, over what it says wrongly."""
        tokens = self.tokens("held out")
        assert tokens is not None, "a recipe has held-out prompts"
        x, gap = tokens
        wrong = x @ changed.T + bias_changed - gap
        should = x @ weight.T + gap
        power = (should - should.mean(dim=0)).square().sum() / wrong.square().sum().clamp(min=1e-20)
        return float(10 * power.clamp(min=1e-20).log10())


def groups_of(walker: Walker, unit: Unit, state: State, layouts: Mapping[str, Layout]) -> list[list[str]]:
    """The unit's layers to be packed, in the order in which they work; those with the same input together."""
    names = [name for name in layouts if unit.holds(name)]
    inputs: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: inputs.append((name, args[0]))

    hooks = [walker.unet.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    unit.run(walker.unet, state.copy())
    for hook in hooks:
        hook.remove()
    # A shortcut works last, but the layer that is added to it is to make up for its error.
    inputs.sort(key=lambda one: not one[0].endswith(".conv_shortcut"))
    found: list[tuple[Tensor, list[str]]] = []
    for name, x in inputs:
        if found and found[-1][0] is x:
            found[-1][1].append(name)
        else:
            found.append((x, [name]))
    return [group for _, group in found]


def stream_of(name: str) -> str | None:
    """The module whose input is the residual stream that a layer's output is added to; None for inner layers."""
    if name.endswith(".conv2"):
        return f"{name.removesuffix('.conv2')}.norm1"
    for suffix, norm in CLOSING.items():
        if name.endswith(f".{suffix}"):
            return f"{name.removesuffix(f'.{suffix}')}.{norm}"
    return None


def outer_tokens(state: State) -> Tensor:
    """What an attention block's output is added to, [R L, C]."""
    assert state.outer is not None
    return tokens_out(state.outer.float())


def after(unit: Unit, unet: UNet2DConditionModel, state: State, dtype: torch.dtype) -> State:
    """A state one unit further, its maps in another type."""
    moved = state.copy()
    unit.run(unet, moved)
    moved.wait_as(dtype)
    return moved


@torch.no_grad()
def layer_inputs(
    walker: Walker, rows: Rows, names: list[str], tokens: int = INPUT_TOKENS
) -> Iterator[tuple[str, Tensor]]:
    """Some tokens [N, K] that each layer is given in the float model, a unit at a time."""
    splits = (torch.split(one, rows_at_once(rows.latents)) for one in (rows.latents, rows.times, rows.context))
    states = [State.of(*(one.to(walker.device) for one in part)) for part in zip(*splits, strict=True)]
    draw = torch.Generator().manual_seed(0)
    for unit in walker.units:
        walker.load(unit)
        mine = [name for name in names if unit.holds(name)]
        found: dict[str, list[Tensor]] = {name: [] for name in mine}
        for state in states if mine else []:
            seen = watch(walker.unet, unit, state, set(mine), "")
            for name in mine:
                x, count = seen[name][0], len(tokens_out(seen[name][1]))
                some = torch.randperm(count, generator=draw)[: max(1, tokens // len(states))].to(x.device)
                found[name].append(tokens_of(layer_of(walker.unet, name), x, some))
        yield from ((name, torch.cat(x)) for name, x in found.items())
        for state in states:
            unit.run(walker.unet, state)
        walker.unload(unit)
