"""Which level `--level auto` takes: `calib` where time, memory and disk allow it, else `fast`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tinysd_batch.errors import StorageError, UsageError
from tinysd_batch.quantize.calibration.resume import level_begun, place_of
from tinysd_batch.quantize.convert import refuse_existing
from tinysd_batch.quantize.estimate.duration import foretell, speed_of
from tinysd_batch.quantize.estimate.memory import check_room, needs_of_calib
from tinysd_batch.quantize.presets import SMALLEST, Size, layers_to_pack
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import Options, Part, Source, check_unet
from tinysd_batch.quantize.sources.open import open_source

MOST_S = 3600.0  # that calibrating may take where nobody asked for it


@dataclass(frozen=True, slots=True)
class Level:
    """What `auto` came to."""

    name: str
    why: str  # and how to get the other, in one line


def choose_level(
    source: Path, out: Path, options: Options, size: Size, recipe: Recipe, device: torch.device, *,
    noise_correction: bool = True,
) -> Level:  # fmt: skip
    """`calib` where it should take at most an hour, else `fast`. A stopped run goes on with the level it began with.

    Raises ModelError for a source that cannot be read, and where `out` exists.
    """
    refuse_existing(out)
    if begun := level_begun(out):
        return Level(begun, f"level {begun}: {place_of(out)} was begun with it; delete it to begin anew")
    model = open_source(source, options)
    part = model.unet()
    unet = check_unet(part)
    try:
        check_room(needs_of_calib(part, unet, model, size, recipe), out, device)
    except (UsageError, StorageError) as error:
        return Level("fast", f"level fast, as there is no room for calib: {error}")
    seconds = seconds_of_calib(part, unet, model, size, recipe, device, noise_correction=noise_correction)
    if seconds > MOST_S:
        return Level("fast", f"level fast: calib would take some {rounded(seconds)} here; --level calib has it done")
    return Level(
        "calib", f"level calib: some {rounded(seconds)}; --level fast is quicker, and further from the float model"
    )


def seconds_of_calib(
    part: Part, unet: nn.Module, model: Source, size: Size, recipe: Recipe, device: torch.device, *,
    noise_correction: bool,
) -> float:  # fmt: skip
    # Which bits a layer gets makes no difference.
    layouts = layers_to_pack(unet, size.preset if size.most is None else SMALLEST)
    work = foretell(part, model.vae(), layouts, recipe, noise_correction=noise_correction)
    return work.all.seconds(speed_of(device))


def rounded(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
