"""The decoder in strips is the decoder: diffusers' own is the yardstick."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL

from tests import ldm
from tinysd_batch.model import vae as strips
from tinysd_batch.model.parts import in_parts_of


@pytest.fixture(scope="module")
def whole() -> AutoencoderKL:
    torch.manual_seed(0)
    autoencoder = ldm.new_vae(ldm.SMALL).eval()
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            if parameter.dim() == 1:  # fresh norms and biases are ones and zeros, which would hide a mistake
                parameter += 0.2 * torch.randn_like(parameter)
    return autoencoder


@pytest.fixture(scope="module")
def in_strips(whole: AutoencoderKL) -> AutoencoderKL:
    autoencoder = copy.deepcopy(whole)
    strips.use_factor_norms(autoencoder)
    autoencoder.load_state_dict(whole.state_dict(), assign=True)
    return autoencoder


@pytest.mark.parametrize("strip_bytes", [1, 20_000, 2**25])
@pytest.mark.parametrize("size", [(8, 8), (9, 5), (2, 16)])
def test_strips_show_no_seam(
    whole: AutoencoderKL, in_strips: AutoencoderKL, size: tuple[int, int], strip_bytes: int
) -> None:
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), in_parts_of(strip_bytes):
        expected, found = whole.decode(latents).sample, strips.decode_latents(in_strips, latents)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # a 255th of -1..1 is 0.0078


def test_statistics_of_a_map_far_from_zero() -> None:
    x = 1000 + torch.randn(1, 6, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = x.contiguous(memory_format=torch.channels_last)
    mean, variance = strips.channel_statistics(x.float())
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, x.var(dim=(0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("strip_bytes", [20_000, 2**25])
def test_maps_kept_as_float16_move_pixels_by_a_fraction_of_a_level(
    whole: AutoencoderKL, in_strips: AutoencoderKL, strip_bytes: int
) -> None:
    latents = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), in_parts_of(strip_bytes):
        expected = whole.decode(latents).sample
        found = strips.decode_latents(in_strips, latents, torch.float16)
    assert found.dtype is torch.float32
    assert not torch.equal(found, expected)
    levels = (found - expected).abs() * 255 / 2
    assert levels.mean() < 0.15
    assert levels.max() < 1.5  # the largest of 36,864 is a matter of how the processor rounds: 0.75 to 1.14 were seen
