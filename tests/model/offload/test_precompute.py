"""Layers that depend only on the timestep or the prompt are computed before the loop, with the same results."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.support.models.tiny_models import TEXT_WIDTH
from tinysd_batch.model.sampling.samplers import get_timesteps
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.settings.sampler_names import SAMPLERS

TIMES = (981.0, 535.955, 1.0)


@pytest.fixture(scope="module")
def diffusers_unet(float_model: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(float_model / "unet").eval()


@pytest.fixture
def model(float_model: Path) -> TinySD:
    return TinySD.from_pretrained(float_model, device="cpu")


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("unet_bs", [None, 2])
def test_noise_is_the_same_as_diffusers(
    diffusers_unet: UNet2DConditionModel, float_model: Path, time: float, unet_bs: int | None
) -> None:
    model = TinySD.from_pretrained(float_model, device="cpu", unet_bs=unet_bs)
    latents, context = torch.randn(4, 4, 8, 8), torch.randn(2, 22, TEXT_WIDTH)[[0, 1, 1, 0]]
    with torch.no_grad(), model.offloader.holding(model.encode_fragment, model.decode_fragment):
        ours = model.predict_noise(latents, torch.tensor(time), context)
        theirs = diffusers_unet(latents, torch.tensor(time), context).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_layers_stay_on_the_host_and_run_once(model: TinySD) -> None:
    layers = [layer for layer, _ in [*model.precomputed.time_layers, *model.precomputed.context_layers]]
    calls: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(model.encode_fragment.is_onloaded))
    model.generate(["cat", "dog"], 1, num_inference_steps=3)
    prompts = 3  # including the empty one
    assert calls == [False] * (len(model.precomputed.time_layers) + prompts * len(model.precomputed.context_layers))
    assert not {id(layer) for layer in layers} & {id(layer) for layer in model.unet.modules()}
    assert not model.precomputed.fragment.is_onloaded
    model.generate(["dog"], 2, num_inference_steps=3)
    assert len(calls) == len(model.precomputed.time_layers) + prompts * len(model.precomputed.context_layers)


def test_earlier_images_do_not_change_the_result(float_model: Path, model: TinySD) -> None:
    other = TinySD.from_pretrained(float_model, device="cpu")
    other.generate("a longer story", 5, num_inference_steps=7)
    images = [model.generate("cat", 1, num_inference_steps=3, output_type="latent").images for model in (model, other)]
    assert torch.equal(*images)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 4])
def test_all_timesteps_are_computed_before_the_loop(model: TinySD, sampler: str, steps: int) -> None:
    times: list[float] = []
    set_timestep = model.precomputed.set_timestep
    model.precomputed.set_timestep = lambda time, *rest: (times.append(time), set_timestep(time, *rest))[1]  # type: ignore[method-assign, func-returns-value]
    model.generate("cat", 1, num_inference_steps=steps, sampler=sampler)
    assert tuple(times) == get_timesteps(sampler, steps, model.schedule)
    assert set(times) == set(model.precomputed.timestep_features)
