"""What the planner works with: the shape of a micro-batch, stages, execution strategies and plans."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinysd_batch.model.chunking import DEFAULT_CHUNK_BYTES
from tinysd_batch.model.offload.components import Component

UNET_STAGE = "UNet"


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """A micro-batch as the UNet sees it."""

    rows: int  # with guidance, two per image
    height: int  # pixels
    width: int
    tokens: int
    prompts: int = 2  # distinct prompts; with guidance, negative prompts count, too


@dataclass(frozen=True, slots=True)
class ExecutionStrategy:
    """How a stage is executed. Strategies are tried from the fastest to the one that needs the least memory."""

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    rows: int | None = None  # rows that go through the UNet at once; None: all
    float16_maps: bool = False  # the VAE stores its feature maps as float16
    recompute_maps: bool = False  # the VAE recomputes its largest feature maps each time it reads them


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How a stage will be executed, and the device memory that it takes."""

    name: str
    components: tuple[Component, ...]
    strategy: ExecutionStrategy
    weight_budget_bytes: int | None  # limit for resident weights and buffers; None: no limit
    weight_bytes: int
    resident_bytes: int  # weights that stay on the device for the whole stage
    buffer_bytes: int  # buffers that the other weights are streamed through
    activation_bytes: int  # peak of all other tensors
    context_bytes: int  # CUDA context and library workspaces
    fragmentation_bytes: int = 0  # reserve for memory that torch's allocator leaves unused between tensors

    @property
    def uses_small_chunks(self) -> bool:
        return self.strategy.chunk_bytes < DEFAULT_CHUNK_BYTES

    @property
    def peak_bytes(self) -> int:
        on_device = self.resident_bytes + self.buffer_bytes + self.activation_bytes
        return self.context_bytes + on_device + self.fragmentation_bytes


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of generation (text encoding, denoising or decoding) with the strategies to choose from."""

    name: str
    components: tuple[Component, ...]
    shape: MicroBatchShape | None
    strategies: Sequence[ExecutionStrategy]
    run: Callable[[ExecutionStrategy], object]  # runs the stage on the meta device


def feature_map_dtype(strategy: ExecutionStrategy) -> torch.dtype | None:
    return torch.float16 if strategy.float16_maps else None
