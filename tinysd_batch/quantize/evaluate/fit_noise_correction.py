"""Fit a noise correction for a packed model, and keep it only if it brings images closer to the float model's.

The method is that of PTQD (He et al. 2023), but slopes may have either sign. At each timestep a slope, a bias per
channel and the deviation of the remaining error are fitted. Smaller errors of single predictions do not prove an
improvement: dividing by a slope below one also scales up the remaining error. So the final latents of held-out prompts
decide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinysd_batch.model.sampling.noise_correction import (
    MAX_SLOPE,
    MIN_SLOPE,
    Knot,
    NoiseCorrection,
    write_correction,
)
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.evaluate.compare import compute_sqnr_db, generate_latents, predict_guided_noise

ROUND_DIGITS = 6
MAX_BIAS = 10.0
MIN_GAIN_DB = 0.1  # a smaller gain may be due to the prompts, and lost at other guidance scales
# Generates the final latents of the held-out prompts with a correction, or without.
GenerateLatents = Callable[[NoiseCorrection | None], Tensor]


@dataclass(frozen=True, slots=True)
class CorrectionEvaluation:
    """A correction and its effect: final latents of held-out prompts against the float model's, in dB."""

    correction: NoiseCorrection
    has_bias: bool
    sqnr_db_without: float
    sqnr_db_with: float

    @property
    def is_improvement(self) -> bool:
        return self.sqnr_db_with >= self.sqnr_db_without + MIN_GAIN_DB

    def __str__(self) -> str:
        contents = "slopes and biases" if self.has_bias else "slopes"
        verdict = "kept" if self.is_improvement else f"not kept, as it gains less than {MIN_GAIN_DB} dB"
        return (
            f"{verdict} ({contents}): final latents {self.sqnr_db_with:.2f} dB with it, "
            f"{self.sqnr_db_without:.2f} dB without"
        )


def add_noise_correction(
    folder: Path,
    calibration: Trajectories,
    held_out: Trajectories,
    first_seed: int,
    scale: float,
    device: torch.device,
) -> CorrectionEvaluation:
    """Fit a noise correction for a packed model folder, and write it into the folder if it is an improvement.

    Args:
        folder: the packed model.
        calibration: trajectories of the float model to fit the correction on.
        held_out: trajectories of the float model to evaluate it on.
        first_seed: seed of the first held-out prompt.
        scale: guidance scale of the trajectories.
        device: where the packed model runs.
    """
    model = TinySD.from_pretrained(folder, device=device, dtype="full")

    def generate(correction: NoiseCorrection | None) -> Tensor:
        model.correction = correction
        return generate_latents(model, held_out, first_seed, scale)[-1]

    evaluation = evaluate_correction(fit_correction(model, calibration, scale), generate, held_out.final)
    if evaluation.is_improvement:
        write_correction(folder / "unet", evaluation.correction)
    return evaluation


def evaluate_correction(
    correction: NoiseCorrection, generate: GenerateLatents, float_latents: Tensor
) -> CorrectionEvaluation:
    """Generate without the correction, with its slopes only and with all of it; choose the closer of the latter two."""
    sqnr_db_without = compute_sqnr_db(float_latents, generate(None))
    slopes_only = correction.without_bias()
    latents_by_slopes, latents_by_all = generate(slopes_only), generate(correction)
    has_bias = compute_sqnr_db(float_latents, latents_by_all) > compute_sqnr_db(float_latents, latents_by_slopes)
    chosen, latents = (correction, latents_by_all) if has_bias else (slopes_only, latents_by_slopes)
    # The remaining error can replace fresh noise only if it makes latents vary more; at 2 bits they may vary less.
    absorbs = bool(latents.std() > float_latents.std())
    sqnr_db_with = compute_sqnr_db(float_latents, latents)
    return CorrectionEvaluation(chosen.with_absorbs(absorbs), has_bias, sqnr_db_without, sqnr_db_with)


@torch.no_grad()
def fit_correction(model: TinySD, trajectories: Trajectories, scale: float) -> NoiseCorrection:
    """Fit a knot by least squares over all prompts, at each timestep of the float model's trajectories."""
    float_noise, packed_noise = trajectories.guided_noise(scale), predict_guided_noise(model, trajectories, scale)
    knots = [
        fit_knot(time, *noises)
        for time, *noises in zip(trajectories.times.tolist(), float_noise, packed_noise, strict=True)
    ]
    return NoiseCorrection(scale=scale, knots=sorted(knots, key=lambda knot: knot.time))


def fit_knot(time: float, float_noise: Tensor, packed_noise: Tensor) -> Knot:
    """Fit packed_noise = (1 + slope) * float_noise + bias + error; noises are [P, 4, h, w], biases per channel."""
    float_mean, packed_mean = (noise.mean(dim=(0, 2, 3), keepdim=True) for noise in (float_noise, packed_noise))
    centered = float_noise - float_mean
    slope = (centered * (packed_noise - packed_mean)).sum() / centered.square().sum().clamp(min=1e-12) - 1
    slope = slope.clamp(MIN_SLOPE, MAX_SLOPE)
    bias = (packed_mean - (1 + slope) * float_mean).clamp(-MAX_BIAS, MAX_BIAS)
    error = (packed_noise - bias) / (1 + slope) - float_noise
    return Knot(
        time=time,
        slope=round(float(slope), ROUND_DIGITS),
        bias=[round(value, ROUND_DIGITS) for value in bias.flatten().tolist()],
        deviation=round(float(error.square().mean().sqrt()), ROUND_DIGITS),
    )
