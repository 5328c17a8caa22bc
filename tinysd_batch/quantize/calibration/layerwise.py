"""Quantize the layers of a UNet in forward order, each fitted to the inputs that earlier quantized layers produce.

Two UNets run side by side over the calibration inputs: the float one and the one quantized so far. For layers that
share an input, this module accumulates the second moments of that input and the difference between the layer's output
and the float model's. Then each layer is solved: its weights are shifted to compensate for the errors of earlier
layers, rounded to few bits by GPTQ, and refined by coordinate descent. Its bias absorbs the error of the output's mean.
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

LAYER_INPUT_TOKENS = 512  # of each layer, to compare the errors of different bit widths
EVALUATION_TOKENS = 1024  # of each layer, from the tuning inputs and from the held-out inputs
# Suffixes of transformer layers whose output is added to a residual stream, and the module whose input is that stream.
# The stream that `proj_out` adds to is in the state of its attention block.
RESIDUAL_SOURCES = {"attn1.to_out.0": "norm1", "attn2.to_out.0": "norm2", "ff.net.2": "norm3"}

# What UNet inputs are for: moments of the layers' inputs, the choice of a ridge, or measuring finished layers.
DataSplit = Literal["moments", "tuning", "held out"]


@dataclass(frozen=True, slots=True)
class CalibratedLayer:
    """A quantized layer."""

    weight: GroupWeight
    bias: Tensor | None  # float16 [O]
    sqnr_db: float  # of its output on held-out inputs, against the float model's output


@dataclass(slots=True)
class StatePair:
    """The same UNet inputs on their way through both UNets."""

    float_state: ForwardState
    quantized_state: ForwardState
    split: DataSplit
    dtype: torch.dtype = torch.float32  # of the feature maps that are kept between two segments


class LayerwiseCalibration:
    """One calibration of a UNet.

    Args:
        float_unet: The float model.
        quantized_unet: A second copy of it, whose layers are replaced as they are quantized.
        layouts: How to store each layer.
        recipe: Effort and seed.
        calibrated_layers: Layers that an earlier, interrupted run has finished.
        on_layer_done: Called with the name of each newly finished layer, and the layer.
    """

    def __init__(
        self,
        float_unet: SegmentedUNet,
        quantized_unet: SegmentedUNet,
        layouts: Mapping[str, Layout],
        recipe: Recipe,
        calibrated_layers: dict[str, CalibratedLayer],
        on_layer_done: Callable[[str, CalibratedLayer], None],
    ) -> None:
        self.float_unet = float_unet
        self.quantized_unet = quantized_unet
        self.layouts = layouts
        self.recipe = recipe
        self.calibrated_layers = calibrated_layers
        self.on_layer_done = on_layer_done

    @torch.no_grad()
    def run(self, pairs: list[StatePair]) -> None:
        """Calibrate all segments. Afterwards the pairs hold the noise predictions of both UNets."""
        for segment in self.float_unet.segments:
            self.float_unet.load(segment)
            self.quantized_unet.load(segment)
            first_state = pairs[0].quantized_state
            for names in group_layers_by_input(self.quantized_unet, segment, first_state, self.layouts):
                self.quantize_group(segment, names, pairs)
            for pair in pairs:
                pair.float_state = run_segment(segment, self.float_unet.unet, pair.float_state, pair.dtype)
                pair.quantized_state = run_segment(segment, self.quantized_unet.unet, pair.quantized_state, pair.dtype)
            self.float_unet.unload(segment)
            self.quantized_unet.unload(segment)

    def quantize_group(self, segment: Segment, names: list[str], pairs: list[StatePair]) -> None:
        """Quantize layers with the same input, except those that are done, and install all of them."""
        missing = [name for name in names if name not in self.calibrated_layers]
        if missing:
            statistics = self.collect_statistics(segment, missing, pairs)
            for name in missing:
                self.calibrated_layers[name] = self.quantize_layer(name, statistics.pop(name))
                self.on_layer_done(name, self.calibrated_layers[name])
        for name in names:
            self.install_layer(name)

    def install_layer(self, name: str) -> None:
        """Replace a layer of the quantized UNet by its quantized form."""
        layer, calibrated = get_layer(self.quantized_unet.unet, name), self.calibrated_layers[name]
        matrix = dequantize(calibrated.weight, torch.empty(calibrated.weight.shape)).to(self.quantized_unet.device)
        layer.weight = nn.Parameter(from_matrix(matrix, layer.weight.shape), requires_grad=False)
        if calibrated.bias is not None:
            bias = calibrated.bias.float().to(self.quantized_unet.device)
            layer.bias = nn.Parameter(bias, requires_grad=False)

    def collect_statistics(
        self, segment: Segment, names: list[str], pairs: list[StatePair]
    ) -> dict[str, "LayerStatistics"]:
        """Collect input moments and tokens of layers with the same input."""
        statistics = {
            name: LayerStatistics.for_layer(get_layer(self.float_unet.unet, name), self.layouts[name], self.recipe)
            for name in names
        }
        pairs_of_split = Counter(pair.split for pair in pairs)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for pair in pairs:
            if not any(layer.can_use(pair.split) for layer in statistics.values()):
                continue
            limit = self.recipe.tokens if pair.split == "moments" else EVALUATION_TOKENS
            count = max(limit // pairs_of_split[pair.split], 1)
            for name, x, gap in self.iter_layer_tokens(segment, names, pair, count, generator):
                statistics[name].add(x, gap, pair.split)
        return statistics

    def iter_layer_tokens(
        self, segment: Segment, names: list[str], pair: StatePair, count: int, generator: torch.Generator
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name of each layer, `count` of its inputs x [N, K] in the quantized UNet, and their gaps [N, O].

        A gap is what the layer should add to the float layer's output for x, see `InputMoments`.
        """
        sources = {name: find_residual_source(name) for name in names}
        recorded_names = {*names, *(source for source in sources.values() if source)}
        float_records = record_activations(self.float_unet.unet, segment, pair.float_state, recorded_names, names[-1])
        quantized_records = record_activations(
            self.quantized_unet.unet, segment, pair.quantized_state, recorded_names, names[-1]
        )
        for name in names:
            layer, output = get_layer(self.float_unet.unet, name), flatten_output_tokens(float_records[name][1])
            chosen = torch.randperm(len(output), generator=generator)[:count].to(output.device)
            x = gather_input_tokens(layer, quantized_records[name][0], chosen)
            gap = output[chosen] - F.linear(x, to_matrix(layer.weight), layer.bias)
            if name.endswith(".proj_out"):
                float_residual = attention_residual_tokens(pair.float_state)[chosen]
                gap += float_residual - attention_residual_tokens(pair.quantized_state)[chosen]
            if source := sources[name]:
                stream = self.residual_input(self.float_unet, name, float_records[source][0])
                gap += flatten_output_tokens(stream)[chosen]
                stream = self.residual_input(self.quantized_unet, name, quantized_records[source][0])
                gap -= flatten_output_tokens(stream)[chosen]
            yield name, x, gap

    def residual_input(self, unet: SegmentedUNet, name: str, x: Tensor) -> Tensor:
        """Return what the output of layer `name` is added to: x, in some resnets after the shortcut convolution."""
        parent = unet.unet.get_submodule(name.rpartition(".")[0])
        shortcut = getattr(parent, "conv_shortcut", None) if name.endswith(".conv2") else None
        return x if shortcut is None else shortcut(x)

    def quantize_layer(self, name: str, statistics: "LayerStatistics") -> CalibratedLayer:
        """Quantize one layer. Consumes its statistics, to free memory early."""
        layer = get_layer(self.float_unet.unet, name)
        weight, bits = to_matrix(layer.weight), self.layouts[name].bits
        group_size = self.layouts[name].group_size_in(weight.shape[1])
        blocks, mean_x = [], torch.zeros(weight.shape[1], device=weight.device)
        tuning = statistics.tokens_of_split("tuning") if statistics.can_use("tuning") else None
        while statistics.column_blocks:  # of a solved block only the Hessian stays in memory
            groups, columns, moments = statistics.column_blocks.pop(0)
            problem = moments.build_problem(
                weight[:, columns], tuning, has_bias=layer.bias is not None, damping=self.recipe.damping
            )
            del moments
            mean_x[columns], mean_gap = problem.mean_x, problem.mean_gap
            fit = quantize_gptq(problem.target, problem.hessian, group_size, bits)
            blocks.append(ColumnBlock(groups, problem.target, problem.hessian, fit))
        packed = refine_and_pack(blocks, self.recipe.sweeps).to("cpu")
        del blocks
        change = dequantize(packed, torch.empty(packed.shape)).to(weight.device) - weight
        if layer.bias is None:
            sqnr_db = statistics.held_out_sqnr_db(weight, change, torch.zeros_like(mean_gap))
            return CalibratedLayer(packed, None, sqnr_db)
        # Restore the mean of the float model's output.
        bias = (layer.bias + mean_gap - change @ mean_x).half()
        sqnr_db = statistics.held_out_sqnr_db(weight, change, bias.float() - layer.bias)
        return CalibratedLayer(packed, bias.cpu(), sqnr_db)


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What calibration needs of a layer's inputs: moments for each block of columns, and tokens of the other splits."""

    column_blocks: list[tuple[Tensor, Tensor, InputMoments]]  # numbers of groups, numbers of columns, moments
    token_batches: dict[DataSplit, list[TokensAndGaps]]

    @classmethod
    def for_layer(cls, layer: LinearOrConv, layout: Layout, recipe: Recipe) -> Self:
        """Return empty statistics for a layer to be stored in `layout`."""
        rows, device = len(layer.weight), layer.weight.device
        group_size, blocks = layout.group_size_in(layer.weight[0].numel()), []
        for groups in split_columns(layer, group_size, recipe.block):
            columns = (groups[:, None] * group_size + torch.arange(group_size)).flatten().to(device)
            blocks.append((groups.to(device), columns, InputMoments(len(columns), rows, device)))
        return cls(blocks, {})

    def can_use(self, split: DataSplit) -> bool:
        """Return whether tokens of this split help: a block of some columns cannot know its own share of the gap."""
        return split != "tuning" or len(self.column_blocks) == 1

    def add(self, x: Tensor, gap: Tensor, split: DataSplit) -> None:
        """Add inputs [N, K] and their gaps [N, O]."""
        if split != "moments":
            self.token_batches.setdefault(split, []).append((x, gap))
            return
        for _, columns, moments in self.column_blocks:
            moments.add(x if len(self.column_blocks) == 1 else x[:, columns], gap)

    def tokens_of_split(self, split: DataSplit) -> TokensAndGaps | None:
        """Return all tokens of a split; None if there are none."""
        if split not in self.token_batches:
            return None
        x, gap = zip(*self.token_batches[split], strict=True)
        return torch.cat(x), torch.cat(gap)

    def held_out_sqnr_db(self, weight: Tensor, change: Tensor, bias_change: Tensor) -> float:
        """Compute the layer's SQNR on held-out inputs: variance of the wanted output over power of the error, in dB."""
        tokens = self.tokens_of_split("held out")
        assert tokens is not None, "a recipe has held-out prompts"
        x, gap = tokens
        error = x @ change.T + bias_change - gap
        wanted = x @ weight.T + gap
        ratio = (wanted - wanted.mean(dim=0)).square().sum() / error.square().sum().clamp(min=1e-20)
        return float(10 * ratio.clamp(min=1e-20).log10())


