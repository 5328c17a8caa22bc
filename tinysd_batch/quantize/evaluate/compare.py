"""Measure how far a packed model is from the float model, on prompts never used in calibration.

The packed model runs in the engine that will generate with it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinysd_batch.model.sampling.schedule import StepCallback
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.quantize.calibration.trajectories import Trajectories

BATCH_SIZE = 16
MAX_DB = 200.0  # reported for identical tensors


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Signal-to-noise ratios in dB (larger is better), and the images [P, H, W, 3] in 0..1 of both models.

    Latents and images are generated with the packed model's noise correction, if it has one; noise predictions are
    compared without it.
    """

    times: list[float]  # timesteps of the float model's trajectories
    noise_sqnr_db: list[float]  # of the guided noise prediction at each timestep of these trajectories
    latents_sqnr_db: list[float]  # of the latents after each step, with each model on its own trajectory
    final_latents_sqnr_db: float
    psnr_db: float  # of all images together
    float_images: npt.NDArray[np.float32]
    packed_images: npt.NDArray[np.float32]

    @property
    def mean_noise_sqnr_db(self) -> float:
        """Mean over timesteps."""
        return float(np.mean(self.noise_sqnr_db))


@torch.no_grad()
def compare_models(
    folder: Path, held_out: Trajectories, first_seed: int, scale: float, device: torch.device
) -> ModelComparison:
    """Compare the packed model in `folder` with the float model's trajectories.

    Args:
        folder: the packed model.
        held_out: trajectories of the float model.
        first_seed: seed of the first prompt; the others have the seeds that follow.
        scale: guidance scale of the trajectories.
        device: where the packed model runs.
    """
    model = TinySD.from_pretrained(folder, device=device, dtype="full")
    float_noise, packed_noise = held_out.guided_noise(scale), predict_guided_noise(model, held_out, scale)
    noise_sqnr_db = [compute_sqnr_db(*pair) for pair in zip(float_noise, packed_noise, strict=True)]
    packed_latents = generate_latents(model, held_out, first_seed, scale)
    float_latents = [*held_out.latents[1:], held_out.final]
    float_images, packed_images = (
        model.decode_pixels(latents.to(model.device)) for latents in (held_out.final, packed_latents[-1])
    )
    return ModelComparison(
        times=held_out.times.tolist(),
        noise_sqnr_db=noise_sqnr_db,
        latents_sqnr_db=[compute_sqnr_db(*pair) for pair in zip(float_latents, packed_latents, strict=True)],
        final_latents_sqnr_db=compute_sqnr_db(held_out.final, packed_latents[-1]),
        psnr_db=float(-10 * (float_images - packed_images).square().mean().clamp(min=1e-20).log10()),
        float_images=float_images.numpy(),
        packed_images=packed_images.numpy(),
    )


@torch.no_grad()
def generate_latents(model: TinySD, held_out: Trajectories, first_seed: int, scale: float) -> list[Tensor]:
    """Generate the prompts of these trajectories with a model; return the latents [P, 4, h, w] after each step."""
    steps, prompts = held_out.latents.shape[:2]
    batches: list[list[Tensor]] = []
    for start in range(0, prompts, BATCH_SIZE):
        rows = slice(start, min(start + BATCH_SIZE, prompts))
        latents_after_steps: list[Tensor] = []
        model.generate(
            None,
            list(range(first_seed + rows.start, first_seed + rows.stop)),
            sampler="ddim",
            guidance_scale=scale,
            num_inference_steps=steps,
            prompt_embeds=held_out.context[rows],
            negative_prompt_embeds=held_out.context_without[rows],
            height=model.info.native_px,
            width=model.info.native_px,
            output_type="latent",
            callback=record_latents(latents_after_steps),
        )
        batches.append(latents_after_steps)
    return [torch.cat(latents) for latents in zip(*batches, strict=True)]


def record_latents(recorded: list[Tensor]) -> StepCallback:
    """Make a callback that appends the latents after each step to a list."""
    return lambda _, __, latents: recorded.append(latents.cpu())


def predict_guided_noise(model: TinySD, held_out: Trajectories, scale: float) -> list[Tensor]:
    """Predict the noise along the float model's trajectories, without noise correction.

    Returns:
        For each timestep the guided noise [P, 4, h, w].
    """
    predictions = []
    with model.offloader.holding(model.encode_fragment, model.decode_fragment):
        for latents, time in zip(held_out.latents, held_out.times, strict=True):
            batches = []
            for rows in torch.split(torch.arange(latents.shape[0]), BATCH_SIZE):
                context = torch.cat([held_out.context_without[rows], held_out.context[rows]]).to(model.device)
                doubled_latents = torch.cat([latents[rows], latents[rows]]).to(model.device)
                noise_uncond, noise_text = model.predict_noise(doubled_latents, time, context).chunk(2)
                batches.append((noise_uncond + scale * (noise_text - noise_uncond)).cpu())
            predictions.append(torch.cat(batches))
    return predictions


def compute_sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Compute the signal-to-quantization-noise ratio: power of the reference over power of the error, in dB."""
    error = (reference - approximation).square().sum()
    return min(float(10 * (reference.square().sum() / error.clamp(min=1e-30)).log10()), MAX_DB)
