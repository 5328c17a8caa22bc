"""DDIM and PLMS, with SD v1's timesteps."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinysd_batch.model.sampling.schedule import TRAIN_TIMESTEPS, SamplingRun, compute_alphas_cumprod, weighted_sum

PLMS_WEIGHTS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@dataclass(frozen=True, slots=True)
class DdimStep:
    """A step from one noise level down to the next. The alphas are cumulative products."""

    timestep: int
    next_timestep: int
    alpha: float
    next_alpha: float


def iter_ddim_steps(run: SamplingRun) -> Iterator[DdimStep]:
    """Yield steps at timesteps 1 + floor(i * 1000 / steps), from high to low.

    These are SD v1's own timesteps if `steps` divides 1000. With 1000 steps the offset of 1 is left out, as timestep
    1000 does not exist. The last step goes to the alpha of timestep 0, as SD v1's does, not to a clean image.
    """
    alphas = compute_alphas_cumprod(run.schedule)
    timesteps = np.arange(run.steps) * TRAIN_TIMESTEPS // run.steps + (1 if run.steps < TRAIN_TIMESTEPS else 0)
    for i in reversed(range(run.steps)):
        timestep, next_timestep = int(timesteps[i]), int(timesteps[max(i - 1, 0)])
        next_alpha = alphas[next_timestep] if i else alphas[0]
        yield DdimStep(timestep, next_timestep, float(alphas[timestep]), float(next_alpha))


def ddim_step(latents: Tensor, noise: Tensor, step: DdimStep, run: SamplingRun) -> Tensor:
    """Take one DDIM step (Song et al. 2020, equation 12). The share `eta` of its noise is generated afresh."""
    alpha, next_alpha = step.alpha, step.next_alpha
    clean = (latents - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    sigma = run.eta * ((1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)) ** 0.5
    noise_weight = (1 - next_alpha - sigma**2) ** 0.5
    next_latents: Tensor = next_alpha**0.5 * clean + noise_weight * noise
    if not run.eta:
        return next_latents
    gain = noise_weight - (next_alpha / alpha * (1 - alpha)) ** 0.5
    return next_latents + run.subtract_prediction_error(sigma, gain, step.timestep) * run.sample_noise_like(latents)


def sample_ddim(run: SamplingRun, latents: Tensor) -> Tensor:
    for number, step in enumerate(iter_ddim_steps(run)):
        timestep = torch.tensor(step.timestep)
        latents = ddim_step(latents, run.predict(latents, timestep), step, run)
        run.callback(number, timestep, latents)
    return latents


def sample_plms(run: SamplingRun, latents: Tensor) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, equations 9 to 12).

    The first step has no earlier predictions, so it evaluates the model once more at the next timestep.
    """
    history: list[Tensor] = []
    for number, step in enumerate(iter_ddim_steps(run)):
        timestep = torch.tensor(step.timestep)
        noise = run.predict(latents, timestep)
        history = [noise, *history[:3]]
        if len(history) == 1:
            lookahead = ddim_step(latents, noise, step, run)
            combined = (noise + run.predict(lookahead, torch.tensor(step.next_timestep))) / 2
        else:
            combined = weighted_sum(PLMS_WEIGHTS[len(history)], history)
        latents = ddim_step(latents, combined, step, run)
        run.callback(number, timestep, latents)
    return latents