def group_layers_by_input(
    unet: SegmentedUNet, segment: Segment, state: ForwardState, layouts: Mapping[str, Layout]
) -> list[list[str]]:
    """Return the segment's layers in the order in which they run, those with the same input grouped together."""
    names = [name for name in layouts if segment.contains(name)]
    inputs: list[tuple[str, Tensor]] = []

    def make_hook(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: inputs.append((name, args[0]))

    hooks = [unet.unet.get_submodule(name).register_forward_pre_hook(make_hook(name)) for name in names]
    segment.run(unet.unet, state.copy())
    for hook in hooks:
        hook.remove()
    # A shortcut runs last in its resnet, but conv2, which is added to it, has to compensate for its error.
    inputs.sort(key=lambda name_and_input: not name_and_input[0].endswith(".conv_shortcut"))
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in inputs:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [group for _, group in groups]


def find_residual_source(name: str) -> str | None:
    """Return the module whose input is the residual stream that a layer's output is added to; None for other layers."""
    if name.endswith(".conv2"):
        return f"{name.removesuffix('.conv2')}.norm1"
    for suffix, norm in RESIDUAL_SOURCES.items():
        if name.endswith(f".{suffix}"):
            return f"{name.removesuffix(f'.{suffix}')}.{norm}"
    return None


def attention_residual_tokens(state: ForwardState) -> Tensor:
    """Return what the current attention block's output is added to, [R L, C]."""
    assert state.attention_residual is not None
    return flatten_output_tokens(state.attention_residual.float())


def run_segment(segment: Segment, unet: UNet2DConditionModel, state: ForwardState, dtype: torch.dtype) -> ForwardState:
    """Return the state after a segment, its feature maps stored as `dtype`."""
    next_state = state.copy()
    segment.run(unet, next_state)
    next_state.store_as(dtype)
    return next_state


@torch.no_grad()
def iter_layer_inputs(
    unet: SegmentedUNet, inputs: UNetInputs, names: list[str], tokens: int = LAYER_INPUT_TOKENS
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each layer and some of its inputs [N, K] in the float model, segment by segment."""
    batch_size = segment_batch_size(inputs.latents)
    batches = zip(*(torch.split(x, batch_size) for x in (inputs.latents, inputs.times, inputs.context)), strict=True)
    states = [ForwardState.from_inputs(*(tensor.to(unet.device) for tensor in batch)) for batch in batches]
    generator = torch.Generator().manual_seed(0)
    for segment in unet.segments:
        unet.load(segment)
        segment_names = [name for name in names if segment.contains(name)]
        chosen: dict[str, list[Tensor]] = {name: [] for name in segment_names}
        for state in states if segment_names else []:
            records = record_activations(unet.unet, segment, state, set(segment_names), "")
            for name in segment_names:
                x, count = records[name][0], len(flatten_output_tokens(records[name][1]))
                rows = torch.randperm(count, generator=generator)[: max(1, tokens // len(states))].to(x.device)
                chosen[name].append(gather_input_tokens(get_layer(unet.unet, name), x, rows))
        yield from ((name, torch.cat(x)) for name, x in chosen.items())
        for state in states:
            segment.run(unet.unet, state)
        unet.unload(segment)
