"""What drawing takes of a device's memory, phase by phase, foretold without drawing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinysd_batch.report.text import count, size

if TYPE_CHECKING:
    from tinysd_batch.config import Settings
    from tinysd_batch.model.memory import Phase
    from tinysd_batch.model.precision import PrecisionChoice


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


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a batch is drawn on a device."""

    batch: Batch
    device: str
    precision: "PrecisionChoice"
    budget: str | None
    phases: list["Phase"]
    elsewhere: bool = False  # the device is not at hand, so that what it takes for itself could not be measured

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak for phase in self.phases)

    def lines(self) -> dict[str, str]:
        batch = self.batch
        what = f"{size(self.peak_bytes)} at most for {count(batch.images, 'image')} of {batch.width}x{batch.height}"
        budget = f", vram_budget {self.budget}" if self.budget else ""
        return {
            "Precision": str(self.precision),
            "Memory": f"{what} at a time ({self.precision.name} on {self.device}{budget})",
            **{f"  {phase.name}": phase_line(phase, batch.rows, self.elsewhere) for phase in self.phases},
        }

    def as_dict(self) -> dict[str, Any]:
        phases = [
            {
                "name": phase.name, "peak": phase.peak, "weights": phase.weights, "weights_staying": phase.staying,
                "buffers": phase.buffers, "work": phase.work, "context": phase.context, "gaps": phase.gaps,
                "rows_at_once": phase.way.rows, "part_bytes": phase.way.part_bytes, "half_maps": phase.way.half_maps,
                "makes_anew": phase.way.makes_anew,
            }
            for phase in self.phases
        ]  # fmt: skip
        return {
            "device": self.device,
            "precision": self.precision.name,
            "precision_reason": self.precision.reason,
            "peak": self.peak_bytes,
            "phases": phases,
        }


def phase_line(phase: "Phase", rows: int, elsewhere: bool) -> str:
    weights = f"{size(phase.weights)} of weights stay"
    if phase.staying < phase.weights:
        weights = (
            f"{size(phase.staying)} of {size(phase.weights)} of weights stay, the rest passes through "
            f"{size(phase.buffers)}"
        )
    told = [f"{size(phase.peak)}: {weights}", f"work takes {size(phase.work)}"]
    if phase.way.rows and phase.way.rows < rows:
        told.append(f"{phase.way.rows} of {rows} rows at once")
    told += ["in small parts"] if phase.is_in_small_parts else []
    told += ["maps kept as float16"] if phase.way.half_maps else []
    told += ["the largest made anew each time"] if phase.way.makes_anew else []
    if phase.context:
        how = "assumed for" if elsewhere else "taken by"
        told.append(f"{size(phase.context)} {how} CUDA and its libraries, {size(phase.gaps)} left for gaps")
    return ", ".join(told)


def plan_memory(settings: "Settings", batch: Batch, precision_file: Path | None = None) -> MemoryPlan:
    """What a batch takes, in the precision that a job has recorded in `precision_file`, if it has.

    Raises UsageError or ModelError where the batch does not fit the budget."""
    import torch

    from tinysd_batch.config import parse_budget
    from tinysd_batch.job.precision_record import choose_as_recorded
    from tinysd_batch.model.devices import choose_device, total_bytes
    from tinysd_batch.model.info import read_model_info
    from tinysd_batch.model.memory import Shape
    from tinysd_batch.model.pipeline import TinySD
    from tinysd_batch.model.precision import PrecisionChoice, choose_precision

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
    phases = model.memory.phases(Shape(batch.rows, batch.height, batch.width, info.max_tokens))
    return MemoryPlan(batch, device.type, choice, settings.vram_budget, phases, elsewhere)
