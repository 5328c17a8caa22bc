"""Estimate the device memory that generation needs, stage by stage, without generating."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tinysd_batch.records import Row
from tinysd_batch.report.formatting import format_bytes, format_count

if TYPE_CHECKING:
    import torch

    from tinysd_batch.model.device.precision import PrecisionChoice
    from tinysd_batch.model.offload.stage_estimate import StagePlan
    from tinysd_batch.settings.schema import Settings


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """The largest micro-batch of a job."""

    images: int
    width: int
    height: int
    is_guided: bool

    @classmethod
    def of_row(cls, row: Row, max_batch: int | None) -> Self:
        """Return the largest micro-batch that images of this row can be in."""
        settings = row.settings
        return cls(max(row.n_samples, max_batch or 1), settings.width, settings.height, settings.is_guided)

    @property
    def unet_rows(self) -> int:
        """Rows of the UNet's input: two per image with guidance."""
        return self.images * (2 if self.is_guided else 1)

    @property
    def unet_pixels(self) -> int:
        """Pixels of all rows of the UNet's input."""
        return self.unet_rows * self.width * self.height


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Device memory of one stage. Plain numbers, because torch may run in another process."""

    name: str
    peak_bytes: int
    weight_bytes: int
    resident_bytes: int  # weights that stay on the device for the whole stage
    buffer_bytes: int  # for streaming the other weights
    activation_bytes: int
    cuda_context_bytes: int  # taken by CUDA and its libraries
    fragmentation_bytes: int  # reserved for gaps between tensors
    rows_per_call: int | None  # of the UNet; None if all rows go through it in one call
    chunk_bytes: int
    float16_maps: bool
    recompute_maps: bool
    uses_small_chunks: bool

    @classmethod
    def from_stage_plan(cls, plan: "StagePlan") -> Self:
        strategy = plan.strategy
        return cls(
            name=plan.name,
            peak_bytes=plan.peak_bytes,
            weight_bytes=plan.weight_bytes,
            resident_bytes=plan.resident_bytes,
            buffer_bytes=plan.buffer_bytes,
            activation_bytes=plan.activation_bytes,
            cuda_context_bytes=plan.context_bytes,
            fragmentation_bytes=plan.fragmentation_bytes,
            rows_per_call=strategy.rows,
            chunk_bytes=strategy.chunk_bytes,
            float16_maps=strategy.float16_maps,
            recompute_maps=strategy.recompute_maps,
            uses_small_chunks=plan.uses_small_chunks,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of `plan --json`, whose keys do not change between versions."""
        return {
            "name": self.name,
            "peak": self.peak_bytes,
            "weights": self.weight_bytes,
            "weights_staying": self.resident_bytes,
            "buffers": self.buffer_bytes,
            "work": self.activation_bytes,
            "context": self.cuda_context_bytes,
            "gaps": self.fragmentation_bytes,
            "rows_at_once": self.rows_per_call,
            "part_bytes": self.chunk_bytes,
            "half_maps": self.float16_maps,
            "makes_anew": self.recompute_maps,
        }


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """How a micro-batch is generated on a device, and the memory that takes."""

    batch: PlannedBatch
    device: str
    precision: str
    budget: str | None
    stages: list[StageMemory]
    is_device_absent: bool = False  # the CUDA overhead is then assumed, not measured
    available_bytes: int | None = None  # free device memory now; None if the device is absent or does not report it
    precision_reason: str = ""

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the available memory; None if that is unknown."""
        if self.budget:
            return True
        return None if self.available_bytes is None else self.peak_bytes <= self.available_bytes

    def lines(self) -> dict[str, str]:
        batch = self.batch
        peak = f"{format_bytes(self.peak_bytes)} at most"
        images = f"{format_count(batch.images, 'image')} of {batch.width}x{batch.height}"
        budget = f", vram_budget {self.budget}" if self.budget else ""
        return {
            "Precision": f"{self.precision}: {self.precision_reason}" if self.precision_reason else self.precision,
            "Memory": f"{peak} for {images} at a time ({self.precision} on {self.device}{budget})",
            **{
                f"  {stage.name}": format_stage_line(stage, batch.unet_rows, self.is_device_absent)
                for stage in self.stages
            },
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "peak": self.peak_bytes,
            "available": self.available_bytes,
            "phases": [stage.as_dict() for stage in self.stages],
        }


def format_stage_line(stage: StageMemory, rows: int, is_device_absent: bool) -> str:
    weights = f"{format_bytes(stage.weight_bytes)} of weights resident"
    if stage.resident_bytes < stage.weight_bytes:
        weights = (
            f"{format_bytes(stage.resident_bytes)} of {format_bytes(stage.weight_bytes)} of weights resident, the rest "
            f"streamed through {format_bytes(stage.buffer_bytes)}"
        )
    parts = [f"{format_bytes(stage.peak_bytes)}: {weights}", f"activations take {format_bytes(stage.activation_bytes)}"]
    if stage.rows_per_call and stage.rows_per_call < rows:
        parts.append(f"{stage.rows_per_call} of {rows} rows per call")
    parts += ["in small chunks"] if stage.uses_small_chunks else []
    parts += ["feature maps kept as float16"] if stage.float16_maps else []
    parts += ["the largest feature maps recomputed"] if stage.recompute_maps else []
    if stage.cuda_context_bytes:
        source = "assumed for" if is_device_absent else "taken by"
        parts.append(
            f"{format_bytes(stage.cuda_context_bytes)} {source} CUDA and its libraries, "
            f"{format_bytes(stage.fragmentation_bytes)} reserved for fragmentation"
        )
    return ", ".join(parts)


def estimate_memory(settings: "Settings", batch: PlannedBatch, precision_file: Path | None = None) -> MemoryEstimate:
    """Estimate the memory of a micro-batch.

    Args:
        settings: The job's settings.
        batch: The micro-batch to estimate.
        precision_file: Where the job records its precision, which is used if it is there already.

    Raises:
        UsageError: The micro-batch does not fit the budget, or a setting is not usable on this machine.
        ModelError: The model is damaged.
    """
    import torch

    from tinysd_batch.model.checkpoint.info import read_model_info
    from tinysd_batch.model.device.available_memory import get_available_memory_bytes
    from tinysd_batch.model.device.select import choose_device, total_memory_bytes
    from tinysd_batch.model.offload.stage_estimate import MicroBatchShape
    from tinysd_batch.model.tiny_sd import TinySD

    info = read_model_info(settings.model)
    is_device_absent = settings.device == "cuda" and not torch.cuda.is_available()
    if is_device_absent:
        device, total_bytes = torch.device("cuda"), None
    else:
        device = choose_device(None if settings.device == "auto" else settings.device)
        total_bytes = total_memory_bytes(device)
    choice = choose_planned_precision(settings.precision, device, is_device_absent, precision_file, info.is_small)
    budget = settings.vram_budget.resolve(total_bytes) if settings.vram_budget else None
    model = TinySD(info, device, choice.dtype, budget, turbo=settings.turbo, unet_bs=settings.unet_bs)
    shape = MicroBatchShape(batch.unet_rows, batch.height, batch.width, info.max_tokens)
    stages = [StageMemory.from_stage_plan(plan) for plan in model.planner.plan_stages(shape)]
    return MemoryEstimate(
        batch,
        device.type,
        choice.name,
        str(settings.vram_budget) if settings.vram_budget else None,
        stages,
        is_device_absent,
        None if is_device_absent else get_available_memory_bytes(device),
        choice.reason,
    )


def choose_planned_precision(
    precision: str, device: "torch.device", is_device_absent: bool, precision_file: Path | None, is_small: bool
) -> "PrecisionChoice":
    """Choose the precision as a worker would, and float16 for an absent GPU."""
    import torch

    from tinysd_batch.job.state.precision_record import choose_recorded_precision
    from tinysd_batch.model.device.precision import PrecisionChoice, choose_precision

    if precision != "auto":
        return choose_precision(precision, device, is_small=is_small)
    if is_device_absent:
        return PrecisionChoice(torch.float16, "what most GPUs support best; this GPU is not present")
    return choose_recorded_precision(precision_file, device, is_small=is_small)
