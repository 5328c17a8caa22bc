"""What the planner knows of a stage: shapes, execution strategies, memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinysd_batch.model.chunking import DEFAULT_CHUNK_BYTES
from tinysd_batch.model.offload.components import Component

UNET_STAGE = "UNet"


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """A batch as the UNet sees it."""

    rows: int  # two an image with guidance
    height: int  # pixels
    width: int
    tokens: int
    prompts: int = 2  # different ones; with guidance the negative ones count, too


@dataclass(frozen=True, slots=True)
class ExecutionStrategy:
    """How a phase does its work, from the fastest way to the one that takes least memory."""

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    rows: int | None = None  # through the UNet at once; None: all
    float16_maps: bool = False  # the autoencoder keeps its feature maps as float16
    recompute_maps: bool = False  # the autoencoder makes its largest maps each time it looks at them


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a phase takes of the device, in bytes."""

    name: str
    components: tuple[Component, ...]
    strategy: ExecutionStrategy
    weight_budget_bytes: int | None  # for weights; None: no limit
    weight_bytes: int
    resident_bytes: int  # of the weights, for the whole phase
    buffer_bytes: int  # through which the others pass
    work: int  # all other tensors at their peak
    context_bytes: int
    gaps: int = 0  # that torch's allocator leaves between the tensors of work

    @property
    def uses_small_chunks(self) -> bool:
        return self.strategy.chunk_bytes < DEFAULT_CHUNK_BYTES

    @property
    def peak_bytes(self) -> int:
        return self.context_bytes + self.resident_bytes + self.buffer_bytes + self.work + self.gaps


@dataclass(frozen=True, slots=True)
class Stage:
    """A phase before it is decided how it does its work."""

    name: str
    components: tuple[Component, ...]
    shape: MicroBatchShape | None
    ways: Sequence[ExecutionStrategy]
    run: Callable[[ExecutionStrategy], object]  # does it on the meta device


def feature_map_dtype(way: ExecutionStrategy) -> torch.dtype | None:
    return torch.float16 if way.float16_maps else None
