"""Generate four sample images with the float and with the packed model, to show what data-free quantization changed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinysd_batch.errors import TinySDError
from tinysd_batch.model.device.available_memory import get_available_memory_bytes
from tinysd_batch.model.tiny_sd import TinySD
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
from tinysd_batch.quantize.sources.formats import open_source

N_PAIRS, STEPS = 4, 8


@dataclass(frozen=True, slots=True)
class ImagePairs:
    """Images [P, H, W, 3] in 0..1 of the same prompts and seeds."""

    prompts: list[str]
    float_images: npt.NDArray[np.float32]
    packed_images: npt.NDArray[np.float32]


def build_sample_recipe() -> Recipe:
    """Return the recipe that ships, with its first held-out prompts only and few steps."""
    shipped = read_recipe(None)
    return shipped.model_copy(update={"held_out": shipped.held_out[:N_PAIRS], "steps": STEPS})


def estimate_generation_s(unet: SourceComponent, vae: SourceComponent, device: torch.device) -> float:
    """Estimate how long both models take to generate the samples; guidance calls the UNet twice per step."""
    macs_per_call = sum(segment.total for segment in count_segment_costs(unet, {}).values())
    decoder_macs = count_decoder_macs(vae, make_meta_latents(unet))
    cost = ComputeCost(2 * N_PAIRS * (2 * STEPS * macs_per_call + decoder_macs))
    return cost.duration_s(measure_device_speed(device))


def estimate_samples_s(source: Path, options: SourceOptions, device: torch.device) -> float:
    """Estimate how long `generate_image_pairs` will take.

    Raises:
        TinySDError: the device has too little memory.
    """
    model = open_source(source, options)
    unet = model.unet()
    needed_bytes = estimate_generation_resources(unet, build_sample_recipe()).memory_bytes
    available_bytes = get_available_memory_bytes(device)
    if available_bytes is not None and available_bytes < needed_bytes:
        raise TinySDError(
            f"they take {needed_bytes / 1e6:,.0f} MB of memory, {available_bytes / 1e6:,.0f} MB are available"
        )
    return estimate_generation_s(unet, model.vae(), device)


@torch.no_grad()
def generate_image_pairs(source: Path, out: Path, options: SourceOptions, device: torch.device) -> ImagePairs:
    """Generate with the float UNet of `source` and with the packed model `out`, whose other components both use."""
    recipe, component = build_sample_recipe(), open_source(source, options).unet()
    float_unet = SegmentedUNet(component.config, component.tensors, device, component.release)
    held_out = generate_held_out_trajectories(float_unet, out, recipe)
    model = TinySD.from_pretrained(out, device=device, dtype="full")
    packed_latents = generate_latents(model, held_out, recipe.seed + HELD_OUT_SEED_OFFSET, recipe.scale)[-1]
    float_images, packed_images = (
        model.decode_pixels(latents.to(model.device)).numpy() for latents in (held_out.final, packed_latents)
    )
    return ImagePairs(list(recipe.held_out), float_images, packed_images)
