"""What drawing takes of a device's memory, phase by phase, foretold without drawing."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tinysd_batch.report.formatting import count, size

if TYPE_CHECKING:
    from tinysd_batch.config import Settings
    from tinysd_batch.model.offload.stage_estimate import Phase


@dataclass(frozen=True, slots=True)
class Batch:
    """The most that a job draws at once."""

    images: int
    width: int
    height: int
    guided: bool

    @property
    def rows(self) -> int:
        """Of the UNet."""
        return self.images * (2 if self.guided else 1)

    @property
    def pixels(self) -> int:
        """Over all rows of the UNet."""
        return self.rows * self.width * self.height


@dataclass(frozen=True, slots=True)
class PlannedPhase:
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
    def of(cls, phase: "Phase") -> Self:
        return cls(
            phase.name, phase.peak, phase.weights, phase.staying, phase.buffers, phase.work, phase.context, phase.gaps,
            phase.way.rows, phase.way.part_bytes, phase.way.half_maps, phase.way.makes_anew, phase.is_in_small_parts,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a batch is drawn on a device."""

    batch: Batch
    device: str
    precision: str
    budget: str | None
    phases: list[PlannedPhase]
    elsewhere: bool = False  # the device is not at hand, so that what it takes for itself could not be measured
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
        what = f"{size(self.peak_bytes)} at most for {count(batch.images, 'image')} of {batch.width}x{batch.height}"
        budget = f", vram_budget {self.budget}" if self.budget else ""
        return {
            "Precision": f"{self.precision}: {self.precision_reason}" if self.precision_reason else self.precision,
            "Memory": f"{what} at a time ({self.precision} on {self.device}{budget})",
            **{f"  {phase.name}": phase_line(phase, batch.rows, self.elsewhere) for phase in self.phases},
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


def phase_line(phase: PlannedPhase, rows: int, elsewhere: bool) -> str:
    weights = f"{size(phase.weights)} of weights stay"
    if phase.weights_staying < phase.weights:
        weights = (
            f"{size(phase.weights_staying)} of {size(phase.weights)} of weights stay, the rest passes through "
            f"{size(phase.buffers)}"
        )
    told = [f"{size(phase.peak)}: {weights}", f"work takes {size(phase.work)}"]
    if phase.rows_at_once and phase.rows_at_once < rows:
        told.append(f"{phase.rows_at_once} of {rows} rows at once")
    told += ["in small parts"] if phase.is_in_small_parts else []
    told += ["maps kept as float16"] if phase.half_maps else []
    told += ["the largest made anew each time"] if phase.makes_anew else []
    if phase.context:
        how = "assumed for" if elsewhere else "taken by"
        told.append(f"{size(phase.context)} {how} CUDA and its libraries, {size(phase.gaps)} left for gaps")
    return ", ".join(told)


def plan_memory(settings: "Settings", batch: Batch, precision_file: Path | None = None) -> MemoryPlan:
    """What a batch takes, in the precision that a job has recorded in `precision_file`, if it has.

    Raises UsageError or ModelError where the batch does not fit the budget."""
    import torch

    from tinysd_batch.config import parse_budget
    from tinysd_batch.job.state.precision_record import choose_as_recorded
    from tinysd_batch.model.checkpoint.info import read_model_info
    from tinysd_batch.model.device.available_memory import available_memory
    from tinysd_batch.model.device.precision import PrecisionChoice, choose_precision
    from tinysd_batch.model.device.select import choose_device, total_bytes
    from tinysd_batch.model.offload.stage_estimate import Shape
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
        total = total_bytes(device)
        choice = (
            choose_as_recorded(precision_file, device, is_small=info.is_small)
            if precision is None
            else choose_precision(precision, device, is_small=info.is_small)
        )
    budget = parse_budget(settings.vram_budget, total)
    model = TinySD(info, device, choice.dtype, budget, turbo=settings.turbo, unet_bs=settings.unet_bs)
    found = model.memory.phases(Shape(batch.rows, batch.height, batch.width, info.max_tokens))
    phases = [PlannedPhase.of(phase) for phase in found]
    available = None if elsewhere else available_memory(device)
    return MemoryPlan(
        batch, device.type, choice.name, settings.vram_budget, phases, elsewhere, available, choice.reason
    )
