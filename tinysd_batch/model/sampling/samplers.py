"""Samplers: from noise to latents, given something that predicts noise. Float32 throughout.

diffusers' schedulers are used where they compute what SD v1's own scripts compute. Our own implementations are
- ddim and plms: diffusers' timesteps skip the noisiest ones if the steps do not divide 1000 (600 steps would start at
  600, with noise meant for 999), and its PLMS has no eta;
- euler_a: diffusers generates the fresh noise inside the scheduler, where it cannot be reduced, and by torch's own
  generators only;
- dpm2 and dpm2_a: diffusers places the midpoints elsewhere and skips one evaluation;
- lms: diffusers integrates polynomials numerically with scipy at every step; their integrals have a closed form.

If the size of the model's prediction error is known at each timestep (`SamplingRun.deviation`, from a noise
correction), the samplers that add fresh noise (ddim and plms with eta, euler_a, dpm2_a) add less of it: the error is
noise already. plms and dpm2_a combine several predictions; the error of the newest one is used.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Generator, Tensor

from tinysd_batch.errors import UsageError
from tinysd_batch.model.sampling.ddim_plms import sample_ddim, sample_plms
from tinysd_batch.model.sampling.schedule import TRAIN_TIMESTEPS, SamplingRun
from tinysd_batch.model.sampling.sigma_samplers import sample_dpm2, sample_dpm2_a, sample_euler_a, sample_lms
from tinysd_batch.settings.sampler_names import SAMPLERS


def sample(sampler: str, run: SamplingRun, noise: Tensor) -> Tensor:
    """Denoise unit noise [B, 4, h, w] to the latents of images.

    Raises:
        UsageError: there is no such sampler.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler {sampler!r}: no such sampler; one of {', '.join(SAMPLERS)}")
    return SAMPLER_FUNCTIONS[sampler](run, noise)


def get_timesteps(sampler: str, steps: int, schedule: dict[str, Any]) -> tuple[float, ...]:
    """Return all timesteps at which a sampler evaluates the model, in order."""
    return trace_timesteps(sampler, steps, tuple(schedule.items()))


@lru_cache(maxsize=32)
def trace_timesteps(sampler: str, steps: int, schedule: tuple[tuple[str, Any], ...]) -> tuple[float, ...]:
    """Run the sampler on latents of a single number and record the timesteps that it asks for."""
    timesteps: list[float] = []

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        timesteps.append(float(timestep))
        return torch.zeros_like(latents)

    sample(sampler, SamplingRun(predict, steps, dict(schedule), [Generator().manual_seed(0)]), torch.zeros(1, 1, 1, 1))
    return tuple(timesteps)


# diffusers' schedulers


def build_scheduler(name: str, trailing_at: int, steps: int, schedule: dict[str, Any]) -> Any:
    """Return diffusers' scheduler of this name, set to this number of steps.

    Timesteps are spread evenly ("linspace"), except with `trailing_at` steps. There "linspace" fails: one step would
    start at the clean end, or 1000 steps would repeat a timestep and divide by zero. "trailing" is right for these.
    """
    spacing = "trailing" if steps == trailing_at else "linspace"
    scheduler = getattr(diffusers, name)(num_train_timesteps=TRAIN_TIMESTEPS, timestep_spacing=spacing, **schedule)
    scheduler.set_timesteps(steps)
    return scheduler


def make_scheduler_sampler(name: str, *, trailing_at: int) -> Callable[[SamplingRun, Tensor], Tensor]:
    """Return a sampler that runs diffusers' scheduler of this name."""

    def run_scheduler(run: SamplingRun, noise: Tensor) -> Tensor:
        scheduler = build_scheduler(name, trailing_at, run.steps, run.schedule)
        latents: Tensor = noise * scheduler.init_noise_sigma
        for step, timestep in enumerate(scheduler.timesteps):
            predicted = run.predict(scheduler.scale_model_input(latents, timestep), timestep)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
            run.callback(step, timestep, latents)
        return latents

    return run_scheduler


SAMPLER_FUNCTIONS: dict[str, Callable[[SamplingRun, Tensor], Tensor]] = {
    "plms": sample_plms,
    "ddim": sample_ddim,
    "euler": make_scheduler_sampler("EulerDiscreteScheduler", trailing_at=1),
    "euler_a": sample_euler_a,
    "heun": make_scheduler_sampler("HeunDiscreteScheduler", trailing_at=1),
    "dpm2": sample_dpm2,
    "dpm2_a": sample_dpm2_a,
    "lms": sample_lms,
    "dpmpp_2m": make_scheduler_sampler("DPMSolverMultistepScheduler", trailing_at=TRAIN_TIMESTEPS),
    "unipc": make_scheduler_sampler("UniPCMultistepScheduler", trailing_at=TRAIN_TIMESTEPS),
}
