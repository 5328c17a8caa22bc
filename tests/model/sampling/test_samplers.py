"""The samplers compared with tiny-stable-diffusion's mathematics, written out here in float64 without shortcuts."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Generator, Tensor

from tests.support.models.schedules import ALPHAS, SD_V1
from tests.support.models.tiny_stable_diffusion import CONTEXT, dequantized, unet_checkpoint
from tinysd_batch.errors import ModelError, UsageError
from tinysd_batch.model.sampling.ddim_plms import iter_ddim_steps
from tinysd_batch.model.sampling.samplers import build_scheduler, sample
from tinysd_batch.model.sampling.schedule import SamplingRun, compute_alphas_cumprod, sample_noise
from tinysd_batch.model.sampling.sigma_samplers import SigmaSchedule
from tinysd_batch.settings.sampler_names import SAMPLERS, find_sampler

SIGMAS = np.sqrt((1 - ALPHAS) / ALPHAS)
SHAPE = (4, 8, 8)
STEPS = 5  # so that a multistep method looks back as far as it can; tiny-stable-diffusion needs a divisor of 1000
TINY_STABLE_DIFFUSION = ("plms", "ddim", "euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms")

Noise = Callable[[], Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def predict() -> Predict:
    """A UNet with the weights of a tiny-stable-diffusion file, with guidance at scale 7.5."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 128, 128), cross_attention_dim=CONTEXT, attention_head_dim=8
    )
    unet.load_state_dict(convert_ldm_unet_checkpoint(dequantized(unet_checkpoint()), dict(unet.config)))
    context = torch.randn(2, 77, CONTEXT, generator=Generator().manual_seed(1))

    @torch.no_grad()
    def guided(latents: Tensor, time: Tensor) -> Tensor:
        rows = latents.float().repeat_interleave(2, dim=0)
        without, with_prompt = unet.eval()(rows, time, context.repeat(len(latents), 1, 1)).sample.to(latents.dtype)
        return torch.as_tensor(without + 7.5 * (with_prompt - without))[None]

    return guided


# tiny-stable-diffusion's samplers, after its behaviour


def reference_alphas(predict: Predict, x: Tensor, steps: int, eta: float, noise: Noise, *, multistep: bool) -> Tensor:
    times = list(range(1, 1000, 1000 // steps))
    below = [ALPHAS[0], *ALPHAS[times[:-1]]]
    old: list[Tensor] = []
    for i in reversed(range(len(times))):
        a, a_prev = ALPHAS[times[i]], below[i]
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))

        def step_down(x: Tensor, e: Tensor, a: float = a, a_prev: float = a_prev, sigma: float = sigma) -> Tensor:
            x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
            deterministic = np.sqrt(a_prev) * x0 + np.sqrt(1 - a_prev - sigma**2) * e
            return torch.as_tensor(deterministic + (sigma * noise() if eta else 0))

        e = predict(x, torch.tensor(times[i]))
        if not multistep:
            used = e
        elif len(old) == 0:
            used = (e + predict(step_down(x, e), torch.tensor(times[max(i - 1, 0)]))) / 2
        elif len(old) == 1:
            used = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            used = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            used = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        old.append(e)
        x = step_down(x, used)
    return x


