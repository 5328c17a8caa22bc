"""The noise schedule and what every sampler shares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.sampling.cuda_noise import CudaNoiseGenerator

TRAIN_TIMESTEPS = 1000

NoiseGenerator = Generator | CudaNoiseGenerator  # generates one image's noise

# Predicts the noise in latents [B, 4, h, w] at a timestep, which may be fractional.
PredictNoise = Callable[[Tensor, Tensor], Tensor]

StepCallback = Callable[[int, Tensor, Tensor], None]  # step from 0, timestep, latents [B, 4, h, w]

ErrorDeviation = Callable[[float], float]  # timestep -> standard deviation of the prediction's error


def zero_deviation(_: float) -> float:
    """Return 0: treat predictions as exact."""
    return 0.0


@dataclass(frozen=True, slots=True)
class SamplingRun:
    """The inputs of a sampler besides its starting noise."""

    predict: PredictNoise
    steps: int  # 1 to 1000
    schedule: dict[str, Any]  # beta_start, beta_end, beta_schedule
    generators: Sequence[NoiseGenerator]  # one per image
    eta: float = 0.0
    callback: StepCallback = lambda *_: None
    deviation: ErrorDeviation = zero_deviation

    def sample_noise_like(self, latents: Tensor) -> Tensor:
        """Return fresh noise in the shape of `latents`, each image's from its own generator."""
        return sample_noise(self.generators, latents.shape[1:]).to(latents.device)

    def subtract_prediction_error(self, sigma: float, gain: float, timestep: float) -> float:
        """Return the deviation of the fresh noise to add where `sigma` is required (PTQD, He et al. 2023).

        The prediction's error at this timestep enters the latents multiplied by `gain` and already acts as noise.
        Variances add up, so the result is sqrt(sigma^2 - (gain * error)^2), or 0 if the error exceeds `sigma`.
        """
        error = gain * self.deviation(timestep)
        return max(0.0, sigma**2 - error**2) ** 0.5 if error else sigma


def sample_noise(generators: Sequence[NoiseGenerator], shape: Sequence[int]) -> Tensor:
    """Return standard normal noise [B, *shape], float32, row i from generator i.

    Generated on the CPU, so that it is the same on every device.
    """
    return torch.stack(
        [
            generator.randn(shape)
            if isinstance(generator, CudaNoiseGenerator)
            else torch.randn(tuple(shape), generator=generator)
            for generator in generators
        ]
    )


def compute_alphas_cumprod(schedule: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Return the remaining share of the image's variance at each of the 1000 timesteps, least noise first."""
    start, end = schedule["beta_start"], schedule["beta_end"]
    match schedule.get("beta_schedule"):
        case "scaled_linear":  # SD v1
            betas = np.linspace(start**0.5, end**0.5, TRAIN_TIMESTEPS) ** 2
        case "linear":
            betas = np.linspace(start, end, TRAIN_TIMESTEPS)
        case other:
            raise ModelError(f"beta_schedule {other!r}: scaled_linear or linear was expected")
    return np.cumprod(1 - betas)


def weighted_sum(weights: Sequence[float], predictions: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(predictions[0])
    for weight, prediction in zip(weights, predictions, strict=True):
        total += weight * prediction
    return total
