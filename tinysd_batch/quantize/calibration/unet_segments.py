"""The UNet as units in forward order (a resnet, a part of an attention block, a resampler), one in memory at a time.

What passes between units is a `State`. An attention block is cut at its residual connections, so that attention over
all pixels is not computed anew for each layer that comes after it. So calibration can walk a UNet of any size with the
floats of one unit, and keep the states of all calibration rows between two units.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tinysd_batch.model.checkpoint.folder import META_DEVICE
from tinysd_batch.model.offload.components import named_tensors

SegmentType = Literal["start", "resnet", "proj_in", "inner", "proj_out", "resampler", "end"]
TRANSFORMER_RESIDUALS = (
    ("norm1", "attn1"),
    ("norm2", "attn2"),
    ("norm3", "ff"),
)  # of a transformer block: each adds to its input


@dataclass(slots=True)
class ForwardState:
    """Some rows on their way through the UNet."""

    hidden_states: Tensor  # [R, C, h, w]; at first the latents, at last the predicted noise
    timesteps: Tensor  # [R]
    context: Tensor  # [R, T, D]
    skips: list[Tensor]
    time_embedding: Tensor | None = None  # [R, 4 C0], of the times
    attention_residual: Tensor | None = (
        None  # within an attention block: its input [R, C, h, w], to be added in the end
    )

    @classmethod
    def from_inputs(cls, latents: Tensor, times: Tensor, context: Tensor) -> Self:
        return cls(latents, times, context, [])

    def copy(self) -> "ForwardState":
        """The same, ready to work: hidden as float32, in a list of skips of its own."""
        return ForwardState(
            self.hidden_states.float(),
            self.timesteps,
            self.context,
            list(self.skips),
            self.time_embedding,
            self.attention_residual,
        )

    def store_as(self, dtype: torch.dtype) -> None:
        """Keep the maps in another type until they are worked on."""
        shared = bool(self.skips) and self.skips[-1] is self.hidden_states
        self.hidden_states = self.hidden_states.to(dtype)
        if shared:
            self.skips[-1] = self.hidden_states
        if self.attention_residual is not None:
            self.attention_residual = self.attention_residual.to(dtype)

    def nbytes(self) -> int:
        maps = (
            self.hidden_states,
            *self.skips,
            *(() if self.attention_residual is None else (self.attention_residual,)),
        )
        return sum(one.numel() * one.element_size() for one in maps)


@dataclass(frozen=True, slots=True)
class Segment:
    """A step of the walk. Its modules are those of `paths`, and those within."""

    type: SegmentType
    paths: tuple[str, ...]
    pops_skip: bool = False
    pushes_skip: bool = False

    @property
    def name(self) -> str:
        return self.paths[0]

    def contains(self, name: str) -> bool:
        """Whether a module is one of the unit's."""
        return any(name == path or name.startswith(f"{path}.") for path in self.paths)

    def concat_skip(self, state: ForwardState) -> None:
        """Take a skip along, where the unit does."""
        if self.pops_skip:
            state.hidden_states = torch.cat(
                [state.hidden_states, state.skips.pop().to(state.hidden_states.dtype)], dim=1
            )

    def run(self, unet: UNet2DConditionModel, state: ForwardState) -> None:
        """Bring a state one unit further."""
        self.concat_skip(state)
        RUNNERS[self.type](unet, [unet.get_submodule(path) for path in self.paths], state)
        if self.pushes_skip:
            state.skips.append(state.hidden_states)

    def run_for_module(self, unet: UNet2DConditionModel, state: ForwardState, name: str) -> None:
        """The same, for the sake of one module: a resnet's shortcut needs nothing else of it."""
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
    norm, layer = modules
    state.attention_residual = state.hidden_states
    state.hidden_states = apply_projection(layer, norm(state.hidden_states))


def run_transformer_residual(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: ForwardState) -> None:
    norm, module = modules
    tokens = state.hidden_states.flatten(2).transpose(1, 2)
    context = {"encoder_hidden_states": state.context} if getattr(module, "is_cross_attention", False) else {}
    added = module(norm(tokens), **context)
    state.hidden_states = (added + tokens).transpose(1, 2).reshape(state.hidden_states.shape)


def run_proj_out(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: ForwardState) -> None:
    assert state.attention_residual is not None
    state.hidden_states = apply_projection(modules[0], state.hidden_states) + state.attention_residual
    state.attention_residual = None


