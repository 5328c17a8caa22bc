"""How far a packed model is from the float one: on prompts that calibration never saw, by the engine that will draw."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.model.sampling.schedule import StepCallback
from tinysd_batch.quantize.calibration.trajectories import Trajectories

BATCH_SIZE = 16
MAX_DB = 200.0  # for predictions that are the same to the bit


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Signal to noise ratios in dB, larger is better; pictures are [P, H, W, 3] in 0..1.

    Latents and pictures are as the model draws, with the noise correction that it may have; the noise is without.
    """

    times: list[float]
    noise_sqnr_db: list[float]  # of the guided noise prediction at each time of the float model's trajectories
    latents_sqnr_db: list[float]  # of the latents after each step, each model on its own way
    final_latents_sqnr_db: float  # of the final latents
    psnr_db: float  # of the pictures
    float_images: npt.NDArray[np.float32]
    packed_images: npt.NDArray[np.float32]

    @property
    def mean_noise_sqnr_db(self) -> float:
        """Over times."""
        return float(np.mean(self.noise_sqnr_db))


@torch.no_grad()
def compare_models(
    folder: Path, held: Trajectories, first_seed: int, scale: float, device: torch.device
) -> ModelComparison:
    """Compare the model of a folder with the float model's trajectories. `first_seed` is the first prompt's."""
    model = TinySD.from_pretrained(folder, device=device, dtype="full")
    noise_db = [
        compute_sqnr_db(*pair)
        for pair in zip(held.guided_noise(scale), predict_guided_noise(model, held, scale), strict=True)
    ]
    mine = generate_latents(model, held, first_seed, scale)
    theirs = [*held.latents[1:], held.final]
    floats, packed = (model.decode_pixels(latents.to(model.device)) for latents in (held.final, mine[-1]))
    return ModelComparison(
        times=held.times.tolist(),
        noise_sqnr_db=noise_db,
        latents_sqnr_db=[compute_sqnr_db(*pair) for pair in zip(theirs, mine, strict=True)],
        final_latents_sqnr_db=compute_sqnr_db(held.final, mine[-1]),
        psnr_db=float(-10 * (floats - packed).square().mean().clamp(min=1e-20).log10()),
        float_images=floats.numpy(),
        packed_images=packed.numpy(),
    )


@torch.no_grad()
def generate_latents(model: TinySD, held: Trajectories, first_seed: int, scale: float) -> list[Tensor]:
    """The same prompts and seeds by this model: latents [P, 4, h, w] after each step."""
    steps, prompts = held.latents.shape[:2]
    parts: list[list[Tensor]] = []
    for start in range(0, prompts, BATCH_SIZE):
        part = slice(start, min(start + BATCH_SIZE, prompts))
        after: list[Tensor] = []
        model.generate(
            None, list(range(first_seed + part.start, first_seed + part.stop)), sampler="ddim", guidance_scale=scale,
            num_inference_steps=steps, prompt_embeds=held.context[part], output_type="latent",
            negative_prompt_embeds=held.context_without[part], height=model.info.native_px, width=model.info.native_px,
            callback=record_latents(after),
        )  # fmt: skip
        parts.append(after)
    return [torch.cat(step) for step in zip(*parts, strict=True)]


def record_latents(kept: list[Tensor]) -> StepCallback:
    return lambda _, __, latents: kept.append(latents.cpu())


def predict_guided_noise(model: TinySD, held: Trajectories, scale: float) -> list[Tensor]:
    """What the model predicts where the float model went, not corrected, [P, 4, h, w] for each time."""
    found = []
    with model.offloader.holding(model.encode_fragment, model.decode_fragment):
        for latents, time in zip(held.latents, held.times, strict=True):
            parts = []
            for rows in torch.split(torch.arange(latents.shape[0]), BATCH_SIZE):
                context = torch.cat([held.context_without[rows], held.context[rows]]).to(model.device)
                both = torch.cat([latents[rows], latents[rows]]).to(model.device)
                without, with_text = model.predict_noise(both, time, context).chunk(2)
                parts.append((without + scale * (with_text - without)).cpu())
            found.append(torch.cat(parts))
    return found


def compute_sqnr_db(wanted: Tensor, found: Tensor) -> float:
    """Power of what is wanted over power of the error, over all rows."""
    error = (wanted - found).square().sum()
    return min(float(10 * (wanted.square().sum() / error.clamp(min=1e-30)).log10()), MAX_DB)
