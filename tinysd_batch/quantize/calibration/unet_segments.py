"""Run the UNet segment by segment, with the weights of one segment in memory at a time.

A segment is a resnet, one residual of a transformer block, a projection of an attention block, or a resampler. Between
two segments everything that the forward pass needs later is in a `ForwardState`. Calibration can therefore walk a UNet
of any size with the float weights of one segment, and keep the states of all calibration inputs between segments.

Attention blocks are cut at their residual connections: attention over all pixels is then not recomputed for each of the
layers that follow it in the same block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tinysd_batch.model.checkpoint.folder import META_DEVICE
from tinysd_batch.model.offload.components import named_tensors

SegmentType = Literal["start", "resnet", "proj_in", "residual", "proj_out", "resampler", "end"]
# Norm and module of each residual of a transformer block: hidden states += module(norm(hidden states)).
TRANSFORMER_RESIDUALS = (("norm1", "attn1"), ("norm2", "attn2"), ("norm3", "ff"))


@dataclass(slots=True)
class ForwardState:
    """The forward pass of R UNet inputs between two segments."""

    hidden_states: Tensor  # [R, C, h, w]: the latents before the first segment, the predicted noise after the last
    timesteps: Tensor  # [R]
    context: Tensor  # [R, T, D], text embeddings
    skips: list[Tensor]  # outputs of the down blocks that up blocks concatenate
    time_embedding: Tensor | None = None  # [R, 4 C0]
    attention_residual: Tensor | None = None  # [R, C, h, w], input of the current attention block, added at its end

    @classmethod
    def from_inputs(cls, latents: Tensor, timesteps: Tensor, context: Tensor) -> Self:
        """Start a forward pass with latents [R, 4, h, w], timesteps [R] and context [R, T, D]."""
        return cls(latents, timesteps, context, [])

    def copy(self) -> "ForwardState":
        """Return a state to run a segment on: hidden states as float32, and a list of skips of its own."""
        return ForwardState(
            self.hidden_states.float(), self.timesteps, self.context, list(self.skips), self.time_embedding,
            self.attention_residual,
        )  # fmt: skip

    def store_as(self, dtype: torch.dtype) -> None:
        """Convert the feature maps to `dtype` until the next segment runs."""
        is_also_skip = bool(self.skips) and self.skips[-1] is self.hidden_states
        self.hidden_states = self.hidden_states.to(dtype)
        if is_also_skip:
            self.skips[-1] = self.hidden_states
        if self.attention_residual is not None:
            self.attention_residual = self.attention_residual.to(dtype)

    def nbytes(self) -> int:
        """Return the bytes of all feature maps."""
        maps = [self.hidden_states, *self.skips]
        if self.attention_residual is not None:
            maps.append(self.attention_residual)
        return sum(tensor.numel() * tensor.element_size() for tensor in maps)


@dataclass(frozen=True, slots=True)
class Segment:
    """One step of the walk through the UNet. Its modules are those at `paths`, with their submodules."""

    type: SegmentType
    paths: tuple[str, ...]
    pops_skip: bool = False
    pushes_skip: bool = False

    @property
    def name(self) -> str:
        return self.paths[0]

    def contains(self, name: str) -> bool:
        """Return whether the module called `name` belongs to the segment."""
        return any(name == path or name.startswith(f"{path}.") for path in self.paths)

    def concat_skip(self, state: ForwardState) -> None:
        """Concatenate the last skip to the hidden states, if the segment is one of an up block's resnets."""
        if self.pops_skip:
            skip = state.skips.pop().to(state.hidden_states.dtype)
            state.hidden_states = torch.cat([state.hidden_states, skip], dim=1)

    def run(self, unet: UNet2DConditionModel, state: ForwardState) -> None:
        """Advance a state by this segment, in place."""
        self.concat_skip(state)
        RUNNERS[self.type](unet, [unet.get_submodule(path) for path in self.paths], state)
        if self.pushes_skip:
            state.skips.append(state.hidden_states)

    def run_for_module(self, unet: UNet2DConditionModel, state: ForwardState, name: str) -> None:
        """Run what one module needs, in place: a resnet's shortcut needs nothing else of its resnet."""
        if name.endswith(".conv_shortcut"):
            self.concat_skip(state)
            unet.get_submodule(name)(state.hidden_states)
        else:
            self.run(unet, state)


def run_start(unet: UNet2DConditionModel, _: Sequence[nn.Module], state: ForwardState) -> None:
    state.time_embedding = unet.time_embedding(unet.time_proj(state.timesteps).to(state.hidden_states.dtype))
    state.hidden_states = unet.conv_in(state.hidden_states)


def run_resnet(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: ForwardState) -> None:
    state.hidden_states = modules[0](state.hidden_states, state.time_embedding)


def run_proj_in(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: ForwardState) -> None:
    norm, projection = modules
    state.attention_residual = state.hidden_states
    state.hidden_states = apply_projection(projection, norm(state.hidden_states))


def run_transformer_residual(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: ForwardState) -> None:
    norm, module = modules
    tokens = state.hidden_states.flatten(2).transpose(1, 2)
    context = {"encoder_hidden_states": state.context} if getattr(module, "is_cross_attention", False) else {}
    residual = module(norm(tokens), **context)
    state.hidden_states = (residual + tokens).transpose(1, 2).reshape(state.hidden_states.shape)


def run_proj_out(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: ForwardState) -> None:
    assert state.attention_residual is not None
    state.hidden_states = apply_projection(modules[0], state.hidden_states) + state.attention_residual
    state.attention_residual = None


