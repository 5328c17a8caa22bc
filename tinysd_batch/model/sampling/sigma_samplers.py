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

from tinysd_batch.model.sampling.schedule import TRAIN_STEPS, Run, alphas_cumprod, weighted_sum


@dataclass(frozen=True, slots=True)
class Sigmas:
    """Noise levels spread evenly over the timesteps 999 to 0, and a last one of 0."""

    table: npt.NDArray[np.float64]  # sigma of each timestep
    times: npt.NDArray[np.float64]
    levels: list[float]

    @classmethod
    def of(cls, run: Run) -> Self:
        alphas = alphas_cumprod(run.schedule)
        table = ((1 - alphas) / alphas) ** 0.5
        times = np.linspace(TRAIN_STEPS - 1, 0, run.steps)
        return cls(table, times, [*np.interp(times, np.arange(TRAIN_STEPS), table).tolist(), 0.0])

    def time(self, sigma: float) -> float:
        """The timestep of a level, which may lie between two whole ones."""
        return float(np.interp(sigma, self.table, np.arange(TRAIN_STEPS)))

    def predict(self, run: Run, latents: Tensor, sigma: float) -> Tensor:
        """The noise in latents at this level."""
        return run.predict(latents / (sigma**2 + 1) ** 0.5, torch.tensor(self.time(sigma), dtype=torch.float32))


def way_back(sigma: float, below: float) -> float:
    """How much fresh noise brings an ancestral step from sigma, which goes too far down, back up to `below`."""
    up: float = min(below, (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5)
    return up


def euler_a(run: Run, noise: Tensor) -> Tensor:
    """Euler's steps, further down than wanted and back up by fresh noise."""
    sigmas = Sigmas.of(run)
    latents = noise * sigmas.levels[0]
    for step, (sigma, below) in enumerate(pairwise(sigmas.levels)):
        up = way_back(sigma, below)
        down = (below**2 - up**2) ** 0.5
        latents = latents + sigmas.predict(run, latents, sigma) * (down - sigma)
        latents = latents + run.absorb(up, down - sigma, sigmas.time(sigma)) * run.draw(latents)
        run.callback(step, torch.tensor(sigmas.times[step]), latents)
    return latents


def dpm2(run: Run, noise: Tensor) -> Tensor:
    return second_order(run, noise, ancestral=False)


def dpm2_a(run: Run, noise: Tensor) -> Tensor:
    return second_order(run, noise, ancestral=True)


def second_order(run: Run, noise: Tensor, *, ancestral: bool) -> Tensor:
    """Midpoint steps (Karras et al. 2022, algorithm 2 without churn) with the midpoint halfway in sigma^(1/3).

    Ancestral steps go further down and come back up by fresh noise.
    """
    sigmas = Sigmas.of(run)
    latents = noise * sigmas.levels[0]
    for step, (sigma, below) in enumerate(pairwise(sigmas.levels)):
        up = way_back(sigma, below) if ancestral else 0.0
        down = (below**2 - up**2) ** 0.5
        middle = ((sigma ** (1 / 3) + down ** (1 / 3)) / 2) ** 3
        halfway = latents + sigmas.predict(run, latents, sigma) * (middle - sigma)
        latents = latents + sigmas.predict(run, halfway, middle) * (down - sigma)
        if ancestral:
            latents = latents + run.absorb(up, down - sigma, sigmas.time(middle)) * run.draw(latents)
        run.callback(step, torch.tensor(sigmas.times[step]), latents)
    return latents


def lms(run: Run, noise: Tensor) -> Tensor:
    """Linear multistep of order 4 (Adams-Bashforth on uneven steps)."""
    sigmas = Sigmas.of(run)
    latents = noise * sigmas.levels[0]
    history: list[Tensor] = []
    for step, sigma in enumerate(sigmas.levels[:-1]):
        history = [sigmas.predict(run, latents, sigma), *history[:3]]
        latents = latents + weighted_sum(multistep_weights(sigmas.levels, step, len(history)), history)
        run.callback(step, torch.tensor(sigmas.times[step]), latents)
    return latents


def multistep_weights(levels: Sequence[float], step: int, order: int) -> list[float]:
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