def reference_sigmas(name: str, predict: Predict, unit: Tensor, steps: int, noise: Noise) -> Tensor:
    grid = [*np.interp(np.linspace(999, 0, steps), np.arange(1000), SIGMAS), 0.0]
    x = unit * grid[0]
    slopes: list[Tensor] = []

    def slope(x: Tensor, sigma: float) -> Tensor:
        low, high = np.sort(np.argsort(np.abs(SIGMAS - sigma), kind="stable")[:2])
        w = np.clip((SIGMAS[low] - sigma) / (SIGMAS[low] - SIGMAS[high]), 0, 1)
        return predict(x / np.sqrt(sigma**2 + 1), torch.tensor((1 - w) * low + w * high))

    for i in range(steps):
        sigma, below = grid[i], grid[i + 1]
        up = min(below, np.sqrt(below**2 * (sigma**2 - below**2) / sigma**2)) if name.endswith("_a") else 0.0
        down = np.sqrt(below**2 - up**2)
        d = slope(x, sigma)
        slopes.append(d)
        if name in ("euler", "euler_a"):
            x = x + d * (down - sigma)
        elif name == "heun":
            x = x + (d if below == 0 else (d + slope(x + d * (below - sigma), below)) / 2) * (below - sigma)
        elif name in ("dpm2", "dpm2_a"):
            middle = ((sigma ** (1 / 3) + down ** (1 / 3)) / 2) ** 3
            x = x + slope(x + d * (middle - sigma), middle) * (down - sigma)
        else:
            fine = np.linspace(sigma, below, 20_001)
            nodes = [grid[i - k] for k in range(min(i + 1, 4))]
            for k, node in enumerate(nodes):
                factors = [(fine - other) / (node - other) for other in nodes if other != node]
                basis = np.prod([np.ones_like(fine), *factors], axis=0)
                x = x + float(np.trapezoid(basis, fine)) * slopes[-1 - k]
        if name.endswith("_a"):
            x = x + up * noise()
    return torch.as_tensor(x)


@pytest.mark.parametrize(
    ("name", "eta"), [*((name, 0.0) for name in TINY_STABLE_DIFFUSION), ("ddim", 0.5), ("plms", 0.5)]
)
def test_final_latents_are_those_of_tiny_stable_diffusion(predict: Predict, name: str, eta: float) -> None:
    def start() -> tuple[Generator, Tensor]:
        generator = Generator().manual_seed(5)
        return generator, sample_noise([generator], SHAPE)

    generator, unit = start()
    ours = sample(name, SamplingRun(predict, STEPS, SD_V1, [generator], eta), unit)
    generator, unit = start()

    def noise() -> Tensor:
        return sample_noise([generator], SHAPE).double()

    if name in ("plms", "ddim"):
        theirs = reference_alphas(predict, unit.double(), STEPS, eta, noise, multistep=name == "plms")
    else:
        theirs = reference_sigmas(name, predict, unit.double(), STEPS, noise)
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 0.002


def toy_predict(latents: Tensor, time: Tensor) -> Tensor:
    """Bounded, not linear, and different at every timestep, so that a wrong step count or timestep is noticed."""
    return torch.tanh(latents * (1 + time / 1000))


def run_recorded(name: str, steps: int, eta: float = 0.5) -> tuple[list[float], Tensor]:
    """Return the timesteps at which the sampler evaluates the model, and the final latents."""
    times: list[float] = []

    def predict(latents: Tensor, time: Tensor) -> Tensor:
        times.append(float(time))
        return toy_predict(latents, time)

    generator = Generator().manual_seed(2)
    unit = sample_noise([generator], (4, 2, 2))
    return times, sample(name, SamplingRun(predict, steps, SD_V1, [generator], eta), unit)


EVALUATIONS = {
    "plms": (1, 1),
    "heun": (2, -1),
    "dpm2": (2, 0),
    "dpm2_a": (2, 0),
}  # evaluations per step, and in addition


def check_steps(name: str, steps: int) -> None:
    times, latents = run_recorded(name, steps)
    per_step, extra = EVALUATIONS.get(name, (1, 0))
    assert len(times) == per_step * steps + extra
    assert max(times) == times[0]
    assert min(times) >= 0
    assert times[0] <= 999
    assert times[0] >= (999 - 1000 / steps if name in ("plms", "ddim") else 999)
    assert latents.isfinite().all()


OUR_SAMPLERS = ("plms", "ddim", "euler_a", "dpm2", "dpm2_a", "lms")
DIFFUSERS_SAMPLERS = {
    "euler": ("EulerDiscreteScheduler", 1),
    "heun": ("HeunDiscreteScheduler", 1),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", 1000),
    "unipc": ("UniPCMultistepScheduler", 1000),
}


THOROUGH_STEPS = (*range(1, 20), 37, 101, 333, 501, 999, 1000)  # run to the end; all would take many minutes
FAST_STEPS = (*range(1, 20), 37, 101, 333)


def new_run(steps: int) -> SamplingRun:
    return SamplingRun(toy_predict, steps, SD_V1, [])


