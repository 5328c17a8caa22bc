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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from tinysd_batch.config import SAMPLERS
from tinysd_batch.errors import ModelError, UsageError
from tinysd_batch.model.sampling.cuda_noise import CudaNoise

TRAIN_STEPS = 1000
PLMS_WEIGHTS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}

Noise = Generator | CudaNoise  # where an image's noise comes from
Predict = Callable[[Tensor, Tensor], Tensor]  # latents [B, 4, h, w] and a timestep, fractional allowed, to their noise
Callback = Callable[[int, Tensor, Tensor], None]  # step from 0, timestep, latents [B, 4, h, w]
Deviation = Callable[[float], float]  # timestep -> standard deviation of a prediction's error there


def exact(_: float) -> float:
    """The deviation of predictions that are taken as they come."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """What a sampler is given besides its starting noise."""

    predict: Predict
    steps: int  # 1 to 1000
    schedule: dict[str, Any]  # beta_start, beta_end, beta_schedule
    generators: Sequence[Noise]  # one per image
    eta: float = 0.0
    callback: Callback = lambda *_: None
    deviation: Deviation = exact

    def draw(self, like: Tensor) -> Tensor:
        """Fresh noise in the shape of the latents, each image's from its own generator."""
        return draw_noise(self.generators, like.shape[1:]).to(like.device)

    def absorb(self, sigma: float, gain: float, time: float) -> float:
        """How much fresh noise to add where sigma is wanted: less by the error of the prediction of this time.

        That counts `gain` times, and does for noise; variances add up (PTQD, He et al. 2023). Never below zero.
        """
        error = gain * self.deviation(time)
        return max(0.0, sigma**2 - error**2) ** 0.5 if error else sigma


def sample(sampler: str, run: Run, noise: Tensor) -> Tensor:
    """Unit noise [B, 4, h, w] to latents of an image. Raises UsageError for a sampler that is none."""
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler {sampler!r}: no such sampler; one of {', '.join(SAMPLERS)}")
    return FUNCTIONS[sampler](run, noise)


@lru_cache(maxsize=32)
def learn_times(sampler: str, steps: int, schedule: tuple[tuple[str, Any], ...]) -> tuple[float, ...]:
    seen: list[float] = []

    def predict(latents: Tensor, time: Tensor) -> Tensor:
        seen.append(float(time))
        return torch.zeros_like(latents)

    sample(sampler, Run(predict, steps, dict(schedule), [Generator().manual_seed(0)]), torch.zeros(1, 1, 1, 1))
    return tuple(seen)


def times_of(sampler: str, steps: int, schedule: dict[str, Any]) -> tuple[float, ...]:
    """All timesteps for which a sampler will ask, in order: it is run on a single number."""
    return learn_times(sampler, steps, tuple(schedule.items()))


def draw_noise(generators: Sequence[Noise], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape], float32, row i from generator i. Drawn on the CPU: the same on every card."""
    return torch.stack(
        [
            one.randn(shape) if isinstance(one, CudaNoise) else torch.randn(tuple(shape), generator=one)
            for one in generators
        ]
    )


def alphas_cumprod(schedule: dict[str, Any]) -> npt.NDArray[np.float64]:
    """What is left of an image's variance at each of the 1000 noise levels, from the least noise to the most."""
    start, end = schedule["beta_start"], schedule["beta_end"]
    match schedule.get("beta_schedule"):
        case "scaled_linear":  # SD v1
            betas = np.linspace(start**0.5, end**0.5, TRAIN_STEPS) ** 2
        case "linear":
            betas = np.linspace(start, end, TRAIN_STEPS)
        case other:
            raise ModelError(f"beta_schedule {other!r}: scaled_linear or linear was expected")
    return np.cumprod(1 - betas)


