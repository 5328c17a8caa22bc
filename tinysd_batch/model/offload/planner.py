"""How a batch fits a budget of device memory: what stays there, what passes through, how large the parts of work are.

What the work itself takes is found by doing it on the meta device, where tensors have sizes and nothing else: every
tensor that is alive at a time counts, and the largest sum is the peak. Weights are counted as `residency` places them.
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

# What cuBLAS may take on every card in place of its own choice: what it takes on those up to Ampere.
CUBLAS_WORKSPACE_VARIABLE, SMALL_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8"
# What torch's allocator leaves unused on a card: of what work takes so much as a rule, doubled up to the most where
# memory ran out; and a segment of its size for tensors of 1 to 10 MB, of which it takes whole ones only. Weights lie in
# one piece.
FRAGMENTATION_SHARE, MAX_FRAGMENTATION_SHARE, ALLOCATOR_SEGMENT_BYTES = 1 / 8, 1 / 2, 20 * 2**20
# On the CPU larger tensors take memory of the system's own. What a step at 512x512 uses is worth keeping for the next.
MMAP_THRESHOLD_BYTES, UNET_MMAP_THRESHOLD_BYTES, TIGHT_MMAP_THRESHOLD_BYTES = 2**22, 2**23, 2**17
META = torch.device("meta")
ACTIVATION_BYTES_CACHE: dict[
    tuple[Any, ...], int
] = {}  # some integers for each model, shape and way that this process met


class Planner:
    """Chooses the way of each phase of a model."""

    def __init__(self, model: PlannedModel, budget_bytes: int | None) -> None:
        self.model = model
        self.budget_bytes = budget_bytes
        if budget_bytes is not None and model.device.type == "cuda":
            os.environ.setdefault(CUBLAS_WORKSPACE_VARIABLE, SMALL_CUBLAS_WORKSPACE)  # read when cuBLAS first works
        self.overhead = measure_cuda_overhead(model.device, model.dtype)
        self.context_bytes = self.overhead.context_bytes + self.overhead.workspace_bytes
        self.gaps, self.segment = (
            (FRAGMENTATION_SHARE, ALLOCATOR_SEGMENT_BYTES) if model.device.type == "cuda" else (0.0, 0)
        )
        self.max_chunk_bytes = DEFAULT_CHUNK_BYTES  # ways of larger parts are passed over
        self.plans: dict[tuple[Any, ...], StagePlan] = {}

    @property
    def torch_budget_bytes(self) -> int | None:
        """What torch may take of a card within the budget."""
        return None if self.budget_bytes is None else max(0, self.budget_bytes - self.overhead.context_bytes)

    def check_budget(self) -> None:
        """Raises ModelError where not even one image of the model's own size fits."""
        side = self.model.info.native_px
        try:
            self.plan_stages(MicroBatchShape(1, side, side, self.model.info.max_tokens))
        except UsageError as error:
            hint = (
                "; leave turbo out"
                if any(layer.keeps_dequantized for layer in iterate_packed_layers(self.model.unet))
                else ""
            )
            raise ModelError(f"{error}{hint}") from None

    def increase_fragmentation_share(self) -> bool:
        """In what is planned from now on, since they were too small; False where there is no more to be done."""
        if self.torch_budget_bytes is None or not 0 < self.gaps < MAX_FRAGMENTATION_SHARE:
            return False
        self.gaps *= 2
        self.plans.clear()
        return True

    def plan_stages(self, shape: MicroBatchShape) -> list[StagePlan]:
        """All three, measured even where there is no budget. Raises UsageError as `phase` does."""
        return [self.plan(task, measured=True) for task in self.stages(shape)]

    def estimate_min_budget(self, shape: MicroBatchShape) -> int:
        """The smallest budget in which such a batch can be drawn."""
        return max(min(one.peak_bytes for one in self.candidate_plans(task, 0)) for task in self.stages(shape))

    def stages(self, shape: MicroBatchShape) -> list[Stage]:
        return [self.encode_stage(), self.denoise_stage(shape), self.decode_stage(shape)]

    def encode_stage(self) -> Stage:
        model = self.model

        def run(_: ExecutionStrategy) -> None:
            model.text_encoder(torch.zeros(1, model.info.max_tokens, dtype=torch.long))

        return Stage("text encoder", (model.text_fragment,), None, [ExecutionStrategy()], run)

    def denoise_stage(self, shape: MicroBatchShape) -> Stage:
        model = self.model
        most = min(model.unet_bs or shape.rows, shape.rows)
        fewer = [rows for power in range(most.bit_length()) if (rows := most >> power) < most]
        ways = [
            ExecutionStrategy(DEFAULT_CHUNK_BYTES, most),
            *(ExecutionStrategy(SMALL_CHUNK_BYTES, rows) for rows in (most, *fewer)),
            ExecutionStrategy(MIN_CHUNK_BYTES, 1),
        ]

        def run(way: ExecutionStrategy) -> None:
            rows = min(shape.rows, 2 * way.rows) if way.rows else shape.rows  # more would only repeat themselves
            latents = torch.empty(rows, model.info.latent_channels, *self.latent_size(shape))
            model.precomputed.use_meta_tensors(shape.prompts, shape.tokens, model.dtype)
            run_unet(model.unet, latents, torch.zeros(rows, dtype=torch.long), way.rows, model.dtype)
            model.precomputed.forget()

        return Stage(UNET_STAGE, (model.encode_fragment, model.decode_fragment), shape, ways, run)

    def decode_stage(self, shape: MicroBatchShape) -> Stage:
        model = self.model

        def run(way: ExecutionStrategy) -> None:
            latents = torch.empty(1, model.info.latent_channels, *self.latent_size(shape), dtype=model.dtype)
            decode_single(model.vae, latents, feature_map_dtype(way), recompute=way.recompute_maps).float()

        ways = [
            ExecutionStrategy(),
            ExecutionStrategy(SMALL_CHUNK_BYTES),
            *(ExecutionStrategy(nbytes, float16_maps=True) for nbytes in (SMALL_CHUNK_BYTES, MIN_CHUNK_BYTES)),
        ]
        ways.append(ExecutionStrategy(MIN_CHUNK_BYTES, float16_maps=True, recompute_maps=True))
        return Stage("VAE decoder", (model.vae_fragment,), replace(shape, rows=1, tokens=0, prompts=0), ways, run)

    def latent_size(self, shape: MicroBatchShape) -> tuple[int, int]:
        return shape.height // self.model.info.vae_scale_factor, shape.width // self.model.info.vae_scale_factor

    def plan(self, task: Stage, *, measured: bool = False) -> StagePlan:
        """The first way with all weights on the device; else the first that fits while some pass through.

        Without a budget there is nothing to choose, and what the work takes is found only if it is to be `measured`.
        Raises UsageError where no way fits, with the least that would do.
        """
        if self.budget_bytes is None and not measured:
            weights = sum(part.nbytes for part in task.components)
            return StagePlan(
                task.name, task.components, self.ways(task)[0], None, weights, weights, 0, 0, self.context_bytes
            )
        model = self.model
        settings = model.unet_bs, model.attention.fused, model.offloader.stream_all_weights, self.max_chunk_bytes
        key = task.name, task.shape, model.dtype, *settings
        if key not in self.plans:
            self.plans[key] = self.first_that_fits(task)
        return self.plans[key]

    def first_that_fits(self, task: Stage) -> StagePlan:
        budget = self.budget_bytes
        tight: list[StagePlan] = []
        for phase in self.candidate_plans(task, budget):
            fits_whole = budget is None or (phase.resident_bytes == phase.weight_bytes and phase.peak_bytes <= budget)
            if fits_whole and not phase.strategy.recompute_maps:  # more work, where weights pass only once a picture
                return phase
            tight.append(phase)
        assert budget is not None, task.name
        least = min(tight, key=lambda phase: phase.peak_bytes)
        usual = least.peak_bytes - int(max(0, self.gaps - FRAGMENTATION_SHARE) * least.work)  # with gaps as a rule
        if usual > budget:
            what = f"drawing {task.shape.width}x{task.shape.height}" if task.shape else "reading a prompt"
            raise UsageError(
                f"vram_budget = {budget / 1e6:.1f} MB: {what} takes at least {usual / 1e6:.1f} MB with this model, "
                f"in the {task.name}, even when weights pass through the smallest buffers"
            )
        return next((phase for phase in tight if phase.peak_bytes <= budget), least)

    def candidate_plans(self, task: Stage, budget: int | None) -> Iterator[StagePlan]:
        """The ways of a task, with as many weights on the device as the budget leaves room for."""
        weights = sum(part.nbytes for part in task.components)
        for way in self.ways(task):
            work = self.work(task, way)
            segments = self.segment * (2 if task.name == UNET_STAGE else 1)  # a step that is captured has its own
            room = None
            if budget is not None:
                room = max(0, int(budget - self.context_bytes - segments - work * (1 + self.gaps)))
            staying, buffers = self.model.offloader.estimate_placement(task.components, room)
            gaps = segments + int(self.gaps * work)
            yield StagePlan(
                task.name, task.components, way, room, weights, staying, buffers, work, self.context_bytes, gaps
            )

    def ways(self, task: Stage) -> Sequence[ExecutionStrategy]:
        return [way for way in task.ways if way.chunk_bytes <= self.max_chunk_bytes] or task.ways

    def work(self, task: Stage, way: ExecutionStrategy) -> int:
        """The most that tensors take besides weights."""
        model = self.model
        kept = any(layer.keeps_dequantized for layer in iterate_packed_layers(model.unet))
        device = model.device.type  # which decides how weights are unpacked
        key = model.info.digest, device, task.name, task.shape, way, model.dtype, model.attention.fused, kept
        if key not in ACTIVATION_BYTES_CACHE:
            ACTIVATION_BYTES_CACHE[key] = self.trace_activation_bytes(task, way)
        return ACTIVATION_BYTES_CACHE[key]

    def trace_activation_bytes(self, task: Stage, way: ExecutionStrategy) -> int:
        for fragment in task.components:
            fragment.use_meta_tensors()
        SCRATCH.release(META)
        try:
            with (
                torch.no_grad(), estimate_for_device(self.model.device), META, limit_chunk_bytes(way.chunk_bytes), PeakMemoryTracker() as live,
            ):  # fmt: skip
                live.exclude(tensor.module_tensor for part in task.components for tensor in part.host_tensors)
                task.run(way)
        finally:
            for fragment in task.components:
                fragment.offload()
        return int(live.peak_bytes)

    @contextlib.contextmanager
    def executing(self, phase: StagePlan) -> Iterator[ExecutionStrategy]:
        """The phase's fragments can be computed with, in its way."""
        self.model.offloader.weight_budget_bytes = phase.weight_budget_bytes
        if self.model.device.type == "cpu" and not self.model.info.is_small:
            usual = UNET_MMAP_THRESHOLD_BYTES if phase.name == UNET_STAGE else MMAP_THRESHOLD_BYTES
            set_mmap_threshold(usual if self.budget_bytes is None else TIGHT_MMAP_THRESHOLD_BYTES)
        try:
            with self.within_budget(), limit_chunk_bytes(phase.strategy.chunk_bytes):
                self.reserve(phase)
                with self.model.offloader.holding(*phase.components):
                    yield phase.strategy
        finally:
            SCRATCH.release(self.model.device)

    def reserve(self, phase: StagePlan) -> None:
        """On a card, room to unpack in, before anything else can leave but parts of its memory free."""
        model = self.model
        if phase.name == UNET_STAGE and model.device.type == "cuda":
            SCRATCH.get_matrix(1, required_scratch_bytes(model.unet, model.dtype), torch.uint8, model.device)

    def preallocate(self, phase: StagePlan) -> None:
        """Take what the phase still needs in one piece, and free it: a graph's memory is cut from it then.

        Else each large tensor would have a segment of its own, into which few others fit, and none goes back.
        """
        if self.torch_budget_bytes is not None:
            device, alive = (
                self.model.device,
                phase.resident_bytes + phase.buffer_bytes + phase.work + self.overhead.workspace_bytes,
            )
            torch.empty(max(0, alive - torch.cuda.memory_allocated(device)), dtype=torch.uint8, device=device)

    @contextlib.contextmanager
    def capturing(self, phase: StagePlan, steps: int) -> Iterator[None]:
        """A step after so many is captured as a graph, which has memory of its own for its work."""
        self.preallocate(phase)
        with self.model.offloader.capturing(steps):
            yield

    @contextlib.contextmanager
    def within_budget(self) -> Iterator[None]:
        """Torch takes no more of a card than the budget allows: libraries choose ways of work that do with it."""
        device = self.model.device
        if self.torch_budget_bytes is None or device.type != "cuda":
            yield
            return
        torch.cuda.empty_cache()  # what earlier phases took
        with limit_torch_memory(self.torch_budget_bytes, device):
            yield
