"""The UNet as units in forward order (a resnet, an attention block, a resampler), one of them in memory at a time.

What passes between units is a `State`. So calibration can walk a UNet of any size with the floats of one unit, and keep
the states of all calibration rows between two units.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tinysd_batch.model.checkpoint import KEEP_ON_META
from tinysd_batch.model.fragments import named_places

Kind = Literal["start", "resnet", "attention", "resampler", "end"]


@dataclass(slots=True)
class State:
    """Some rows on their way through the UNet."""

    hidden: Tensor  # [R, C, h, w]; at first the latents, at last the predicted noise
    times: Tensor  # [R]
    context: Tensor  # [R, T, D]
    skips: list[Tensor]
    embedding: Tensor | None = None  # [R, 4 C0], of the times

    @classmethod
    def of(cls, latents: Tensor, times: Tensor, context: Tensor) -> Self:
        return cls(latents, times, context, [])

    def copy(self) -> "State":
        """The same, ready to work: hidden as float32, in a list of skips of its own."""
        return State(self.hidden.float(), self.times, self.context, list(self.skips), self.embedding)

    def wait_as(self, dtype: torch.dtype) -> None:
        """Keep the maps in another type until they are worked on."""
        shared = bool(self.skips) and self.skips[-1] is self.hidden
        self.hidden = self.hidden.to(dtype)
        if shared:
            self.skips[-1] = self.hidden

    def nbytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in (self.hidden, *self.skips))


@dataclass(frozen=True, slots=True)
class Unit:
    """A step of the walk. Its modules' names begin with one of `paths`."""

    kind: Kind
    paths: tuple[str, ...]
    takes_skip: bool = False
    leaves_skip: bool = False

    @property
    def name(self) -> str:
        return self.paths[0]

    def run(self, unet: UNet2DConditionModel, state: State) -> None:
        """Bring a state one unit further."""
        if self.takes_skip:
            state.hidden = torch.cat([state.hidden, state.skips.pop().to(state.hidden.dtype)], dim=1)
        match self.kind:
            case "start":
                state.embedding = unet.time_embedding(unet.time_proj(state.times).to(state.hidden.dtype))
                state.hidden = unet.conv_in(state.hidden)
            case "resnet":
                state.hidden = unet.get_submodule(self.name)(state.hidden, state.embedding)
            case "attention":
                module = unet.get_submodule(self.name)
                state.hidden = module(state.hidden, encoder_hidden_states=state.context, return_dict=False)[0]
            case "resampler":
                state.hidden = unet.get_submodule(self.name)(state.hidden)
            case "end":
                state.hidden = unet.conv_out(unet.conv_act(unet.conv_norm_out(state.hidden)))
        if self.leaves_skip:
            state.skips.append(state.hidden)


def units_of(unet: UNet2DConditionModel) -> list[Unit]:
    """All units, in forward order."""
    found = [Unit("start", ("conv_in", "time_embedding"), leaves_skip=True)]
    for number, block in enumerate(unet.down_blocks):
        found += block_units(f"down_blocks.{number}", block)
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
            yield Unit("attention", (f"{path}.attentions.{number}",), leaves_skip=not goes_up)
    kind = "upsamplers" if goes_up else "downsamplers"
    for number in range(len(getattr(block, kind, None) or ())):
        yield Unit("resampler", (f"{path}.{kind}.{number}",), leaves_skip=not goes_up)


def middle_units(block: Any) -> Iterator[Unit]:
    yield Unit("resnet", ("mid_block.resnets.0",))
    for number, _ in enumerate(block.attentions):
        yield Unit("attention", (f"mid_block.attentions.{number}",))
        yield Unit("resnet", (f"mid_block.resnets.{number + 1}",))


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
