"""Which level `--level auto` takes: `calib` where time, memory and disk allow it, else `fast`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tinysd_batch.errors import StorageError, UsageError
from tinysd_batch.quantize.calibration.resume import read_started_level, resolve_work_path
from tinysd_batch.quantize.convert import check_not_existing
from tinysd_batch.quantize.estimate.duration import estimate_calibration_cost, measure_device_speed
from tinysd_batch.quantize.estimate.memory import check_available_resources, estimate_calibration_resources
from tinysd_batch.quantize.presets import SMALLEST_PRESET, SizeTarget, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import (
    CheckpointSource,
    SourceComponent,
    SourceOptions,
    check_unet_tensors,
)
from tinysd_batch.quantize.sources.open import open_source

MAX_CALIBRATION_S = 3600.0  # that calibrating may take where nobody asked for it


@dataclass(frozen=True, slots=True)
class LevelChoice:
    """What `auto` came to."""

    name: str
    reason: str  # and how to get the other, in one line


def choose_level(
    source: Path, out: Path, options: SourceOptions, size: SizeTarget, recipe: Recipe, device: torch.device, *,
    noise_correction: bool = True,
) -> LevelChoice:  # fmt: skip
    """`calib` where it should take at most an hour, else `fast`. A stopped run goes on with the level it began with.

    Raises ModelError for a source that cannot be read, and where `out` exists.
    """
    check_not_existing(out)
    if begun := read_started_level(out):
        return LevelChoice(begun, f"level {begun}: {resolve_work_path(out)} was begun with it; delete it to begin anew")
    model = open_source(source, options)
    part = model.unet()
    unet = check_unet_tensors(part)
    try:
        check_available_resources(estimate_calibration_resources(part, unet, model, size, recipe), out, device)
    except (UsageError, StorageError) as error:
        return LevelChoice("fast", f"level fast, as there is no room for calib: {error}")
    seconds = estimate_calibration_s(part, unet, model, size, recipe, device, noise_correction=noise_correction)
    if seconds > MAX_CALIBRATION_S:
        return LevelChoice(
            "fast", f"level fast: calib would take some {format_duration(seconds)} here; --level calib has it done"
        )
    return LevelChoice(
        "calib",
        f"level calib: some {format_duration(seconds)}; --level fast is quicker, and further from the float model",
    )


def estimate_calibration_s(
    part: SourceComponent, unet: nn.Module, model: CheckpointSource, size: SizeTarget, recipe: Recipe, device: torch.device, *,
    noise_correction: bool,
) -> float:  # fmt: skip
    # Which bits a layer gets makes no difference.
    layouts = get_preset_layouts(unet, size.preset if size.max_bytes is None else SMALLEST_PRESET)
    work = estimate_calibration_cost(part, model.vae(), layouts, recipe, noise_correction=noise_correction)
    return work.total.duration_s(measure_device_speed(device))


def format_duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
