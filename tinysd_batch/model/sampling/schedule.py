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

NoiseGenerator = Generator | CudaNoiseGenerator  # where an image's noise comes from

PredictNoise = Callable[
    [Tensor, Tensor], Tensor
]  # latents [B, 4, h, w] and a timestep, fractional allowed, to their noise

StepCallback = Callable[[int, Tensor, Tensor], None]  # step from 0, timestep, latents [B, 4, h, w]

ErrorDeviation = Callable[[float], float]  # timestep -> standard deviation of a prediction's error there


def zero_deviation(_: float) -> float:
    """The deviation of predictions that are taken as they come."""
    return 0.0


@dataclass(frozen=True, slots=True)
class SamplingRun:
    """What a sampler is given besides its starting noise."""

    predict: PredictNoise
    steps: int  # 1 to 1000
    schedule: dict[str, Any]  # beta_start, beta_end, beta_schedule
    generators: Sequence[NoiseGenerator]  # one per image
    eta: float = 0.0
    callback: StepCallback = lambda *_: None
    deviation: ErrorDeviation = zero_deviation

    def sample_noise_like(self, like: Tensor) -> Tensor:
        """Fresh noise in the shape of the latents, each image's from its own generator."""
        return sample_noise(self.generators, like.shape[1:]).to(like.device)

    def subtract_prediction_error(self, sigma: float, gain: float, time: float) -> float:
        """How much fresh noise to add where sigma is wanted: less by the error of the prediction of this time.

        That counts `gain` times, and does for noise; variances add up (PTQD, He et al. 2023). Never below zero.
        """
        error = gain * self.deviation(time)
        return max(0.0, sigma**2 - error**2) ** 0.5 if error else sigma


def sample_noise(generators: Sequence[NoiseGenerator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape], float32, row i from generator i. Drawn on the CPU: the same on every card."""
    return torch.stack(
        [
            one.randn(shape) if isinstance(one, CudaNoiseGenerator) else torch.randn(tuple(shape), generator=one)
            for one in generators
        ]
    )


def compute_alphas_cumprod(schedule: dict[str, Any]) -> npt.NDArray[np.float64]:
    """What is left of an image's variance at each of the 1000 noise levels, from the least noise to the most."""
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
