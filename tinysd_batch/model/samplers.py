"""Samplers by the origin's names, as diffusers schedulers on SD v1's noise schedule, in float32."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import Generator, Tensor

from tinysd_batch.errors import UsageError

TRAIN_STEPS = 1000


def new_scheduler(sampler: str, steps: int, schedule: dict[str, Any]) -> Any:
    """A scheduler set to so many steps. `schedule` gives beta_start, beta_end, beta_schedule and prediction_type.

    ddim and plms use timesteps 1, 1 + c, 1 + 2c, ... as SD v1 does; with 1000 steps there is no room for the 1.
    """
    common = {"num_train_timesteps": TRAIN_STEPS, **schedule}
    offset = 1 if steps < TRAIN_STEPS else 0
    match sampler:
        case "plms":
            scheduler: Any = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=offset, **common)
        case "ddim":
            scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=offset, **common)
        case "euler":
            scheduler = EulerDiscreteScheduler(timestep_spacing="linspace", **common)
        case _:
            raise UsageError(f"sampler {sampler!r}: no such sampler; one of plms, ddim, euler")
    scheduler.set_timesteps(steps)
    return scheduler


def step_noise(sampler: str, eta: float, generators: Sequence[Generator], like: Tensor) -> dict[str, Any]:
    """The sampler's extra arguments for one step; each image's noise comes from its own generator."""
    if eta == 0:
        return {}
    if sampler == "plms":
        raise UsageError("eta: plms adds no noise; use sampler ddim or eta 0")
    if sampler != "ddim":
        return {}
    return {"eta": eta, "variance_noise": draw_noise(generators, like.shape[1:]).to(like.device)}


def draw_noise(generators: Sequence[Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape], float32, row i from generator i. Drawn on the CPU: the same on every card."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
