"""Samplers in terms of sigma, as in k-diffusion: Euler ancestral, DPM2, LMS.

sigma = sqrt((1 - alpha) / alpha), so that latents = image + sigma * noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinysd_batch.model.sampling.schedule import TRAIN_TIMESTEPS, SamplingRun, compute_alphas_cumprod, weighted_sum


@dataclass(frozen=True, slots=True)
class SigmaSchedule:
    """Noise levels spread evenly over the timesteps 999 to 0, and a last one of 0."""

    train_sigmas: npt.NDArray[np.float64]  # sigma of each of the 1000 timesteps
    timesteps: npt.NDArray[np.float64]  # [steps]
    sigmas: list[float]  # [steps + 1]

    @classmethod
    def from_run(cls, run: SamplingRun) -> Self:
        alphas = compute_alphas_cumprod(run.schedule)
        train_sigmas = ((1 - alphas) / alphas) ** 0.5
        timesteps = np.linspace(TRAIN_TIMESTEPS - 1, 0, run.steps)
        sigmas = np.interp(timesteps, np.arange(TRAIN_TIMESTEPS), train_sigmas).tolist()
        return cls(train_sigmas, timesteps, [*sigmas, 0.0])

    def timestep_at(self, sigma: float) -> float:
        """Return the timestep of a noise level, which may lie between two whole ones."""
        return float(np.interp(sigma, self.train_sigmas, np.arange(TRAIN_TIMESTEPS)))

    def predict_noise(self, run: SamplingRun, latents: Tensor, sigma: float) -> Tensor:
        """Predict the noise in latents of this noise level."""
        timestep = torch.tensor(self.timestep_at(sigma), dtype=torch.float32)
        return run.predict(latents / (sigma**2 + 1) ** 0.5, timestep)


def compute_sigma_up(sigma: float, next_sigma: float) -> float:
    """Return the fresh noise of an ancestral step, which goes below `next_sigma` and adds noise to come back up."""
    sigma_up: float = min(next_sigma, (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) ** 0.5)
    return sigma_up


def sample_euler_a(run: SamplingRun, noise: Tensor) -> Tensor:
    """Euler ancestral: each Euler step goes below the next noise level, and fresh noise brings it back up."""
    schedule = SigmaSchedule.from_run(run)
    latents = noise * schedule.sigmas[0]
    for step, (sigma, next_sigma) in enumerate(pairwise(schedule.sigmas)):
        sigma_up = compute_sigma_up(sigma, next_sigma)
        sigma_down = (next_sigma**2 - sigma_up**2) ** 0.5
        change = sigma_down - sigma
        latents = latents + schedule.predict_noise(run, latents, sigma) * change
        sigma_fresh = run.subtract_prediction_error(sigma_up, change, schedule.timestep_at(sigma))
        latents = latents + sigma_fresh * run.sample_noise_like(latents)
        run.callback(step, torch.tensor(schedule.timesteps[step]), latents)
    return latents


def sample_dpm2(run: SamplingRun, noise: Tensor) -> Tensor:
    return run_dpm2(run, noise, ancestral=False)


def sample_dpm2_a(run: SamplingRun, noise: Tensor) -> Tensor:
    return run_dpm2(run, noise, ancestral=True)


def run_dpm2(run: SamplingRun, noise: Tensor, *, ancestral: bool) -> Tensor:
    """Midpoint steps (Karras et al. 2022, algorithm 2 without churn) with the midpoint halfway in sigma^(1/3).

    Ancestral steps go below the next noise level, and fresh noise brings them back up.
    """
    schedule = SigmaSchedule.from_run(run)
    latents = noise * schedule.sigmas[0]
    for step, (sigma, next_sigma) in enumerate(pairwise(schedule.sigmas)):
        sigma_up = compute_sigma_up(sigma, next_sigma) if ancestral else 0.0
        sigma_down = (next_sigma**2 - sigma_up**2) ** 0.5
        sigma_mid = ((sigma ** (1 / 3) + sigma_down ** (1 / 3)) / 2) ** 3
        midpoint = latents + schedule.predict_noise(run, latents, sigma) * (sigma_mid - sigma)
        change = sigma_down - sigma
        latents = latents + schedule.predict_noise(run, midpoint, sigma_mid) * change
        if ancestral:
            sigma_fresh = run.subtract_prediction_error(sigma_up, change, schedule.timestep_at(sigma_mid))
            latents = latents + sigma_fresh * run.sample_noise_like(latents)
        run.callback(step, torch.tensor(schedule.timesteps[step]), latents)
    return latents


def sample_lms(run: SamplingRun, noise: Tensor) -> Tensor:
    """Linear multistep of order 4 (Adams-Bashforth with uneven steps)."""
    schedule = SigmaSchedule.from_run(run)
    latents = noise * schedule.sigmas[0]
    history: list[Tensor] = []
    for step, sigma in enumerate(schedule.sigmas[:-1]):
        history = [schedule.predict_noise(run, latents, sigma), *history[:3]]
        latents = latents + weighted_sum(compute_lms_weights(schedule.sigmas, step, len(history)), history)
        run.callback(step, torch.tensor(schedule.timesteps[step]), latents)
    return latents


def compute_lms_weights(sigmas: Sequence[float], step: int, order: int) -> list[float]:
    """Return the weight of each of the last `order` predictions, newest first.

    A weight is the integral of a Lagrange basis polynomial over the step. Gauss-Legendre quadrature with two points
    integrates a cubic exactly.
    """
    start, end = sigmas[step], sigmas[step + 1]
    points = [(start + end + sign * (end - start) / 3**0.5) / 2 for sign in (-1, 1)]
    nodes = [sigmas[step - offset] for offset in range(order)]
    weights = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        basis = (math.prod((point - other) / (node - other) for other in others) for point in points)
        weights.append(sum(basis) * (end - start) / 2)
    return weights
