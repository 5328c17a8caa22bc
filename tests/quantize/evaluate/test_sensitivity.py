"""Sensitivity of the UNet to quantizing each layer type."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.small_unet import small_unet
from tinysd_batch.model.checkpoint.folder import write_packed_unet
from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import Layout, from_matrix
from tinysd_batch.quantize.calibration.trajectories import Trajectories, count_sensitivity_points
from tinysd_batch.quantize.data_free import QuantizedLayer, quantize_unet
from tinysd_batch.quantize.evaluate.compare import compute_sqnr_db
from tinysd_batch.quantize.evaluate.sensitivity import ALL_LAYERS, measure_sensitivity, select_sensitivity_points
from tinysd_batch.quantize.presets import get_layer_type, get_preset_layouts
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent

CPU = torch.device("cpu")
EIGHT_BIT_TYPE = "feed-forward"
SCALE = 2.0


@pytest.fixture(scope="module")
def float_unet() -> SourceComponent:
    unet = small_unet().eval().requires_grad_(False)
    return SourceComponent(dict(unet.config), unet.state_dict(), Path("here"))


@pytest.fixture(scope="module")
def layers(float_unet: SourceComponent) -> dict[str, QuantizedLayer]:
    """All layers at 2 bits, except one type at 8."""
    layouts = {
        name: Layout(8 if get_layer_type(name) == EIGHT_BIT_TYPE else 2, layout.group_size)
        for name, layout in get_preset_layouts(small_unet(), "tiny").items()
    }
    return quantize_unet(float_unet, layouts)


@pytest.fixture(scope="module")
def folder(
    float_unet: SourceComponent, layers: dict[str, QuantizedLayer], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("packed") / "unet"
    packed = {name: (layer.weight, layer.shape) for name, layer in layers.items()}
    other_tensors = {
        name: tensor for name, tensor in float_unet.tensors.items() if name.removesuffix(".weight") not in layers
    }
    write_packed_unet(path, float_unet.config, packed, other_tensors, {})
    return path


@pytest.fixture(scope="module")
def held_out(float_unet: SourceComponent) -> Trajectories:
    """Five prompts in three steps: random latents, and the noise that the float UNet predicts for them."""
    generator = torch.Generator().manual_seed(0)
    latents, times = torch.randn(3, 5, 4, 16, 16, generator=generator), torch.tensor([900.0, 500.0, 100.0])
    text, uncond = torch.randn(2, 5, 7, 256, generator=generator)
    noise_text, noise_uncond = (
        predict_noise(float_unet.tensors, latents, times, context) for context in (text, uncond)
    )
    return Trajectories(latents, times, noise_text, noise_uncond, latents[-1], text, uncond)


def predict_noise(tensors: dict[str, Tensor], latents: Tensor, times: Tensor, context: Tensor) -> Tensor:
    """Predict noise [S, P, 4, h, w] with diffusers' UNet."""
    unet = small_unet().eval()
    unet.load_state_dict(tensors)
    with torch.no_grad():
        return torch.stack(
            [unet(step_latents, time, context).sample for step_latents, time in zip(latents, times, strict=True)]
        )


def dequantize_layer(layer: QuantizedLayer) -> Tensor:
    matrix = dequantize(layer.weight, torch.empty(layer.weight.shape))
    return from_matrix(matrix, torch.Size(layer.shape))


def test_sensitivity_is_the_error_of_the_float_unet_with_these_layers_replaced(
    float_unet: SourceComponent, layers: dict[str, QuantizedLayer], folder: Path, held_out: Trajectories
) -> None:
    measured = {
        sensitivity.layer_type: sensitivity.noise_sqnr_db
        for sensitivity in measure_sensitivity(float_unet, folder, held_out, SCALE, CPU)
    }
    steps, prompts = select_sensitivity_points(held_out)
    float_noise = held_out.guided_noise(SCALE)[steps, prompts]
    for layer_type in ("resnet convolutions", EIGHT_BIT_TYPE):
        replaced = {
            f"{name}.weight": dequantize_layer(layer)
            for name, layer in layers.items()
            if get_layer_type(name) == layer_type
        }
        noise_uncond, noise_text = (
            predict_noise(float_unet.tensors | replaced, held_out.latents, held_out.times, context)
            for context in (held_out.context_without, held_out.context)
        )
        noise = (noise_uncond + SCALE * (noise_text - noise_uncond))[steps, prompts]
        assert measured[layer_type] == pytest.approx(compute_sqnr_db(float_noise, noise), abs=0.01)


def test_layers_with_more_bits_come_last_and_all_layers_are_as_bad_as_the_worst_type(
    float_unet: SourceComponent, folder: Path, held_out: Trajectories
) -> None:
    sensitivities = measure_sensitivity(float_unet, folder, held_out, SCALE, CPU)
    assert sensitivities[-1].layer_type == EIGHT_BIT_TYPE
    assert sensitivities[-1].noise_sqnr_db > sensitivities[-2].noise_sqnr_db + 6
    worst_type = next(entry for entry in sensitivities if entry.layer_type != ALL_LAYERS)
    all_layers = next(entry for entry in sensitivities if entry.layer_type == ALL_LAYERS)
    assert all_layers.noise_sqnr_db < worst_type.noise_sqnr_db + 1


def test_points_spread_over_all_timesteps_and_prompts(held_out: Trajectories) -> None:
    steps, prompts = select_sensitivity_points(held_out)
    assert prompts.tolist() == [0, 1, 2, 3, 4]
    assert steps.tolist() == [0, 0, 1, 2, 2]
    assert count_sensitivity_points(48, 256) == 16
    assert count_sensitivity_points(8, 4) == 4
    assert count_sensitivity_points(2, 4) == 2
