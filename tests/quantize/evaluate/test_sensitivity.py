"""What each sort of layer harms alone."""

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
SPARED = "feed-forward"
SCALE = 2.0


@pytest.fixture(scope="module")
def part() -> SourceComponent:
    unet = small_unet().eval().requires_grad_(False)
    return SourceComponent(dict(unet.config), unet.state_dict(), Path("here"))


@pytest.fixture(scope="module")
def packed(part: SourceComponent) -> dict[str, QuantizedLayer]:
    """All layers at 2 bits, but one sort at 8."""
    layouts = get_preset_layouts(small_unet(), "tiny")
    return quantize_unet(
        part,
        {name: Layout(8 if get_layer_type(name) == SPARED else 2, one.group_size) for name, one in layouts.items()},
    )


@pytest.fixture(scope="module")
def folder(part: SourceComponent, packed: dict[str, QuantizedLayer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "unet"
    others = {name: one for name, one in part.tensors.items() if name.removesuffix(".weight") not in packed}
    write_packed_unet(path, part.config, {name: (one.weight, one.shape) for name, one in packed.items()}, others, {})
    return path


@pytest.fixture(scope="module")
def held(part: SourceComponent) -> Trajectories:
    """Five prompts in three steps: arbitrary latents, and what the float UNet says of them."""
    draw = torch.Generator().manual_seed(0)
    latents, times = torch.randn(3, 5, 4, 16, 16, generator=draw), torch.tensor([900.0, 500.0, 100.0])
    context, without = torch.randn(2, 5, 7, 256, generator=draw)
    with_text, unguided = (said_by(part.tensors, latents, times, one) for one in (context, without))
    return Trajectories(latents, times, with_text, unguided, latents[-1], context, without)


def said_by(tensors: dict[str, Tensor], latents: Tensor, times: Tensor, context: Tensor) -> Tensor:
    """By a UNet as diffusers has it, [S, P, 4, h, w]."""
    unet = small_unet().eval()
    unet.load_state_dict(tensors)
    with torch.no_grad():
        return torch.stack([unet(some, time, context).sample for some, time in zip(latents, times, strict=True)])


def test_a_sorts_harm_is_that_of_the_float_model_with_these_layers_replaced(
    part: SourceComponent, packed: dict[str, QuantizedLayer], folder: Path, held: Trajectories
) -> None:
    harms = {one.layer_type: one.noise_sqnr_db for one in measure_sensitivity(part, folder, held, SCALE, CPU)}
    calls, prompts = select_sensitivity_points(held)
    for sort in ("resnet convolutions", SPARED):
        changed = {
            f"{name}.weight": from_matrix(dequantize(one.weight, torch.empty(one.weight.shape)), torch.Size(one.shape))
            for name, one in packed.items()
            if get_layer_type(name) == sort
        }
        tensors = part.tensors | changed
        texts = (held.context_without, held.context)
        without, with_text = (said_by(tensors, held.latents, held.times, one) for one in texts)
        found = without + SCALE * (with_text - without)
        wanted = held.guided_noise(SCALE)
        assert harms[sort] == pytest.approx(compute_sqnr_db(wanted[calls, prompts], found[calls, prompts]), abs=0.01)


def test_layers_with_more_bits_come_last_and_everything_harms_as_much_as_the_worst(
    part: SourceComponent, folder: Path, held: Trajectories
) -> None:
    harms = measure_sensitivity(part, folder, held, SCALE, CPU)
    assert harms[-1].layer_type == SPARED
    assert harms[-1].noise_sqnr_db > harms[-2].noise_sqnr_db + 6
    worst = next(one for one in harms if one.layer_type != ALL_LAYERS)
    everything = next(one for one in harms if one.layer_type == ALL_LAYERS)
    assert everything.noise_sqnr_db < worst.noise_sqnr_db + 1


def test_points_are_of_all_times_and_as_many_prompts(held: Trajectories) -> None:
    calls, prompts = select_sensitivity_points(held)
    assert prompts.tolist() == [0, 1, 2, 3, 4]
    assert calls.tolist() == [0, 0, 1, 2, 2]
    assert [count_sensitivity_points(48, 256), count_sensitivity_points(8, 4), count_sensitivity_points(2, 4)] == [
        16,
        4,
        2,
    ]
