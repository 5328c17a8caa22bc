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

from tinysd_batch.model.checkpoint.folder import KEEP_ON_META
from tinysd_batch.model.offload.components import named_places

Kind = Literal["start", "resnet", "proj_in", "inner", "proj_out", "resampler", "end"]
INNER = (("norm1", "attn1"), ("norm2", "attn2"), ("norm3", "ff"))  # of a transformer block: each adds to its input


@dataclass(slots=True)
class State:
    """Some rows on their way through the UNet."""

    hidden: Tensor  # [R, C, h, w]; at first the latents, at last the predicted noise
    times: Tensor  # [R]
    context: Tensor  # [R, T, D]
    skips: list[Tensor]
    embedding: Tensor | None = None  # [R, 4 C0], of the times
    outer: Tensor | None = None  # within an attention block: its input [R, C, h, w], to be added in the end

    @classmethod
    def of(cls, latents: Tensor, times: Tensor, context: Tensor) -> Self:
        return cls(latents, times, context, [])

    def copy(self) -> "State":
        """The same, ready to work: hidden as float32, in a list of skips of its own."""
        return State(self.hidden.float(), self.times, self.context, list(self.skips), self.embedding, self.outer)

    def wait_as(self, dtype: torch.dtype) -> None:
        """Keep the maps in another type until they are worked on."""
        shared = bool(self.skips) and self.skips[-1] is self.hidden
        self.hidden = self.hidden.to(dtype)
        if shared:
            self.skips[-1] = self.hidden
        if self.outer is not None:
            self.outer = self.outer.to(dtype)

    def nbytes(self) -> int:
        maps = (self.hidden, *self.skips, *(() if self.outer is None else (self.outer,)))
        return sum(one.numel() * one.element_size() for one in maps)


@dataclass(frozen=True, slots=True)
class Unit:
    """A step of the walk. Its modules are those of `paths`, and those within."""

    kind: Kind
    paths: tuple[str, ...]
    takes_skip: bool = False
    leaves_skip: bool = False

    @property
    def name(self) -> str:
        return self.paths[0]

    def holds(self, name: str) -> bool:
        """Whether a module is one of the unit's."""
        return any(name == path or name.startswith(f"{path}.") for path in self.paths)

    def join(self, state: State) -> None:
        """Take a skip along, where the unit does."""
        if self.takes_skip:
            state.hidden = torch.cat([state.hidden, state.skips.pop().to(state.hidden.dtype)], dim=1)

    def run(self, unet: UNet2DConditionModel, state: State) -> None:
        """Bring a state one unit further."""
        self.join(state)
        RUN[self.kind](unet, [unet.get_submodule(path) for path in self.paths], state)
        if self.leaves_skip:
            state.skips.append(state.hidden)

    def run_for(self, unet: UNet2DConditionModel, state: State, name: str) -> None:
        """The same, for the sake of one module: a resnet's shortcut needs nothing else of it."""
        if name.endswith(".conv_shortcut"):
            self.join(state)
            unet.get_submodule(name)(state.hidden)
        else:
            self.run(unet, state)


def run_start(unet: UNet2DConditionModel, _: Sequence[nn.Module], state: State) -> None:
    state.embedding = unet.time_embedding(unet.time_proj(state.times).to(state.hidden.dtype))
    state.hidden = unet.conv_in(state.hidden)


def run_resnet(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: State) -> None:
    state.hidden = modules[0](state.hidden, state.embedding)


def run_proj_in(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: State) -> None:
    norm, layer = modules
    state.outer = state.hidden
    state.hidden = project(layer, norm(state.hidden))


def run_inner(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: State) -> None:
    norm, module = modules
    tokens = state.hidden.flatten(2).transpose(1, 2)
    context = {"encoder_hidden_states": state.context} if getattr(module, "is_cross_attention", False) else {}
    added = module(norm(tokens), **context)
    state.hidden = (added + tokens).transpose(1, 2).reshape(state.hidden.shape)