def apply_projection(layer: nn.Module, x: Tensor) -> Tensor:
    """Project feature maps [R, C, h, w] by a 1x1 convolution, or by a linear layer (`use_linear_projection`)."""
    if isinstance(layer, nn.Conv2d):
        return torch.as_tensor(layer(x))
    return torch.as_tensor(layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def run_resampler(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: ForwardState) -> None:
    state.hidden_states = modules[0](state.hidden_states)


def run_end(unet: UNet2DConditionModel, _: Sequence[nn.Module], state: ForwardState) -> None:
    state.hidden_states = unet.conv_out(unet.conv_act(unet.conv_norm_out(state.hidden_states)))


RUNNERS: dict[SegmentType, Callable[[UNet2DConditionModel, Sequence[nn.Module], ForwardState], None]] = {
    "start": run_start,
    "resnet": run_resnet,
    "proj_in": run_proj_in,
    "residual": run_transformer_residual,
    "proj_out": run_proj_out,
    "resampler": run_resampler,
    "end": run_end,
}


def split_into_segments(unet: UNet2DConditionModel) -> list[Segment]:
    """Return all segments of a UNet, in forward order."""
    segments = [Segment("start", ("conv_in", "time_embedding"), pushes_skip=True)]
    for number, block in enumerate(unet.down_blocks):
        segments += iter_block_segments(f"down_blocks.{number}", block)
    if unet.mid_block is not None:
        segments += iter_mid_block_segments(unet.mid_block)
    for number, block in enumerate(unet.up_blocks):
        segments += iter_block_segments(f"up_blocks.{number}", block)
    return [*segments, Segment("end", ("conv_norm_out", "conv_out"))]


def iter_block_segments(path: str, block: Any) -> Iterator[Segment]:
    """Yield the segments of a down block or an up block."""
    is_up = path.startswith("up")
    attentions = getattr(block, "attentions", None)
    for number, _ in enumerate(block.resnets):
        yield Segment("resnet", (f"{path}.resnets.{number}",), is_up, not is_up and not attentions)
        if attentions:
            attention_path = f"{path}.attentions.{number}"
            yield from iter_attention_segments(attention_path, attentions[number], pushes_skip=not is_up)
    resamplers = "upsamplers" if is_up else "downsamplers"
    for number in range(len(getattr(block, resamplers, None) or ())):
        yield Segment("resampler", (f"{path}.{resamplers}.{number}",), pushes_skip=not is_up)


def iter_mid_block_segments(block: Any) -> Iterator[Segment]:
    yield Segment("resnet", ("mid_block.resnets.0",))
    for number, attention in enumerate(block.attentions):
        yield from iter_attention_segments(f"mid_block.attentions.{number}", attention, pushes_skip=False)
        yield Segment("resnet", (f"mid_block.resnets.{number + 1}",))


def iter_attention_segments(path: str, attention: Any, *, pushes_skip: bool) -> Iterator[Segment]:
    yield Segment("proj_in", (f"{path}.norm", f"{path}.proj_in"))
    for number, _ in enumerate(attention.transformer_blocks):
        block = f"{path}.transformer_blocks.{number}"
        for norm, module in TRANSFORMER_RESIDUALS:
            yield Segment("residual", (f"{block}.{norm}", f"{block}.{module}"))
    yield Segment("proj_out", (f"{path}.proj_out",), pushes_skip=pushes_skip)


class SegmentedUNet:
    """A UNet that holds the weights of one segment at a time, as float32 on a device.

    Args:
        config: The UNet's configuration, in diffusers' keys.
        tensors: Its weights, memory-mapped.
        device: Where segments run.
        release: Drops the pages of `tensors` that were read from this process's memory; called after each segment.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        device: torch.device,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        with META_DEVICE:
            self.unet = UNet2DConditionModel.from_config(dict(config)).eval().requires_grad_(False)
        self.tensors = tensors
        self.device = device
        self.release = release
        self.segments = split_into_segments(self.unet)

    def load(self, segment: Segment) -> None:
        """Read a segment's weights onto the device."""
        for name, module, leaf, _ in self.list_parameters(segment):
            value = self.tensors[name].to(self.device, torch.float32)
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def unload(self, segment: Segment) -> None:
        """Drop a segment's weights."""
        for _, module, leaf, value in self.list_parameters(segment):
            module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)
        self.release()

    def list_parameters(self, segment: Segment) -> list[tuple[str, nn.Module, str, Tensor]]:
        """Return full name, owning module, name in that module, and tensor of each parameter of a segment."""
        return [
            (f"{path}.{name}", module, leaf, value)
            for path in segment.paths
            for name, module, leaf, value in named_tensors(self.unet.get_submodule(path))
        ]

    @torch.no_grad()
    def predict(self, latents: Tensor, timesteps: Tensor, context: Tensor, batch_size: int) -> Tensor:
        """Predict the noise in latents [R, 4, h, w] at timesteps [R], `batch_size` inputs at a time; on the host."""
        batches = zip(*(torch.split(tensor, batch_size) for tensor in (latents, timesteps, context)), strict=True)
        states = [ForwardState.from_inputs(*(tensor.to(self.device) for tensor in batch)) for batch in batches]
        for segment in self.segments:
            self.load(segment)
            for state in states:
                segment.run(self.unet, state)
            self.unload(segment)
        return torch.cat([state.hidden_states.cpu() for state in states])


def segment_batch_size(latents: Tensor) -> int:
    """Return how many inputs of this size [R, 4, h, w] run through a segment together: fewer for larger images."""
    return max(2, 2**14 // (latents.shape[-1] * latents.shape[-2]))
