"""DDIM and PLMS."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinysd_batch.model.sampling.schedule import TRAIN_TIMESTEPS, SamplingRun, compute_alphas_cumprod, weighted_sum

PLMS_WEIGHTS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@dataclass(frozen=True, slots=True)
class DdimStep:
    """A step from one noise level down to the next."""

    time: int
    next_time: int
    alpha: float
    alpha_next: float


def iter_ddim_steps(run: SamplingRun) -> Iterator[DdimStep]:
    """Timesteps 1 + floor(i * 1000 / steps), from high to low: SD v1's own where the steps divide 1000.

    1000 steps leave no room for the 1. The last step goes to alpha 0, as SD v1's does, not to a clean image.
    """
    alphas = compute_alphas_cumprod(run.schedule)
    times = np.arange(run.steps) * TRAIN_TIMESTEPS // run.steps + (1 if run.steps < TRAIN_TIMESTEPS else 0)
    for i in reversed(range(run.steps)):
        below = max(i - 1, 0)
        alpha_next = alphas[times[below]] if i else alphas[0]
        yield DdimStep(int(times[i]), int(times[below]), float(alphas[times[i]]), float(alpha_next))


def ddim_step(latents: Tensor, noise: Tensor, level: DdimStep, run: SamplingRun) -> Tensor:
    """DDIM's step (Song et al. 2020, equation 12). `eta` of the noise it may put back is drawn afresh."""
    alpha, alpha_next = level.alpha, level.alpha_next
    clean = (latents - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    sigma = run.eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
    share = (1 - alpha_next - sigma**2) ** 0.5
    below: Tensor = alpha_next**0.5 * clean + share * noise
    gain = share - (alpha_next / alpha * (1 - alpha)) ** 0.5
    return (
        below + run.subtract_prediction_error(sigma, gain, level.time) * run.sample_noise_like(latents)
        if run.eta
        else below
    )


def sample_ddim(run: SamplingRun, latents: Tensor) -> Tensor:
    for step, level in enumerate(iter_ddim_steps(run)):
        time = torch.tensor(level.time)
        latents = ddim_step(latents, run.predict(latents, time), level, run)
        run.callback(step, time, latents)
    return latents


def sample_plms(run: SamplingRun, latents: Tensor) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, equations 9 to 12); the first step looks ahead instead of back."""
    history: list[Tensor] = []
    for step, level in enumerate(iter_ddim_steps(run)):
        time = torch.tensor(level.time)
        noise = run.predict(latents, time)
        history = [noise, *history[:3]]
        if len(history) == 1:
            ahead = ddim_step(latents, noise, level, run)
            mixed = (noise + run.predict(ahead, torch.tensor(level.next_time))) / 2
        else:
            mixed = weighted_sum(PLMS_WEIGHTS[len(history)], history)
        latents = ddim_step(latents, mixed, level, run)
        run.callback(step, time, latents)
    return latents
