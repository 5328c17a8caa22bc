"""Four images by the float model and by the packed one, to look at what quantizing did without calibration data."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinysd_batch.errors import TinySDError
from tinysd_batch.model.device.available_memory import available_memory
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.quantize.calibration.trajectories import HELD_OUT_SEEDS, draw_held_out
from tinysd_batch.quantize.calibration.unet_segments import Walker
from tinysd_batch.quantize.estimate.duration import Effort, decoding, speed_of, walk
from tinysd_batch.quantize.estimate.memory import latents_of, needs_of_drawing
from tinysd_batch.quantize.evaluate.compare import draw_again
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import Options, Part
from tinysd_batch.quantize.sources.open import open_source

PAIRS, STEPS = 4, 8


@dataclass(frozen=True, slots=True)
class Pairs:
    """Images [P, H, W, 3] in 0..1 of the same prompts and seeds."""

    prompts: list[str]
    floats: npt.NDArray[np.float32]
    packed: npt.NDArray[np.float32]


def sample_recipe() -> Recipe:
    """The first held-out prompts of the recipe that ships, in few steps."""
    shipped = read_recipe(None)
    return shipped.model_copy(update={"held_out": shipped.held_out[:PAIRS], "steps": STEPS})


def estimate_seconds(part: Part, vae: Part, device: torch.device) -> float:
    """For both models: text guidance calls the UNet twice a step."""
    row = sum(unit.all for unit in walk(part, {}).values())
    images = Effort(2 * PAIRS * (2 * STEPS * row + decoding(vae, latents_of(part))))
    return images.seconds(speed_of(device))


def seconds_of_samples(source: Path, options: Options, device: torch.device) -> float:
    """How long `generate_pairs` will take. Raises TinySDError where the device has too little memory for it."""
    model = open_source(source, options)
    part = model.unet()
    needed, there = needs_of_drawing(part, sample_recipe()).memory, available_memory(device)
    if there is not None and there < needed:
        raise TinySDError(f"they take {needed / 1e6:,.0f} MB of memory, {there / 1e6:,.0f} MB are available")
    return estimate_seconds(part, model.vae(), device)


@torch.no_grad()
def generate_pairs(source: Path, out: Path, options: Options, device: torch.device) -> Pairs:
    """The float model is read from `source`, the packed one from `out`, whose other parts both use."""
    recipe, part = sample_recipe(), open_source(source, options).unet()
    held = draw_held_out(Walker(part.config, part.tensors, device, part.release), out, recipe)
    model = TinySD.from_pretrained(out, device=device, dtype="full")
    latents = draw_again(model, held, recipe.seed + HELD_OUT_SEEDS, recipe.scale)[-1]
    floats, packed = (model.decode_values(each.to(model.device)).numpy() for each in (held.final, latents))
    return Pairs(list(recipe.held_out), floats, packed)