def step_counts(thorough: bool) -> Iterable[int]:
    """Numbers of steps: all, or every seventh and those that are run to the end."""
    return range(1, 1001) if thorough else sorted({*range(1, 1001, 7), *THOROUGH_STEPS})


THOROUGH = pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])


@THOROUGH
@pytest.mark.parametrize("name", OUR_SAMPLERS)
def test_every_number_of_steps(name: str, thorough: bool) -> None:
    for steps in step_counts(thorough):
        if name in ("plms", "ddim"):
            times = [step.timestep for step in iter_ddim_steps(new_run(steps))]
            assert times[0] >= 999 - 1000 / steps
        else:
            times = SigmaSchedule.from_run(new_run(steps)).timesteps.tolist()
            assert times[0] == 999
        assert len(set(times)) == steps
        assert (times, min(times) >= 0) == (sorted(times, reverse=True), True)
    for steps in THOROUGH_STEPS if thorough else FAST_STEPS:
        check_steps(name, steps)


@THOROUGH
@pytest.mark.parametrize("name", DIFFUSERS_SAMPLERS)
def test_every_number_of_steps_with_diffusers(name: str, thorough: bool) -> None:
    per_step, extra = EVALUATIONS.get(name, (1, 0))
    for steps in step_counts(thorough):
        times = build_scheduler(*DIFFUSERS_SAMPLERS[name], steps, SD_V1).timesteps
        assert len(times) == per_step * steps + extra
        assert len(times.unique()) == steps
        assert (float(times[0]), float(times.max())) == (999, 999)
        assert times.min() >= 0
    for steps in THOROUGH_STEPS if thorough else FAST_STEPS:
        check_steps(name, steps)


def test_each_sampler_is_tested_with_every_number_of_steps() -> None:
    assert {*OUR_SAMPLERS, *DIFFUSERS_SAMPLERS} == set(SAMPLERS)


def test_ddim_timesteps_are_those_of_tiny_stable_diffusion() -> None:
    for steps in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500):
        times, _ = run_recorded("ddim", steps)
        assert times == list(range(1, 1000, 1000 // steps))[::-1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_comes_from_each_images_own_generator(name: str) -> None:
    """An image in a batch is the same as alone, whatever noise the others get."""

    def run(seeds: list[int]) -> Tensor:
        generators = [Generator().manual_seed(seed) for seed in seeds]
        unit = sample_noise(generators, (4, 2, 2))
        return sample(name, SamplingRun(toy_predict, 6, SD_V1, generators, 0.5), unit)

    together = run([1, 2, 3])
    for number, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(together[number], run([seed])[0])


@pytest.mark.parametrize("name", ["euler_a", "dpm2_a", "ddim", "plms"])
def test_fresh_noise_advances_the_generator(name: str) -> None:
    generator = Generator().manual_seed(1)
    unit = sample_noise([generator], (4, 2, 2))
    before = generator.get_state()
    sample(name, SamplingRun(toy_predict, 4, SD_V1, [generator], eta=0.5), unit)
    assert not torch.equal(before, generator.get_state())


@pytest.mark.parametrize(
    ("name", "our_name"),
    [
        ("Euler a", "euler_a"), ("k_euler_a", "euler_a"), ("DPM++ 2M", "dpmpp_2m"), ("dpm++2m", "dpmpp_2m"),
        ("UniPC", "unipc"), ("DPM2 a", "dpm2_a"), ("PLMS", "plms"), (" lms ", "lms"), ("k-heun", "heun"),
    ],
)  # fmt: skip
def test_names_of_other_programs(name: str, our_name: str) -> None:
    assert find_sampler(name) == our_name


@pytest.mark.parametrize("name", ["", "karras", "euler_b", "dpm++ 2m sde"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no such sampler; one of plms, ddim"):
        find_sampler(name)
    with pytest.raises(UsageError, match="no such sampler"):
        run_recorded(name, 4)


def test_an_unsupported_schedule_is_refused() -> None:
    with pytest.raises(ModelError, match="beta_schedule 'cosine'"):
        compute_alphas_cumprod({**SD_V1, "beta_schedule": "cosine"})
