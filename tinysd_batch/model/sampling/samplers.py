"""Samplers: from noise to latents, given something that predicts noise. Float32 throughout.

diffusers' schedulers do the work where they compute what SD v1's own scripts compute. Written out here are
- ddim and plms: diffusers' timesteps leave out the noisiest ones where the steps do not divide 1000 (600 steps would
  start at 600, with noise meant for 999), and its plms knows no eta;
- euler_a: diffusers draws its noise where nobody can lower it, and by torch's own generators only;
- dpm2 and dpm2_a: diffusers puts their midpoints elsewhere and leaves out an evaluation;
- lms: diffusers integrates polynomials numerically, by scipy, at every step; their integrals are known.

Where a model's predictions are known to err by so much at a time (`Run.deviation`, from a noise correction), those that
draw fresh noise (ddim and plms with eta, euler_a, dpm2_a) draw less: the error is noise already. Of the several
predictions that plms mixes, and of dpm2_a's two, the newest one's error stands for all.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Generator, Tensor

from tinysd_batch.config import SAMPLERS
from tinysd_batch.errors import UsageError
from tinysd_batch.model.sampling.ddim_plms import sample_ddim, sample_plms
from tinysd_batch.model.sampling.schedule import TRAIN_TIMESTEPS, SamplingRun
from tinysd_batch.model.sampling.sigma_samplers import sample_dpm2, sample_dpm2_a, sample_euler_a, sample_lms


def sample(sampler: str, run: SamplingRun, noise: Tensor) -> Tensor:
    """Unit noise [B, 4, h, w] to latents of an image. Raises UsageError for a sampler that is none."""
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler {sampler!r}: no such sampler; one of {', '.join(SAMPLERS)}")
    return SAMPLER_FUNCTIONS[sampler](run, noise)


@lru_cache(maxsize=32)
def trace_timesteps(sampler: str, steps: int, schedule: tuple[tuple[str, Any], ...]) -> tuple[float, ...]:
    seen: list[float] = []

    def predict(latents: Tensor, time: Tensor) -> Tensor:
        seen.append(float(time))
        return torch.zeros_like(latents)

    sample(sampler, SamplingRun(predict, steps, dict(schedule), [Generator().manual_seed(0)]), torch.zeros(1, 1, 1, 1))
    return tuple(seen)


def get_timesteps(sampler: str, steps: int, schedule: dict[str, Any]) -> tuple[float, ...]:
    """All timesteps for which a sampler will ask, in order: it is run on a single number."""
    return trace_timesteps(sampler, steps, tuple(schedule.items()))


# ddim and plms


# euler_a, dpm2, dpm2_a and lms, in terms of sigma = sqrt((1 - alpha) / alpha): latents = image + sigma * noise


# diffusers' schedulers


def build_scheduler(name: str, fails_at: int, steps: int, schedule: dict[str, Any]) -> Any:
    """diffusers' scheduler of this name, set to so many steps.

    Times are spread evenly ("linspace"), but at `fails_at` steps: there one step would start at the clean end, or 1000
    steps would take a time twice and divide by zero. "trailing" gives what is meant for just these numbers.
    """
    spacing = "trailing" if steps == fails_at else "linspace"
    scheduler = getattr(diffusers, name)(num_train_timesteps=TRAIN_TIMESTEPS, timestep_spacing=spacing, **schedule)
    scheduler.set_timesteps(steps)
    return scheduler


def make_scheduler_sampler(name: str, *, fails_at: int) -> Callable[[SamplingRun, Tensor], Tensor]:
    """A sampler that diffusers' scheduler of this name drives."""

    def run_scheduler(run: SamplingRun, noise: Tensor) -> Tensor:
        scheduler = build_scheduler(name, fails_at, run.steps, run.schedule)
        latents: Tensor = noise * scheduler.init_noise_sigma
        for step, time in enumerate(scheduler.timesteps):
            predicted = run.predict(scheduler.scale_model_input(latents, time), time)
            latents = scheduler.step(predicted, time, latents).prev_sample
            run.callback(step, time, latents)
        return latents

    return run_scheduler


SAMPLER_FUNCTIONS: dict[str, Callable[[SamplingRun, Tensor], Tensor]] = {
    "plms": sample_plms,
    "ddim": sample_ddim,
    "euler": make_scheduler_sampler("EulerDiscreteScheduler", fails_at=1),
    "euler_a": sample_euler_a,
    "heun": make_scheduler_sampler("HeunDiscreteScheduler", fails_at=1),
    "dpm2": sample_dpm2,
    "dpm2_a": sample_dpm2_a,
    "lms": sample_lms,
    "dpmpp_2m": make_scheduler_sampler("DPMSolverMultistepScheduler", fails_at=TRAIN_TIMESTEPS),
    "unipc": make_scheduler_sampler("UniPCMultistepScheduler", fails_at=TRAIN_TIMESTEPS),
}
