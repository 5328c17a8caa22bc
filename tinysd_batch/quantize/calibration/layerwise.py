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

from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import GroupWeight, Layout, from_matrix, to_matrix
from tinysd_batch.quantize.calibration.activations import record_activations
from tinysd_batch.quantize.calibration.trajectories import UNetInputs
from tinysd_batch.quantize.calibration.unet_segments import ForwardState, Segment, SegmentedUNet, segment_batch_size
from tinysd_batch.quantize.layers import LinearOrConv, get_layer
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.coordinate_descent import refine_and_pack
from tinysd_batch.quantize.solve.gptq import ColumnBlock, quantize_gptq
from tinysd_batch.quantize.solve.hessian import (
    InputMoments,
    TokensAndGaps,
    flatten_output_tokens,
    gather_input_tokens,
    split_columns,
)

LAYER_INPUT_TOKENS = 512  # of each layer, where only their sort matters
EVALUATION_TOKENS = 1024  # of the rows that tune and of those that are held out
# Layers that close a residual connection, and the module whose input is the stream that they are added to. That of
# `proj_out` passes by the other units of its attention block.
RESIDUAL_SOURCES = {"attn1.to_out.0": "norm1", "attn2.to_out.0": "norm2", "ff.net.2": "norm3"}


DataSplit = Literal["moments", "tuning", "held out"]


@dataclass(frozen=True, slots=True)
class CalibratedLayer:
    """A packed layer."""

    weight: GroupWeight
    bias: Tensor | None  # float16 [O]
    sqnr_db: float  # of its output on held-out rows, against the float model's


@dataclass(slots=True)
class StatePair:
    """The same rows in both UNets."""

    float_state: ForwardState
    quantized_state: ForwardState
    split: DataSplit
    dtype: torch.dtype = torch.float32  # in which they wait between two units


