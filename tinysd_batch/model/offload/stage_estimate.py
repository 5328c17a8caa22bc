"""What the planner knows of a stage: shapes, execution strategies, memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinysd_batch.model.chunking import USUAL_BYTES
from tinysd_batch.model.offload.components import Fragment

UNET = "UNet"


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch as the UNet sees it."""

    rows: int  # two an image with guidance
    height: int  # pixels
    width: int
    tokens: int
    prompts: int = 2  # different ones; with guidance the negative ones count, too


@dataclass(frozen=True, slots=True)
class Way:
    """How a phase does its work, from the fastest way to the one that takes least memory."""

    part_bytes: int = USUAL_BYTES
    rows: int | None = None  # through the UNet at once; None: all
    half_maps: bool = False  # the autoencoder keeps its feature maps as float16
    makes_anew: bool = False  # the autoencoder makes its largest maps each time it looks at them


@dataclass(frozen=True, slots=True)
class Phase:
    """What a phase takes of the device, in bytes."""

    name: str
    fragments: tuple[Fragment, ...]
    way: Way
    room: int | None  # for weights; None: no limit
    weights: int
    staying: int  # of the weights, for the whole phase
    buffers: int  # through which the others pass
    work: int  # all other tensors at their peak
    context: int
    gaps: int = 0  # that torch's allocator leaves between the tensors of work

    @property
    def is_in_small_parts(self) -> bool:
        return self.way.part_bytes < USUAL_BYTES

    @property
    def peak(self) -> int:
        return self.context + self.staying + self.buffers + self.work + self.gaps


@dataclass(frozen=True, slots=True)
class Task:
    """A phase before it is decided how it does its work."""

    name: str
    fragments: tuple[Fragment, ...]
    shape: Shape | None
    ways: Sequence[Way]
    run: Callable[[Way], object]  # does it on the meta device


def kept_type(way: Way) -> torch.dtype | None:
    return torch.float16 if way.half_maps else None
