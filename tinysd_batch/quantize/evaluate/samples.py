"""Four images by the float model and by the packed one, to look at what quantizing did without calibration data."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinysd_batch.errors import TinySDError
from tinysd_batch.model.device.available_memory import get_available_memory_bytes
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.quantize.calibration.trajectories import HELD_OUT_SEED_OFFSET, generate_held_out_trajectories
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.estimate.duration import (
    ComputeCost,
    count_decoder_macs,
    count_segment_costs,
    measure_device_speed,
)
from tinysd_batch.quantize.estimate.memory import estimate_generation_resources, make_meta_latents
from tinysd_batch.quantize.evaluate.compare import generate_latents
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent, SourceOptions
from tinysd_batch.quantize.sources.open import open_source

N_PAIRS, STEPS = 4, 8


@dataclass(frozen=True, slots=True)
class ImagePairs:
    """Images [P, H, W, 3] in 0..1 of the same prompts and seeds."""

    prompts: list[str]
    float_images: npt.NDArray[np.float32]
    packed_images: npt.NDArray[np.float32]


def build_sample_recipe() -> Recipe:
    """The first held-out prompts of the recipe that ships, in few steps."""
    shipped = read_recipe(None)
    return shipped.model_copy(update={"held_out": shipped.held_out[:N_PAIRS], "steps": STEPS})


def estimate_generation_s(part: SourceComponent, vae: SourceComponent, device: torch.device) -> float:
    """For both models: text guidance calls the UNet twice a step."""
    row = sum(unit.total for unit in count_segment_costs(part, {}).values())
    images = ComputeCost(2 * N_PAIRS * (2 * STEPS * row + count_decoder_macs(vae, make_meta_latents(part))))
    return images.duration_s(measure_device_speed(device))


def estimate_samples_s(source: Path, options: SourceOptions, device: torch.device) -> float:
    """How long `generate_pairs` will take. Raises TinySDError where the device has too little memory for it."""
    model = open_source(source, options)
    part = model.unet()
    needed, there = (
        estimate_generation_resources(part, build_sample_recipe()).memory_bytes,
        get_available_memory_bytes(device),
    )
    if there is not None and there < needed:
        raise TinySDError(f"they take {needed / 1e6:,.0f} MB of memory, {there / 1e6:,.0f} MB are available")
    return estimate_generation_s(part, model.vae(), device)


@torch.no_grad()
def generate_image_pairs(source: Path, out: Path, options: SourceOptions, device: torch.device) -> ImagePairs:
    """The float model is read from `source`, the packed one from `out`, whose other parts both use."""
    recipe, part = build_sample_recipe(), open_source(source, options).unet()
    held = generate_held_out_trajectories(SegmentedUNet(part.config, part.tensors, device, part.release), out, recipe)
    model = TinySD.from_pretrained(out, device=device, dtype="full")
    latents = generate_latents(model, held, recipe.seed + HELD_OUT_SEED_OFFSET, recipe.scale)[-1]
    floats, packed = (model.decode_pixels(each.to(model.device)).numpy() for each in (held.final, latents))
    return ImagePairs(list(recipe.held_out), floats, packed)