class LayerwiseCalibration:
    """One run over a UNet. `known` holds layers that were solved before a stop; `keep` is told each new one."""

    def __init__(
        self, source: SegmentedUNet, target: SegmentedUNet, layouts: Mapping[str, Layout], recipe: Recipe,
        known: dict[str, CalibratedLayer], keep: Callable[[str, CalibratedLayer], None],
    ) -> None:  # fmt: skip
        self.source = source
        self.target = target
        self.layouts = layouts
        self.recipe = recipe
        self.calibrated_layers = known
        self.on_layer_done = keep

    @torch.no_grad()
    def run(self, pairs: list[StatePair]) -> None:
        """All units. Afterwards the pairs hold the predictions of both."""
        for unit in self.source.segments:
            self.source.load(unit)
            self.target.load(unit)
            for names in group_layers_by_input(self.target, unit, pairs[0].quantized_state, self.layouts):
                self.quantize_group(unit, names, pairs)
            for pair in pairs:
                pair.float_state = run_segment(unit, self.source.unet, pair.float_state, pair.dtype)
                pair.quantized_state = run_segment(unit, self.target.unet, pair.quantized_state, pair.dtype)
            self.source.unload(unit)
            self.target.unload(unit)

    def quantize_group(self, unit: Segment, names: list[str], pairs: list[StatePair]) -> None:
        missing = [name for name in names if name not in self.calibrated_layers]
        if missing:
            gathered = self.collect_statistics(unit, missing, pairs)
            for name in missing:
                self.calibrated_layers[name] = self.quantize_layer(name, gathered.pop(name))
                self.on_layer_done(name, self.calibrated_layers[name])
        for name in names:
            self.install_layer(name)

    def install_layer(self, name: str) -> None:
        """Give the target UNet the layer as it was solved."""
        layer, solved = get_layer(self.target.unet, name), self.calibrated_layers[name]
        matrix = dequantize(solved.weight, torch.empty(solved.weight.shape)).to(self.target.device)
        layer.weight = nn.Parameter(from_matrix(matrix, layer.weight.shape), requires_grad=False)
        if solved.bias is not None:
            layer.bias = nn.Parameter(solved.bias.float().to(self.target.device), requires_grad=False)

    def collect_statistics(
        self, unit: Segment, names: list[str], pairs: list[StatePair]
    ) -> dict[str, "LayerStatistics"]:
        """InputMoments and held-out tokens of layers with the same input."""
        found = {
            name: LayerStatistics.for_layer(get_layer(self.source.unet, name), self.layouts[name], self.recipe)
            for name in names
        }
        shares = Counter(pair.split for pair in pairs)
        draw = torch.Generator().manual_seed(self.recipe.seed)
        for pair in pairs:
            if not any(one.can_use(pair.split) for one in found.values()):
                continue
            limit = (self.recipe.tokens if pair.split == "moments" else EVALUATION_TOKENS) // shares[pair.split]
            for name, x, gap in self.tokens(unit, names, pair, max(limit, 1), draw):
                found[name].add(x, gap, pair.split)
        return found

    def tokens(
        self, unit: Segment, names: list[str], pair: StatePair, count: int, draw: torch.Generator
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """So many of each layer's inputs [N, K] in the target UNet, and gaps [N, O] to what it should make of them."""
        streams = {name: find_residual_source(name) for name in names}
        wanted = {*names, *(stream for stream in streams.values() if stream)}
        outputs = record_activations(self.source.unet, unit, pair.float_state, wanted, names[-1])
        inputs = record_activations(self.target.unet, unit, pair.quantized_state, wanted, names[-1])
        for name in names:
            layer, said = get_layer(self.source.unet, name), flatten_output_tokens(outputs[name][1])
            some = torch.randperm(len(said), generator=draw)[:count].to(said.device)
            x = gather_input_tokens(layer, inputs[name][0], some)
            gap = said[some] - F.linear(x, to_matrix(layer.weight), layer.bias)
            if name.endswith(".proj_out"):
                gap += (
                    attention_residual_tokens(pair.float_state)[some]
                    - attention_residual_tokens(pair.quantized_state)[some]
                )
            if stream := streams[name]:
                gap += flatten_output_tokens(self.residual_input(self.source, name, outputs[stream][0]))[some]
                gap -= flatten_output_tokens(self.residual_input(self.target, name, inputs[stream][0]))[some]
            yield name, x, gap

    def residual_input(self, walker: SegmentedUNet, name: str, x: Tensor) -> Tensor:
        """What a closing layer's output is added to: a resnet's may pass a convolution first."""
        holder = walker.unet.get_submodule(name.rpartition(".")[0])
        shortcut = getattr(holder, "conv_shortcut", None) if name.endswith(".conv2") else None
        return x if shortcut is None else shortcut(x)

    def quantize_layer(self, name: str, gathered: "LayerStatistics") -> CalibratedLayer:
        layer = get_layer(self.source.unet, name)
        weight, bits = to_matrix(layer.weight), self.layouts[name].bits
        size = self.layouts[name].group_size_in(weight.shape[1])
        parts, means = [], torch.zeros(weight.shape[1], device=weight.device)
        tuning = gathered.tokens("tuning") if gathered.can_use("tuning") else None
        while gathered.column_blocks:  # of a part that is solved only the Hessian stays
            groups, columns, moments = gathered.column_blocks.pop(0)
            problem = moments.build_problem(
                weight[:, columns], tuning, has_bias=layer.bias is not None, damping=self.recipe.damping
            )
            del moments
            means[columns], gap = problem.mean_x, problem.mean_gap
            fit = quantize_gptq(problem.target, problem.hessian, size, bits)
            parts.append(ColumnBlock(groups, problem.target, problem.hessian, fit))
        packed = refine_and_pack(parts, self.recipe.sweeps).to("cpu")
        del parts
        changed = dequantize(packed, torch.empty(packed.shape)).to(weight.device) - weight
        # The output's mean is the float model's again.
        if layer.bias is None:
            return CalibratedLayer(packed, None, gathered.sqnr_db(weight, changed, torch.zeros_like(gap)))
        bias = (layer.bias + gap - changed @ means).half()
        return CalibratedLayer(packed, bias.cpu(), gathered.sqnr_db(weight, changed, bias.float() - layer.bias))


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What is known of a layer's inputs: moments of its columns' parts, and some tokens for other uses."""

    column_blocks: list[tuple[Tensor, Tensor, InputMoments]]  # groups, columns, moments
    token_batches: dict[DataSplit, list[TokensAndGaps]]

    @classmethod
    def for_layer(cls, layer: LinearOrConv, layout: Layout, recipe: Recipe) -> Self:
        rows, device = len(layer.weight), layer.weight.device
        group_size, parts = layout.group_size_in(layer.weight[0].numel()), []
        for groups in split_columns(layer, group_size, recipe.block):
            columns = (groups[:, None] * group_size + torch.arange(group_size)).flatten().to(device)
            parts.append((groups.to(device), columns, InputMoments(len(columns), rows, device)))
        return cls(parts, {})

    def can_use(self, use: DataSplit) -> bool:
        """Whether tokens of this use say anything: a part of the columns cannot tell its own share of the gap."""
        return use != "tuning" or len(self.column_blocks) == 1

    def add(self, x: Tensor, gap: Tensor, use: DataSplit) -> None:
        if use != "moments":
            self.token_batches.setdefault(use, []).append((x, gap))
            return
        for _, columns, moments in self.column_blocks:
            moments.add(x if len(self.column_blocks) == 1 else x[:, columns], gap)

    def tokens(self, use: DataSplit) -> TokensAndGaps | None:
        """All of them; None where there are none."""
        if use not in self.token_batches:
            return None
        x, gap = zip(*self.token_batches[use], strict=True)
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


def group_layers_by_input(
    walker: SegmentedUNet, unit: Segment, state: ForwardState, layouts: Mapping[str, Layout]
) -> list[list[str]]:
    """The unit's layers to be packed, in the order in which they work; those with the same input together."""
    names = [name for name in layouts if unit.contains(name)]
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


def find_residual_source(name: str) -> str | None:
    """The module whose input is the residual stream that a layer's output is added to; None for inner layers."""
    if name.endswith(".conv2"):
        return f"{name.removesuffix('.conv2')}.norm1"
    for suffix, norm in RESIDUAL_SOURCES.items():
        if name.endswith(f".{suffix}"):
            return f"{name.removesuffix(f'.{suffix}')}.{norm}"
    return None


def attention_residual_tokens(state: ForwardState) -> Tensor:
    """What an attention block's output is added to, [R L, C]."""
    assert state.attention_residual is not None
    return flatten_output_tokens(state.attention_residual.float())


def run_segment(unit: Segment, unet: UNet2DConditionModel, state: ForwardState, dtype: torch.dtype) -> ForwardState:
    """A state one unit further, its maps in another type."""
    moved = state.copy()
    unit.run(unet, moved)
    moved.store_as(dtype)
    return moved


@torch.no_grad()
def iter_layer_inputs(
    walker: SegmentedUNet, rows: UNetInputs, names: list[str], tokens: int = LAYER_INPUT_TOKENS
) -> Iterator[tuple[str, Tensor]]:
    """Some tokens [N, K] that each layer is given in the float model, a unit at a time."""
    splits = (torch.split(one, segment_batch_size(rows.latents)) for one in (rows.latents, rows.times, rows.context))
    states = [ForwardState.from_inputs(*(one.to(walker.device) for one in part)) for part in zip(*splits, strict=True)]
    draw = torch.Generator().manual_seed(0)
    for unit in walker.segments:
        walker.load(unit)
        mine = [name for name in names if unit.contains(name)]
        found: dict[str, list[Tensor]] = {name: [] for name in mine}
        for state in states if mine else []:
            seen = record_activations(walker.unet, unit, state, set(mine), "")
            for name in mine:
                x, count = seen[name][0], len(flatten_output_tokens(seen[name][1]))
                some = torch.randperm(count, generator=draw)[: max(1, tokens // len(states))].to(x.device)
                found[name].append(gather_input_tokens(get_layer(walker.unet, name), x, some))
        yield from ((name, torch.cat(x)) for name, x in found.items())
        for state in states:
            unit.run(walker.unet, state)
        walker.unload(unit)
