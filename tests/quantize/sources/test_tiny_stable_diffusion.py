"""Read the UNet of tiny-stable-diffusion's checkpoint without changing a number."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from tests.support.tiny_stable_diffusion import CONTEXT, PREFIX, dequantized, unet_checkpoint
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.folder import read_unet, write_packed_unet
from tinysd_batch.model.nn.unet import decode_half, encode_half
from tinysd_batch.model.offload.components import Component
from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import to_matrix
from tinysd_batch.quantize.sources.tiny_stable_diffusion import (
    IGNORED_SUFFIXES,
    is_tiny_stable_diffusion,
    read_tiny_stable_diffusion_unet,
)

Q2 = "input_blocks.1.0.in_layers.2"
Q8 = "time_embed.0"
FLOAT = "input_blocks.3.0.op"


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    return unet_checkpoint()


@pytest.fixture(scope="module")
def float_unet(checkpoint: dict[str, Tensor]) -> UNet2DConditionModel:
    """The same UNet as floats, in diffusers."""
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64, 128, 128), cross_attention_dim=CONTEXT, attention_head_dim=8
    )
    unet.load_state_dict(convert_ldm_unet_checkpoint(dequantized(checkpoint), dict(unet.config)))
    return unet.eval()


def test_every_weight_equals_that_of_tiny_stable_diffusion(
    checkpoint: dict[str, Tensor], float_unet: UNet2DConditionModel
) -> None:
    unet = read_tiny_stable_diffusion_unet(checkpoint, "checkpoint.pth")
    expected = float_unet.state_dict()
    assert (len(unet.packed), sum(weight.layout.bits == 8 for weight, _ in unet.packed.values())) == (265, 4)
    assert {f"{name}.weight" for name in unet.packed} | unet.other_tensors.keys() == expected.keys()
    for name, (weight, shape) in unet.packed.items():
        assert tuple(expected[f"{name}.weight"].shape) == shape
        assert torch.equal(dequantize(weight, torch.empty(weight.shape)), to_matrix(expected[f"{name}.weight"])), name
    for name, value in unet.other_tensors.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("height", "width", "time"), [(8, 8, 981.0), (16, 8, 1.0), (8, 24, 535.955)])
def test_the_packed_unet_predicts_the_same_noise_after_a_round_trip(
    checkpoint: dict[str, Tensor],
    float_unet: UNet2DConditionModel,
    tmp_path: Path,
    height: int,
    width: int,
    time: float,
) -> None:
    unet = read_tiny_stable_diffusion_unet(checkpoint, "checkpoint.pth")
    write_packed_unet(tmp_path, unet.config, unet.packed, unet.other_tensors, {})
    model, host = read_unet(tmp_path)
    Component("UNet", {"": model}, host, torch.float32).onload(torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(3, 4, height, width, generator=generator)
    context = torch.randn(3, 77, CONTEXT, generator=generator)
    with torch.no_grad():
        embedding = model.time_embedding(model.time_proj(torch.tensor([time])))
        noise = decode_half(model, encode_half(model, latents, embedding, context), context)
        expected = float_unet(latents, torch.tensor(time), context).sample
    torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)


def test_names_without_the_wrappers_prefix_are_accepted(checkpoint: dict[str, Tensor]) -> None:
    unwrapped = {name.replace(PREFIX, "model.diffusion_model."): value for name, value in checkpoint.items()}
    assert is_tiny_stable_diffusion(unwrapped)
    unet, expected = (read_tiny_stable_diffusion_unet(tensors, "x.pth") for tensors in (unwrapped, checkpoint))
    assert unet.packed.keys() == expected.packed.keys()
    assert all(torch.equal(value, unet.other_tensors[name]) for name, value in expected.other_tensors.items())


def test_harmless_variations_are_accepted(checkpoint: dict[str, Tensor]) -> None:
    """It accepts codes of another dtype, float16, activation quantizers and tensors outside the UNet."""
    unusual = dict(checkpoint)
    unusual[f"{PREFIX}{Q2}.weight"] = checkpoint[f"{PREFIX}{Q2}.weight"].float()
    unusual[f"{PREFIX}{FLOAT}.bias"] = checkpoint[f"{PREFIX}{FLOAT}.bias"].half()
    unusual |= {f"{PREFIX}{Q2}{suffix}": torch.tensor(0.5) for suffix in IGNORED_SUFFIXES}
    unusual |= {"betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    unet = read_tiny_stable_diffusion_unet(unusual, "checkpoint.pth", torch.float16)
    assert len(unet.packed) == 265
    assert {value.dtype for value in unet.other_tensors.values()} == {torch.float16}


def test_the_format_is_detected_by_tensor_names(checkpoint: dict[str, Tensor]) -> None:
    assert is_tiny_stable_diffusion(checkpoint)
    assert not is_tiny_stable_diffusion(dequantized(checkpoint))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("time_embed.0.weight", None, "no UNet: tensor .*time_embed.0.weight is missing"),
        (f"{Q2}.weight", None, "1 tensors of the UNet are missing; .* down_blocks.0.resnets.0.conv1.weight"),
        (f"{Q2}.bias", None, "missing"),
        (f"{Q2}.weight_quantizer.zero_point", None, f"{Q2}.weight_quantizer.zero_point is missing"),
        (f"{Q2}.weight_quantizer.delta", None, "has shape|is unexpected"),
        (f"{Q2}.weight", torch.zeros(7, 32, 3, 3, dtype=torch.uint8), "has shape .*was expected"),
        (f"{Q2}.weight", torch.full((8, 32, 3, 3), 0.5), "has values other than integers from 0 to 255"),
        (f"{Q2}.weight", torch.full((8, 32, 3, 3), 300.0), "has values other than integers from 0 to 255"),
        (
            f"{Q2}.weight_quantizer.zero_point",
            torch.full((32, 1, 1, 1), 4.0),
            "has values other than integers from 0 to 3",
        ),
        (f"{Q2}.weight_quantizer.delta", torch.full((32, 1, 1, 1), float("nan")), "is not finite"),
        (f"{Q8}.weight_quantizer.delta", torch.zeros(128, 1), "is zero for some channels"),
        (f"{Q8}.weight", torch.full((128, 32), float("inf")), "is not finite"),
        (f"{FLOAT}.weight", torch.full((32, 32, 3, 3), float("nan")), "is not finite"),
        ("input_blocks.99.0.weight", torch.zeros(1), "is unexpected"),
        (f"{Q2}.something", torch.zeros(1), "is unexpected"),
    ],
)
def test_invalid_tensors_are_named(
    checkpoint: dict[str, Tensor], name: str, value: Tensor | None, message: str
) -> None:
    damaged = dict(checkpoint)
    if value is None:
        del damaged[PREFIX + name]
    else:
        damaged[PREFIX + name] = value
    with pytest.raises(ModelError, match=message):
        read_tiny_stable_diffusion_unet(damaged, "checkpoint.pth")
