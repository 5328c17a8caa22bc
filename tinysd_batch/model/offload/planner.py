"""Choose for each stage an execution strategy that fits a device memory budget.

A strategy decides which weights stay on the device, which are streamed, and how large the chunks of work are.
Activation memory is measured by running the stage on the meta device, where tensors have shapes but no data: the
largest sum of the sizes of all live tensors is the peak. Weights are counted as the offloader will place them.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tinysd_batch.errors import ModelError, UsageError
from tinysd_batch.model.chunking import DEFAULT_CHUNK_BYTES, MIN_CHUNK_BYTES, SMALL_CHUNK_BYTES, limit_chunk_bytes
from tinysd_batch.model.device.cuda_overhead import limit_torch_memory, measure_cuda_overhead
from tinysd_batch.model.device.malloc import set_mmap_threshold
from tinysd_batch.model.nn.unet import run_unet
from tinysd_batch.model.nn.vae_decoder import decode_single
from tinysd_batch.model.offload.peak_memory import PeakMemoryTracker
from tinysd_batch.model.offload.planned_model import PlannedModel
from tinysd_batch.model.offload.stage_estimate import (
    UNET_STAGE,
    ExecutionStrategy,
    MicroBatchShape,
    Stage,
    StagePlan,
    feature_map_dtype,
)
from tinysd_batch.model.packed.dequantize import SCRATCH, estimate_for_device
from tinysd_batch.model.packed.layers import iterate_packed_layers, required_scratch_bytes

# The cuBLAS workspace used under a budget on every GPU: torch's default up to Ampere.
CUBLAS_WORKSPACE_VARIABLE, SMALL_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8"
# Reserve for memory that torch's allocator leaves unused on a GPU: a share of the activations, doubled up to the
# maximum after out-of-memory, and one allocator segment, because tensors of 1 to 10 MB come from whole segments.
# Resident weights lie in one block and need no reserve.
FRAGMENTATION_SHARE, MAX_FRAGMENTATION_SHARE, ALLOCATOR_SEGMENT_BYTES = 1 / 8, 1 / 2, 20 * 2**20
# On the CPU larger tensors are allocated with mmap. What a step at 512x512 uses is worth keeping for the next step.
MMAP_THRESHOLD_BYTES, UNET_MMAP_THRESHOLD_BYTES, TIGHT_MMAP_THRESHOLD_BYTES = 2**22, 2**23, 2**17
META = torch.device("meta")
ACTIVATION_BYTES_CACHE: dict[tuple[Any, ...], int] = {}  # by model, stage, shape and strategy, for this process


class Planner:
    """Choose the execution strategy of each stage of a model."""

    def __init__(self, model: PlannedModel, budget_bytes: int | None) -> None:
        self.model = model
        self.budget_bytes = budget_bytes
        is_gpu = model.device.type == "cuda"
        if budget_bytes is not None and is_gpu:
            os.environ.setdefault(CUBLAS_WORKSPACE_VARIABLE, SMALL_CUBLAS_WORKSPACE)  # cuBLAS reads it at its first use
        self.overhead = measure_cuda_overhead(model.device, model.dtype)
        self.context_bytes = self.overhead.context_bytes + self.overhead.workspace_bytes
        self.fragmentation_share = FRAGMENTATION_SHARE if is_gpu else 0.0
        self.segment_bytes = ALLOCATOR_SEGMENT_BYTES if is_gpu else 0
        self.max_chunk_bytes = DEFAULT_CHUNK_BYTES  # strategies with larger chunks are skipped
        self.plans: dict[tuple[Any, ...], StagePlan] = {}

    @property
    def torch_budget_bytes(self) -> int | None:
        """What torch may allocate on a GPU within the budget."""
        return None if self.budget_bytes is None else max(0, self.budget_bytes - self.overhead.context_bytes)

    def check_budget(self) -> None:
        """Raise ModelError if not even one image of the model's native size fits the budget."""
        side = self.model.info.native_px
        try:
            self.plan_stages(MicroBatchShape(1, side, side, self.model.info.max_tokens))
        except UsageError as error:
            hint = "; leave turbo out" if self.keeps_dequantized_weights() else ""
            raise ModelError(f"{error}{hint}") from None

    def keeps_dequantized_weights(self) -> bool:
        return any(layer.keeps_dequantized for layer in iterate_packed_layers(self.model.unet))

    def increase_fragmentation_share(self) -> bool:
        """Plan with a larger fragmentation reserve from now on. Returns False if it cannot be increased any more."""
        if self.torch_budget_bytes is None or not 0 < self.fragmentation_share < MAX_FRAGMENTATION_SHARE:
            return False
        self.fragmentation_share *= 2
        self.plans.clear()
        return True

    def plan_stages(self, shape: MicroBatchShape) -> list[StagePlan]:
        """Plan all three stages, and measure them even without a budget. Raises UsageError as `plan` does."""
        return [self.plan(stage, measured=True) for stage in self.stages(shape)]

    def estimate_min_budget(self, shape: MicroBatchShape) -> int:
        """Return the smallest budget in which such a micro-batch can be generated, in bytes."""
        return max(min(plan.peak_bytes for plan in self.candidate_plans(stage, 0)) for stage in self.stages(shape))

    def stages(self, shape: MicroBatchShape) -> list[Stage]:
        return [self.encode_stage(), self.denoise_stage(shape), self.decode_stage(shape)]

    def encode_stage(self) -> Stage:
        model = self.model

        def run(_: ExecutionStrategy) -> None:
            model.text_encoder(torch.zeros(1, model.info.max_tokens, dtype=torch.long))

        return Stage("text encoder", (model.text_fragment,), None, [ExecutionStrategy()], run)

    def denoise_stage(self, shape: MicroBatchShape) -> Stage:
        model = self.model
        max_rows = min(model.unet_bs or shape.rows, shape.rows)
        fewer_rows = [rows for power in range(max_rows.bit_length()) if (rows := max_rows >> power) < max_rows]
        strategies = [
            ExecutionStrategy(DEFAULT_CHUNK_BYTES, max_rows),
            *(ExecutionStrategy(SMALL_CHUNK_BYTES, rows) for rows in (max_rows, *fewer_rows)),
            ExecutionStrategy(MIN_CHUNK_BYTES, 1),
        ]

        def run(strategy: ExecutionStrategy) -> None:
            rows = min(shape.rows, 2 * strategy.rows) if strategy.rows else shape.rows  # further rows repeat the same
            latents = torch.empty(rows, model.info.latent_channels, *self.latent_size(shape))
            model.precomputed.use_meta_tensors(shape.prompts, shape.tokens, model.dtype)
            run_unet(model.unet, latents, torch.zeros(rows, dtype=torch.long), strategy.rows, model.dtype)
            model.precomputed.forget()

        return Stage(UNET_STAGE, (model.encode_fragment, model.decode_fragment), shape, strategies, run)

    def decode_stage(self, shape: MicroBatchShape) -> Stage:
        model = self.model

        def run(strategy: ExecutionStrategy) -> None:
            latents = torch.empty(1, model.info.latent_channels, *self.latent_size(shape), dtype=model.dtype)
            decode_single(model.vae, latents, feature_map_dtype(strategy), recompute=strategy.recompute_maps).float()

        strategies = [
            ExecutionStrategy(),
            ExecutionStrategy(SMALL_CHUNK_BYTES),
            ExecutionStrategy(SMALL_CHUNK_BYTES, float16_maps=True),
            ExecutionStrategy(MIN_CHUNK_BYTES, float16_maps=True),
            ExecutionStrategy(MIN_CHUNK_BYTES, float16_maps=True, recompute_maps=True),
        ]
        shape = replace(shape, rows=1, tokens=0, prompts=0)
        return Stage("VAE decoder", (model.vae_fragment,), shape, strategies, run)

    def latent_size(self, shape: MicroBatchShape) -> tuple[int, int]:
        return shape.height // self.model.info.vae_scale_factor, shape.width // self.model.info.vae_scale_factor

    def plan(self, stage: Stage, *, measured: bool = False) -> StagePlan:
        """Choose the first strategy with all weights resident; otherwise the first that fits with streamed weights.

        Without a budget there is nothing to choose, and activation memory is measured only if `measured` is set.

        Raises:
            UsageError: no strategy fits. The message states the smallest budget that would do.
        """
        if self.budget_bytes is None and not measured:
            nbytes = sum(component.nbytes for component in stage.components)
            strategy = self.allowed_strategies(stage)[0]
            return StagePlan(stage.name, stage.components, strategy, None, nbytes, nbytes, 0, 0, self.context_bytes)
        model = self.model
        settings = model.unet_bs, model.attention.fused, model.offloader.stream_all_weights, self.max_chunk_bytes
        key = stage.name, stage.shape, model.dtype, *settings
        if key not in self.plans:
            self.plans[key] = self.first_that_fits(stage)
        return self.plans[key]

    def first_that_fits(self, stage: Stage) -> StagePlan:
        budget = self.budget_bytes
        others: list[StagePlan] = []
        for plan in self.candidate_plans(stage, budget):
            fits_resident = budget is None or (plan.resident_bytes == plan.weight_bytes and plan.peak_bytes <= budget)
            # Recomputing costs more than streaming the VAE's weights, which happens only once per image.
            if fits_resident and not plan.strategy.recompute_maps:
                return plan
            others.append(plan)
        assert budget is not None, stage.name
        smallest = min(others, key=lambda plan: plan.peak_bytes)
        # What it takes with the usual reserve, even if the reserve was increased since.
        extra_share = max(0, self.fragmentation_share - FRAGMENTATION_SHARE)
        required = smallest.peak_bytes - int(extra_share * smallest.activation_bytes)
        if required > budget:
            task = f"generating {stage.shape.width}x{stage.shape.height}" if stage.shape else "encoding a prompt"
            raise UsageError(
                f"vram_budget = {budget / 1e6:.1f} MB: {task} takes at least {required / 1e6:.1f} MB with this model, "
                f"in the {stage.name}, even when weights are streamed through the smallest buffers"
            )
        return next((plan for plan in others if plan.peak_bytes <= budget), smallest)

    def candidate_plans(self, stage: Stage, budget: int | None) -> Iterator[StagePlan]:
        """Plan each strategy of a stage with as many resident weights as the budget allows."""
        weight_bytes = sum(component.nbytes for component in stage.components)
        for strategy in self.allowed_strategies(stage):
            activation_bytes = self.estimate_activation_bytes(stage, strategy)
            segments = self.segment_bytes * (2 if stage.name == UNET_STAGE else 1)  # a captured step has its own
            weight_budget = None
            if budget is not None:
                reserved = self.context_bytes + segments + activation_bytes * (1 + self.fragmentation_share)
                weight_budget = max(0, int(budget - reserved))
            resident, buffers = self.model.offloader.estimate_placement(stage.components, weight_budget)
            fragmentation = segments + int(self.fragmentation_share * activation_bytes)
            yield StagePlan(
                stage.name, stage.components, strategy, weight_budget, weight_bytes, resident, buffers,
                activation_bytes, self.context_bytes, fragmentation,
            )  # fmt: skip

    def allowed_strategies(self, stage: Stage) -> Sequence[ExecutionStrategy]:
        allowed = [strategy for strategy in stage.strategies if strategy.chunk_bytes <= self.max_chunk_bytes]
        return allowed or stage.strategies

    def estimate_activation_bytes(self, stage: Stage, strategy: ExecutionStrategy) -> int:
        """Return the peak of all tensors except weights, from the cache or by tracing."""
        model = self.model
        key = (
            model.info.digest, model.device.type, stage.name, stage.shape, strategy, model.dtype,
            model.attention.fused, self.keeps_dequantized_weights(),
        )  # fmt: skip
        if key not in ACTIVATION_BYTES_CACHE:
            ACTIVATION_BYTES_CACHE[key] = self.trace_activation_bytes(stage, strategy)
        return ACTIVATION_BYTES_CACHE[key]

    def trace_activation_bytes(self, stage: Stage, strategy: ExecutionStrategy) -> int:
        """Run a stage on the meta device and return the peak of all tensors except weights."""
        for component in stage.components:
            component.use_meta_tensors()
        SCRATCH.release(META)
        tracker = PeakMemoryTracker()
        try:
            with (
                torch.no_grad(),
                estimate_for_device(self.model.device),
                META,
                limit_chunk_bytes(strategy.chunk_bytes),
                tracker,
            ):
                for component in stage.components:
                    tracker.exclude(tensor.module_tensor for tensor in component.host_tensors)
                stage.run(strategy)
        finally:
            for component in stage.components:
                component.offload()
        return int(tracker.peak_bytes)

    @contextlib.contextmanager
    def executing(self, plan: StagePlan) -> Iterator[ExecutionStrategy]:
        """Make a stage's components ready to compute, as planned."""
        self.model.offloader.weight_budget_bytes = plan.weight_budget_bytes
        if self.model.device.type == "cpu" and not self.model.info.is_small:
            usual = UNET_MMAP_THRESHOLD_BYTES if plan.name == UNET_STAGE else MMAP_THRESHOLD_BYTES
            set_mmap_threshold(usual if self.budget_bytes is None else TIGHT_MMAP_THRESHOLD_BYTES)
        try:
            with self.within_budget(), limit_chunk_bytes(plan.strategy.chunk_bytes):
                self.reserve_scratch(plan)
                with self.model.offloader.holding(*plan.components):
                    yield plan.strategy
        finally:
            SCRATCH.release(self.model.device)

    def reserve_scratch(self, plan: StagePlan) -> None:
        """On a GPU, allocate the buffer to dequantize in first, before other tensors fragment the memory."""
        model = self.model
        if plan.name == UNET_STAGE and model.device.type == "cuda":
            SCRATCH.get_matrix(1, required_scratch_bytes(model.unet, model.dtype), torch.uint8, model.device)

    def preallocate(self, plan: StagePlan) -> None:
        """Allocate what the stage still needs as one block and free it, so that a graph's memory is cut from it.

        Otherwise each large tensor would get its own segment, where few others fit, and which is never returned.
        """
        if self.torch_budget_bytes is not None:
            device = self.model.device
            on_device = plan.resident_bytes + plan.buffer_bytes + plan.activation_bytes
            missing = on_device + self.overhead.workspace_bytes - torch.cuda.memory_allocated(device)
            torch.empty(max(0, missing), dtype=torch.uint8, device=device)

    @contextlib.contextmanager
    def capturing(self, plan: StagePlan, steps: int) -> Iterator[None]:
        """Prepare for capturing a step as a graph, which has its own memory, after so many eager steps."""
        self.preallocate(plan)
        with self.model.offloader.capturing(steps):
            yield

    @contextlib.contextmanager
    def within_budget(self) -> Iterator[None]:
        """Limit what torch may allocate on a GPU to the budget. Libraries then choose algorithms that fit."""
        device = self.model.device
        if self.torch_budget_bytes is None or device.type != "cuda":
            yield
            return
        torch.cuda.empty_cache()  # release what earlier stages allocated
        with limit_torch_memory(self.torch_budget_bytes, device):
            yield
