"""What each sort of layer harms alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.small_unet import small_unet
from tinysd_batch.model.checkpoint.folder import write_packed_unet
from tinysd_batch.model.packed.dequantize import unpack
from tinysd_batch.model.packed.format import Layout, from_matrix
from tinysd_batch.quantize.calibration.trajectories import Trajectories, points_among
from tinysd_batch.quantize.data_free import Packed, quantize_unet
from tinysd_batch.quantize.evaluate.compare import sqnr_db
from tinysd_batch.quantize.evaluate.sensitivity import EVERYTHING, harms_of, points_of
from tinysd_batch.quantize.presets import layers_to_pack, sort_of
from tinysd_batch.quantize.sources.checkpoint_source import Part

CPU = torch.device("cpu")
SPARED = "feed-forward"
SCALE = 2.0


@pytest.fixture(scope="module")
def part() -> Part:
    unet = small_unet().eval().requires_grad_(False)
    return Part(dict(unet.config), unet.state_dict(), Path("here"))


@pytest.fixture(scope="module")
def packed(part: Part) -> dict[str, Packed]:
    """All layers at 2 bits, but one sort at 8."""
    layouts = layers_to_pack(small_unet(), "tiny")
    return quantize_unet(
        part, {name: Layout(8 if sort_of(name) == SPARED else 2, one.group_size) for name, one in layouts.items()}
    )


@pytest.fixture(scope="module")
def folder(part: Part, packed: dict[str, Packed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "unet"
    others = {name: one for name, one in part.tensors.items() if name.removesuffix(".weight") not in packed}
    write_packed_unet(path, part.config, {name: (one.weight, one.shape) for name, one in packed.items()}, others, {})
    return path


@pytest.fixture(scope="module")
def held(part: Part) -> Trajectories:
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
    part: Part, packed: dict[str, Packed], folder: Path, held: Trajectories
) -> None:
    harms = {one.sort: one.noise_db for one in harms_of(part, folder, held, SCALE, CPU)}
    calls, prompts = points_of(held)
    for sort in ("resnet convolutions", SPARED):
        changed = {
            f"{name}.weight": from_matrix(unpack(one.weight, torch.empty(one.weight.shape)), torch.Size(one.shape))
            for name, one in packed.items()
            if sort_of(name) == sort
        }
        tensors = part.tensors | changed
        texts = (held.context_without, held.context)
        without, with_text = (said_by(tensors, held.latents, held.times, one) for one in texts)
        found = without + SCALE * (with_text - without)
        wanted = held.guided(SCALE)
        assert harms[sort] == pytest.approx(sqnr_db(wanted[calls, prompts], found[calls, prompts]), abs=0.01)


def test_layers_with_more_bits_come_last_and_everything_harms_as_much_as_the_worst(
    part: Part, folder: Path, held: Trajectories
) -> None:
    harms = harms_of(part, folder, held, SCALE, CPU)
    assert harms[-1].sort == SPARED
    assert harms[-1].noise_db > harms[-2].noise_db + 6
    worst = next(one for one in harms if one.sort != EVERYTHING)
    everything = next(one for one in harms if one.sort == EVERYTHING)
    assert everything.noise_db < worst.noise_db + 1


def test_points_are_of_all_times_and_as_many_prompts(held: Trajectories) -> None:
    calls, prompts = points_of(held)
    assert prompts.tolist() == [0, 1, 2, 3, 4]
    assert calls.tolist() == [0, 0, 1, 2, 2]
    assert [points_among(48, 256), points_among(8, 4), points_among(2, 4)] == [16, 4, 2]
