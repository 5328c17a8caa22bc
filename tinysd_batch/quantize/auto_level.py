"""Choose the level for `--level auto`: `calib` if time, memory and disk allow it, else `fast`."""

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
from tinysd_batch.quantize.sources.formats import open_source

MAX_CALIBRATION_S = 3600.0  # calibrations estimated to take longer run only on request


@dataclass(frozen=True, slots=True)
class LevelChoice:
    """The level that `auto` chose."""

    name: str
    reason: str  # one line, which also says how to get another level


def choose_level(
    source: Path,
    out: Path,
    options: SourceOptions,
    size: SizeTarget,
    recipe: Recipe,
    device: torch.device,
    *,
    noise_correction: bool = True,
) -> LevelChoice:
    """Choose `calib` if it is estimated to take at most an hour, else `fast`; a stopped run keeps its level.

    Raises:
        ModelError: the source cannot be read, or `out` exists.
    """
    check_not_existing(out)
    if started_level := read_started_level(out):
        work_path = resolve_work_path(out)
        return LevelChoice(
            started_level, f"level {started_level}: {work_path} was started with it; delete it to start again"
        )
    model = open_source(source, options)
    component = model.unet()
    unet = check_unet_tensors(component)
    try:
        check_available_resources(estimate_calibration_resources(component, unet, model, size, recipe), out, device)
    except (UsageError, StorageError) as error:
        return LevelChoice("fast", f"level fast, because calib does not fit: {error}")
    duration_s = estimate_calibration_s(component, unet, model, size, recipe, device, noise_correction=noise_correction)
    duration = format_duration(duration_s)
    if duration_s > MAX_CALIBRATION_S:
        return LevelChoice("fast", f"level fast: calib would take about {duration} here; use --level calib to run it")
    return LevelChoice(
        "calib", f"level calib: about {duration}; --level fast is quicker, but further from the float model"
    )


def estimate_calibration_s(
    component: SourceComponent,
    unet: nn.Module,
    model: CheckpointSource,
    size: SizeTarget,
    recipe: Recipe,
    device: torch.device,
    *,
    noise_correction: bool,
) -> float:
    # The bits of a layer do not change the duration.
    layouts = get_preset_layouts(unet, size.preset if size.max_bytes is None else SMALLEST_PRESET)
    cost = estimate_calibration_cost(component, model.vae(), layouts, recipe, noise_correction=noise_correction)
    return cost.total.duration_s(measure_device_speed(device))


def format_duration(duration_s: float) -> str:
    """Format a duration in the largest unit of which it has at least two."""
    for unit, unit_s in (("hours", 3600), ("minutes", 60)):
        if duration_s >= 2 * unit_s:
            return f"{duration_s / unit_s:.0f} {unit}"
    return f"{duration_s:.0f} seconds"
