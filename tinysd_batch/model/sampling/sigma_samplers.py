"""Samplers over noise levels sigma, as in k-diffusion: Euler, DPM2, LMS."""

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

    train_sigmas: npt.NDArray[np.float64]  # sigma of each timestep
    timesteps: npt.NDArray[np.float64]
    sigmas: list[float]

    @classmethod
    def from_run(cls, run: SamplingRun) -> Self:
        alphas = compute_alphas_cumprod(run.schedule)
        table = ((1 - alphas) / alphas) ** 0.5
        times = np.linspace(TRAIN_TIMESTEPS - 1, 0, run.steps)
        return cls(table, times, [*np.interp(times, np.arange(TRAIN_TIMESTEPS), table).tolist(), 0.0])

    def time(self, sigma: float) -> float:
        """The timestep of a level, which may lie between two whole ones."""
        return float(np.interp(sigma, self.train_sigmas, np.arange(TRAIN_TIMESTEPS)))

    def predict(self, run: SamplingRun, latents: Tensor, sigma: float) -> Tensor:
        """The noise in latents at this level."""
        return run.predict(latents / (sigma**2 + 1) ** 0.5, torch.tensor(self.time(sigma), dtype=torch.float32))


def compute_sigma_up(sigma: float, below: float) -> float:
    """How much fresh noise brings an ancestral step from sigma, which goes too far down, back up to `below`."""
    up: float = min(below, (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5)
    return up


def sample_euler_a(run: SamplingRun, noise: Tensor) -> Tensor:
    """Euler's steps, further down than wanted and back up by fresh noise."""
    sigmas = SigmaSchedule.from_run(run)
    latents = noise * sigmas.sigmas[0]
    for step, (sigma, below) in enumerate(pairwise(sigmas.sigmas)):
        up = compute_sigma_up(sigma, below)
        down = (below**2 - up**2) ** 0.5
        latents = latents + sigmas.predict(run, latents, sigma) * (down - sigma)
        latents = latents + run.subtract_prediction_error(up, down - sigma, sigmas.time(sigma)) * run.sample_noise_like(
            latents
        )
        run.callback(step, torch.tensor(sigmas.timesteps[step]), latents)
    return latents


def sample_dpm2(run: SamplingRun, noise: Tensor) -> Tensor:
    return run_dpm2(run, noise, ancestral=False)


def sample_dpm2_a(run: SamplingRun, noise: Tensor) -> Tensor:
    return run_dpm2(run, noise, ancestral=True)


def run_dpm2(run: SamplingRun, noise: Tensor, *, ancestral: bool) -> Tensor:
    """Midpoint steps (Karras et al. 2022, algorithm 2 without churn) with the midpoint halfway in sigma^(1/3).

    Ancestral steps go further down and come back up by fresh noise.
    """
    sigmas = SigmaSchedule.from_run(run)
    latents = noise * sigmas.sigmas[0]
    for step, (sigma, below) in enumerate(pairwise(sigmas.sigmas)):
        up = compute_sigma_up(sigma, below) if ancestral else 0.0
        down = (below**2 - up**2) ** 0.5
        middle = ((sigma ** (1 / 3) + down ** (1 / 3)) / 2) ** 3
        halfway = latents + sigmas.predict(run, latents, sigma) * (middle - sigma)
        latents = latents + sigmas.predict(run, halfway, middle) * (down - sigma)
        if ancestral:
            latents = latents + run.subtract_prediction_error(
                up, down - sigma, sigmas.time(middle)
            ) * run.sample_noise_like(latents)
        run.callback(step, torch.tensor(sigmas.timesteps[step]), latents)
    return latents


def sample_lms(run: SamplingRun, noise: Tensor) -> Tensor:
    """Linear multistep of order 4 (Adams-Bashforth on uneven steps)."""
    sigmas = SigmaSchedule.from_run(run)
    latents = noise * sigmas.sigmas[0]
    history: list[Tensor] = []
    for step, sigma in enumerate(sigmas.sigmas[:-1]):
        history = [sigmas.predict(run, latents, sigma), *history[:3]]
        latents = latents + weighted_sum(compute_lms_weights(sigmas.sigmas, step, len(history)), history)
        run.callback(step, torch.tensor(sigmas.timesteps[step]), latents)
    return latents


def compute_lms_weights(levels: Sequence[float], step: int, order: int) -> list[float]:
    """How much each of the last `order` predictions counts: integrals of Lagrange's polynomials over the step.

    Two of Gauss's points integrate a cubic exactly.
    """
    start, end = levels[step], levels[step + 1]
    points = [(start + end + sign * (end - start) / 3**0.5) / 2 for sign in (-1, 1)]
    nodes = [levels[step - back] for back in range(order)]
    weights = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        basis = (math.prod((point - other) / (node - other) for other in others) for point in points)
        weights.append(sum(basis) * (end - start) / 2)
    return weights