def weighted_sum(weights: Sequence[float], predictions: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(predictions[0])
    for weight, prediction in zip(weights, predictions, strict=True):
        total += weight * prediction
    return total


# ddim and plms


@dataclass(frozen=True, slots=True)
class Level:
    """A step from one noise level down to the next."""

    time: int
    next_time: int
    alpha: float
    alpha_next: float


def levels(run: Run) -> Iterator[Level]:
    """Timesteps 1 + floor(i * 1000 / steps), from high to low: SD v1's own where the steps divide 1000.

    1000 steps leave no room for the 1. The last step goes to alpha 0, as SD v1's does, not to a clean image.
    """
    alphas = alphas_cumprod(run.schedule)
    times = np.arange(run.steps) * TRAIN_STEPS // run.steps + (1 if run.steps < TRAIN_STEPS else 0)
    for i in reversed(range(run.steps)):
        below = max(i - 1, 0)
        alpha_next = alphas[times[below]] if i else alphas[0]
        yield Level(int(times[i]), int(times[below]), float(alphas[times[i]]), float(alpha_next))


def step_down(latents: Tensor, noise: Tensor, level: Level, run: Run) -> Tensor:
    """DDIM's step (Song et al. 2020, equation 12). `eta` of the noise it may put back is drawn afresh."""
    alpha, alpha_next = level.alpha, level.alpha_next
    clean = (latents - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    sigma = run.eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
    share = (1 - alpha_next - sigma**2) ** 0.5
    below: Tensor = alpha_next**0.5 * clean + share * noise
    gain = share - (alpha_next / alpha * (1 - alpha)) ** 0.5
    return below + run.absorb(sigma, gain, level.time) * run.draw(latents) if run.eta else below


def ddim(run: Run, latents: Tensor) -> Tensor:
    for step, level in enumerate(levels(run)):
        time = torch.tensor(level.time)
        latents = step_down(latents, run.predict(latents, time), level, run)
        run.callback(step, time, latents)
    return latents


def plms(run: Run, latents: Tensor) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, equations 9 to 12); the first step looks ahead instead of back."""
    history: list[Tensor] = []
    for step, level in enumerate(levels(run)):
        time = torch.tensor(level.time)
        noise = run.predict(latents, time)
        history = [noise, *history[:3]]
        if len(history) == 1:
            ahead = step_down(latents, noise, level, run)
            mixed = (noise + run.predict(ahead, torch.tensor(level.next_time))) / 2
        else:
            mixed = weighted_sum(PLMS_WEIGHTS[len(history)], history)
        latents = step_down(latents, mixed, level, run)
        run.callback(step, time, latents)
    return latents


# euler_a, dpm2, dpm2_a and lms, in terms of sigma = sqrt((1 - alpha) / alpha): latents = image + sigma * noise


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


# diffusers' schedulers


def new_scheduler(name: str, fails_at: int, steps: int, schedule: dict[str, Any]) -> Any:
    """diffusers' scheduler of this name, set to so many steps.

    Times are spread evenly ("linspace"), but at `fails_at` steps: there one step would start at the clean end, or 1000
    steps would take a time twice and divide by zero. "trailing" gives what is meant for just these numbers.
    """
    spacing = "trailing" if steps == fails_at else "linspace"
    scheduler = getattr(diffusers, name)(num_train_timesteps=TRAIN_STEPS, timestep_spacing=spacing, **schedule)
    scheduler.set_timesteps(steps)
    return scheduler


def scheduled(name: str, *, fails_at: int) -> Callable[[Run, Tensor], Tensor]:
    """A sampler that diffusers' scheduler of this name drives."""

    def run_scheduler(run: Run, noise: Tensor) -> Tensor:
        scheduler = new_scheduler(name, fails_at, run.steps, run.schedule)
        latents: Tensor = noise * scheduler.init_noise_sigma
        for step, time in enumerate(scheduler.timesteps):
            predicted = run.predict(scheduler.scale_model_input(latents, time), time)
            latents = scheduler.step(predicted, time, latents).prev_sample
            run.callback(step, time, latents)
        return latents

    return run_scheduler


FUNCTIONS: dict[str, Callable[[Run, Tensor], Tensor]] = {
    "plms": plms,
    "ddim": ddim,
    "euler": scheduled("EulerDiscreteScheduler", fails_at=1),
    "euler_a": euler_a,
    "heun": scheduled("HeunDiscreteScheduler", fails_at=1),
    "dpm2": dpm2,
    "dpm2_a": dpm2_a,
    "lms": lms,
    "dpmpp_2m": scheduled("DPMSolverMultistepScheduler", fails_at=TRAIN_STEPS),
    "unipc": scheduled("UniPCMultistepScheduler", fails_at=TRAIN_STEPS),
}