def apply_projection(layer: nn.Module, x: Tensor) -> Tensor:
    """A map [R, C, h, w] by a 1x1 convolution, or by a linear layer as some models have it."""
    of_map = isinstance(layer, nn.Conv2d)
    return torch.as_tensor(layer(x) if of_map else layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def run_resampler(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: ForwardState) -> None:
    state.hidden_states = modules[0](state.hidden_states)


def run_end(unet: UNet2DConditionModel, _: Sequence[nn.Module], state: ForwardState) -> None:
    state.hidden_states = unet.conv_out(unet.conv_act(unet.conv_norm_out(state.hidden_states)))


RUNNERS: dict[SegmentType, Callable[[UNet2DConditionModel, Sequence[nn.Module], ForwardState], None]] = {
    "start": run_start, "resnet": run_resnet, "proj_in": run_proj_in, "inner": run_transformer_residual, "proj_out": run_proj_out,
    "resampler": run_resampler, "end": run_end,
}  # fmt: skip


def split_into_segments(unet: UNet2DConditionModel) -> list[Segment]:
    """All units, in forward order."""
    found = [Segment("start", ("conv_in", "time_embedding"), pushes_skip=True)]
    for number, block in enumerate(unet.down_blocks):
        found += iter_block_segments(f"down_blocks.{number}", block)
    if unet.mid_block is not None:
        found += iter_mid_block_segments(unet.mid_block)
    for number, block in enumerate(unet.up_blocks):
        found += iter_block_segments(f"up_blocks.{number}", block)
    return [*found, Segment("end", ("conv_norm_out", "conv_out"))]


def iter_block_segments(path: str, block: Any) -> Iterator[Segment]:
    goes_up = path.startswith("up")
    attentions = getattr(block, "attentions", None)
    for number, _ in enumerate(block.resnets):
        yield Segment("resnet", (f"{path}.resnets.{number}",), goes_up, not goes_up and not attentions)
        if attentions:
            yield from iter_attention_segments(
                f"{path}.attentions.{number}", attentions[number], pushes_skip=not goes_up
            )
    kind = "upsamplers" if goes_up else "downsamplers"
    for number in range(len(getattr(block, kind, None) or ())):
        yield Segment("resampler", (f"{path}.{kind}.{number}",), pushes_skip=not goes_up)


def iter_mid_block_segments(block: Any) -> Iterator[Segment]:
    yield Segment("resnet", ("mid_block.resnets.0",))
    for number, attention in enumerate(block.attentions):
        yield from iter_attention_segments(f"mid_block.attentions.{number}", attention, pushes_skip=False)
        yield Segment("resnet", (f"mid_block.resnets.{number + 1}",))


def iter_attention_segments(path: str, attention: Any, *, pushes_skip: bool) -> Iterator[Segment]:
    yield Segment("proj_in", (f"{path}.norm", f"{path}.proj_in"))
    for number, _ in enumerate(attention.transformer_blocks):
        block = f"{path}.transformer_blocks.{number}"
        yield from (Segment("inner", (f"{block}.{norm}", f"{block}.{inner}")) for norm, inner in TRANSFORMER_RESIDUALS)
    yield Segment("proj_out", (f"{path}.proj_out",), pushes_skip=pushes_skip)


class SegmentedUNet:
    """A UNet with the weights of one unit at a time, as float32 on a device, from mapped tensors.

    `release` takes what was read of them out of memory again; it is called when a unit leaves.
    """

    def __init__(
        self, config: Mapping[str, object], tensors: Mapping[str, Tensor], device: torch.device,
        release: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        with META_DEVICE:
            self.unet = UNet2DConditionModel.from_config(dict(config)).eval().requires_grad_(False)
        self.tensors = tensors
        self.device = device
        self.release = release
        self.segments = split_into_segments(self.unet)

    def load(self, unit: Segment) -> None:
        for name, module, leaf, _ in self.list_parameters(unit):
            value = self.tensors[name].to(self.device, torch.float32)
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def unload(self, unit: Segment) -> None:
        for _, module, leaf, value in self.list_parameters(unit):
            module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)
        self.release()

    def list_parameters(self, unit: Segment) -> list[tuple[str, nn.Module, str, Tensor]]:
        return [
            (f"{path}.{name}", module, leaf, value)
            for path in unit.paths
            for name, module, leaf, value in named_tensors(self.unet.get_submodule(path))
        ]

    @torch.no_grad()
    def predict(self, latents: Tensor, times: Tensor, context: Tensor, rows: int) -> Tensor:
        """The noise in latents [R, 4, h, w] at times [R], on the host; `rows` go through a unit at once."""
        states = [
            ForwardState.from_inputs(*(part.to(self.device) for part in parts))
            for parts in zip(*(torch.split(one, rows) for one in (latents, times, context)), strict=True)
        ]
        for unit in self.segments:
            self.load(unit)
            for state in states:
                unit.run(self.unet, state)
            self.unload(unit)
        return torch.cat([state.hidden_states.cpu() for state in states])


def segment_batch_size(latents: Tensor) -> int:
    """How many rows [R, 4, h, w] go through a unit together: few of large pictures."""
    return max(2, 2**14 // (latents.shape[-1] * latents.shape[-2]))