def run_proj_out(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: State) -> None:
    assert state.outer is not None
    state.hidden = project(modules[0], state.hidden) + state.outer
    state.outer = None


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """A map [R, C, h, w] by a 1x1 convolution, or by a linear layer as some models have it."""
    of_map = isinstance(layer, nn.Conv2d)
    return torch.as_tensor(layer(x) if of_map else layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def run_resampler(_: UNet2DConditionModel, modules: Sequence[nn.Module], state: State) -> None:
    state.hidden = modules[0](state.hidden)


def run_end(unet: UNet2DConditionModel, _: Sequence[nn.Module], state: State) -> None:
    state.hidden = unet.conv_out(unet.conv_act(unet.conv_norm_out(state.hidden)))


RUN: dict[Kind, Callable[[UNet2DConditionModel, Sequence[nn.Module], State], None]] = {
    "start": run_start, "resnet": run_resnet, "proj_in": run_proj_in, "inner": run_inner, "proj_out": run_proj_out,
    "resampler": run_resampler, "end": run_end,
}  # fmt: skip


def units_of(unet: UNet2DConditionModel) -> list[Unit]:
    """All units, in forward order."""
    found = [Unit("start", ("conv_in", "time_embedding"), leaves_skip=True)]
    for number, block in enumerate(unet.down_blocks):
        found += block_units(f"down_blocks.{number}", block)
    if unet.mid_block is not None:
        found += middle_units(unet.mid_block)
    for number, block in enumerate(unet.up_blocks):
        found += block_units(f"up_blocks.{number}", block)
    return [*found, Unit("end", ("conv_norm_out", "conv_out"))]


def block_units(path: str, block: Any) -> Iterator[Unit]:
    goes_up = path.startswith("up")
    attentions = getattr(block, "attentions", None)
    for number, _ in enumerate(block.resnets):
        yield Unit("resnet", (f"{path}.resnets.{number}",), goes_up, not goes_up and not attentions)
        if attentions:
            yield from attention_units(f"{path}.attentions.{number}", attentions[number], leaves_skip=not goes_up)
    kind = "upsamplers" if goes_up else "downsamplers"
    for number in range(len(getattr(block, kind, None) or ())):
        yield Unit("resampler", (f"{path}.{kind}.{number}",), leaves_skip=not goes_up)


def middle_units(block: Any) -> Iterator[Unit]:
    yield Unit("resnet", ("mid_block.resnets.0",))
    for number, attention in enumerate(block.attentions):
        yield from attention_units(f"mid_block.attentions.{number}", attention, leaves_skip=False)
        yield Unit("resnet", (f"mid_block.resnets.{number + 1}",))


def attention_units(path: str, attention: Any, *, leaves_skip: bool) -> Iterator[Unit]:
    yield Unit("proj_in", (f"{path}.norm", f"{path}.proj_in"))
    for number, _ in enumerate(attention.transformer_blocks):
        block = f"{path}.transformer_blocks.{number}"
        yield from (Unit("inner", (f"{block}.{norm}", f"{block}.{inner}")) for norm, inner in INNER)
    yield Unit("proj_out", (f"{path}.proj_out",), leaves_skip=leaves_skip)


class Walker:
    """A UNet with the weights of one unit at a time, as float32 on a device, from mapped tensors.

    `release` takes what was read of them out of memory again; it is called when a unit leaves.
    """

    def __init__(
        self, config: Mapping[str, object], tensors: Mapping[str, Tensor], device: torch.device,
        release: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        with KEEP_ON_META:
            self.unet = UNet2DConditionModel.from_config(dict(config)).eval().requires_grad_(False)
        self.tensors = tensors
        self.device = device
        self.release = release
        self.units = units_of(self.unet)

    def load(self, unit: Unit) -> None:
        for name, module, leaf, _ in self.places(unit):
            value = self.tensors[name].to(self.device, torch.float32)
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def unload(self, unit: Unit) -> None:
        for _, module, leaf, value in self.places(unit):
            module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)
        self.release()

    def places(self, unit: Unit) -> list[tuple[str, nn.Module, str, Tensor]]:
        return [
            (f"{path}.{name}", module, leaf, value)
            for path in unit.paths
            for name, module, leaf, value in named_places(self.unet.get_submodule(path))
        ]

    @torch.no_grad()
    def predict(self, latents: Tensor, times: Tensor, context: Tensor, rows: int) -> Tensor:
        """The noise in latents [R, 4, h, w] at times [R], on the host; `rows` go through a unit at once."""
        states = [
            State.of(*(part.to(self.device) for part in parts))
            for parts in zip(*(torch.split(one, rows) for one in (latents, times, context)), strict=True)
        ]
        for unit in self.units:
            self.load(unit)
            for state in states:
                unit.run(self.unet, state)
            self.unload(unit)
        return torch.cat([state.hidden.cpu() for state in states])


def rows_at_once(latents: Tensor) -> int:
    """How many rows [R, 4, h, w] go through a unit together: few of large pictures."""
    return max(2, 2**14 // (latents.shape[-1] * latents.shape[-2]))
