"""What drawing takes of a device's memory, phase by phase, foretold without drawing."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tinysd_batch.report.formatting import count, format_bytes

if TYPE_CHECKING:
    from tinysd_batch.config import Settings
    from tinysd_batch.model.offload.stage_estimate import StagePlan


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """The most that a job draws at once."""

    images: int
    width: int
    height: int
    is_guided: bool

    @property
    def rows(self) -> int:
        """Of the UNet."""
        return self.images * (2 if self.is_guided else 1)

    @property
    def unet_pixels(self) -> int:
        """Over all rows of the UNet."""
        return self.rows * self.width * self.height


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What a phase takes of the device, in bytes; plain numbers, since torch may be in another process."""

    name: str
    peak: int
    weights: int
    weights_staying: int
    buffers: int
    work: int
    context: int
    gaps: int
    rows_at_once: int | None
    part_bytes: int
    half_maps: bool
    makes_anew: bool
    is_in_small_parts: bool

    @classmethod
    def from_stage(cls, phase: "StagePlan") -> Self:
        strategy = phase.strategy
        return cls(
            phase.name, phase.peak_bytes, phase.weight_bytes, phase.resident_bytes, phase.buffer_bytes,
            phase.activation_bytes, phase.context_bytes, phase.fragmentation_bytes, strategy.rows,
            strategy.chunk_bytes, strategy.float16_maps, strategy.recompute_maps, phase.uses_small_chunks,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """How a batch is drawn on a device."""

    batch: PlannedBatch
    device: str
    precision: str
    budget: str | None
    phases: list[StageMemory]
    is_device_absent: bool = False  # the device is not at hand, so that what it takes for itself could not be measured
    available_bytes: int | None = None  # of the device's memory now; None where it is not at hand or does not tell
    precision_reason: str = ""

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool | None:
        """Whether it goes into the memory that is available; None where that is not known."""
        if self.budget:
            return True
        return None if self.available_bytes is None else self.peak_bytes <= self.available_bytes

    def lines(self) -> dict[str, str]:
        batch = self.batch
        what = f"{format_bytes(self.peak_bytes)} at most for {count(batch.images, 'image')} of {batch.width}x{batch.height}"
        budget = f", vram_budget {self.budget}" if self.budget else ""
        return {
            "Precision": f"{self.precision}: {self.precision_reason}" if self.precision_reason else self.precision,
            "Memory": f"{what} at a time ({self.precision} on {self.device}{budget})",
            **{f"  {phase.name}": format_stage_line(phase, batch.rows, self.is_device_absent) for phase in self.phases},
        }

    def as_dict(self) -> dict[str, Any]:
        phases = [
            {name: value for name, value in asdict(phase).items() if name != "is_in_small_parts"}
            for phase in self.phases
        ]
        return {
            "device": self.device, "precision": self.precision, "precision_reason": self.precision_reason,
            "peak": self.peak_bytes,
            "available": self.available_bytes, "phases": phases,
        }  # fmt: skip


def format_stage_line(phase: StageMemory, rows: int, elsewhere: bool) -> str:
    weights = f"{format_bytes(phase.weights)} of weights stay"
    if phase.weights_staying < phase.weights:
        weights = (
            f"{format_bytes(phase.weights_staying)} of {format_bytes(phase.weights)} of weights stay, the rest passes through "
            f"{format_bytes(phase.buffers)}"
        )
    told = [f"{format_bytes(phase.peak)}: {weights}", f"work takes {format_bytes(phase.work)}"]
    if phase.rows_at_once and phase.rows_at_once < rows:
        told.append(f"{phase.rows_at_once} of {rows} rows at once")
    told += ["in small parts"] if phase.is_in_small_parts else []
    told += ["maps kept as float16"] if phase.half_maps else []
    told += ["the largest made anew each time"] if phase.makes_anew else []
    if phase.context:
        how = "assumed for" if elsewhere else "taken by"
        told.append(
            f"{format_bytes(phase.context)} {how} CUDA and its libraries, {format_bytes(phase.gaps)} left for gaps"
        )
    return ", ".join(told)


def estimate_memory(settings: "Settings", batch: PlannedBatch, precision_file: Path | None = None) -> MemoryEstimate:
    """What a batch takes, in the precision that a job has recorded in `precision_file`, if it has.

    Raises UsageError or ModelError where the batch does not fit the budget."""
    import torch

    from tinysd_batch.config import parse_memory_budget
    from tinysd_batch.job.state.precision_record import choose_recorded_precision
    from tinysd_batch.model.checkpoint.info import read_model_info
    from tinysd_batch.model.device.available_memory import get_available_memory_bytes
    from tinysd_batch.model.device.precision import PrecisionChoice, choose_precision
    from tinysd_batch.model.device.select import choose_device, total_memory_bytes
    from tinysd_batch.model.offload.stage_estimate import MicroBatchShape
    from tinysd_batch.model.pipeline import TinySD

    info = read_model_info(settings.model)
    precision = None if settings.precision == "auto" else settings.precision
    elsewhere = settings.device == "cuda" and not torch.cuda.is_available()
    if elsewhere:
        device, total = torch.device("cuda"), None
        choice = PrecisionChoice(torch.float16, "what most GPUs are good at; this one is not here")
        if precision is not None:
            choice = choose_precision(precision, device)
    else:
        device = choose_device(None if settings.device == "auto" else settings.device)
        total = total_memory_bytes(device)
        choice = (
            choose_recorded_precision(precision_file, device, is_small=info.is_small)
            if precision is None
            else choose_precision(precision, device, is_small=info.is_small)
        )
    budget = parse_memory_budget(settings.vram_budget, total)
    model = TinySD(info, device, choice.dtype, budget, turbo=settings.turbo, unet_bs=settings.unet_bs)
    found = model.planner.plan_stages(MicroBatchShape(batch.rows, batch.height, batch.width, info.max_tokens))
    phases = [StageMemory.from_stage(phase) for phase in found]
    available = None if elsewhere else get_available_memory_bytes(device)
    return MemoryEstimate(
        batch, device.type, choice.name, settings.vram_budget, phases, elsewhere, available, choice.reason
    )
