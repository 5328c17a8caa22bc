"""Decoding in strips gives the same pixels as diffusers' decoder."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.support import ldm_checkpoint
from tests.support.session import examples
from tinysd_batch.model.chunking import limit_chunk_bytes
from tinysd_batch.model.nn import vae_decoder

ROUNDING = 1e-4  # of pixels in -1..1; one of 255 levels is 0.0078


@pytest.fixture(scope="module")
def plain_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    autoencoder = ldm_checkpoint.new_vae(ldm_checkpoint.SMALL).eval()
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            if parameter.dim() == 1:  # new norms are ones and new biases are zeros, which would hide mistakes
                parameter += 0.2 * torch.randn_like(parameter)
    return autoencoder


@pytest.fixture(scope="module")
def strip_vae(plain_vae: AutoencoderKL) -> AutoencoderKL:
    autoencoder = copy.deepcopy(plain_vae)
    vae_decoder.use_strip_layers(autoencoder)
    autoencoder.load_state_dict(plain_vae.state_dict(), assign=True)
    return autoencoder


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strip_bytes", [1, 10_000, 2**25])
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (2, 8)])
def test_strips_have_no_seams(
    plain_vae: AutoencoderKL, strip_vae: AutoencoderKL, size: tuple[int, int], strip_bytes: int, recompute: bool
) -> None:
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), limit_chunk_bytes(strip_bytes):
        expected = plain_vae.decode(latents).sample
        pixels = vae_decoder.decode_latents(strip_vae, latents, recompute=recompute)
    torch.testing.assert_close(pixels, expected, rtol=1e-3, atol=1e-3)  # one of 255 levels is 0.0078


@examples(8)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 60_000), st.integers(0, 2**16))
def test_recomputed_maps_give_the_same_pixels(
    plain_vae: AutoencoderKL, strip_vae: AutoencoderKL, height: int, width: int, strip_bytes: int, seed: int
) -> None:
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), limit_chunk_bytes(strip_bytes):
        expected, stored = plain_vae.decode(latents).sample, vae_decoder.decode_latents(strip_vae, latents)
        recomputed = vae_decoder.decode_latents(strip_vae, latents, recompute=True)
    torch.testing.assert_close(recomputed, expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(recomputed, stored, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("recompute", [False, True])
def test_small_strips_need_no_extra_flops(strip_vae: AutoencoderKL, recompute: bool) -> None:
    def count_flops(strip_bytes: int, recompute: bool) -> int:
        with torch.no_grad(), limit_chunk_bytes(strip_bytes), FlopCounterMode(display=False) as counter:
            vae_decoder.decode_latents(strip_vae, torch.zeros(1, 4, 6, 4), recompute=recompute)
        return int(counter.get_total_flops())

    assert count_flops(1, recompute) <= 1.02 * count_flops(2**25, recompute)
    assert count_flops(1, recompute) <= 1.35 * count_flops(2**25, False)


def test_channel_statistics_far_from_zero() -> None:
    x = 1000 + torch.randn(1, 6, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = x.contiguous(memory_format=torch.channels_last)
    mean, variance = vae_decoder.channel_statistics(vae_decoder.as_lazy_map(x.float()))
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, x.var(dim=(0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strip_bytes", [20_000, 2**25])
def test_float16_maps_change_pixels_by_a_fraction_of_a_level(
    plain_vae: AutoencoderKL, strip_vae: AutoencoderKL, strip_bytes: int, recompute: bool
) -> None:
    latents = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), limit_chunk_bytes(strip_bytes):
        expected = plain_vae.decode(latents).sample
        pixels = vae_decoder.decode_latents(strip_vae, latents, torch.float16, recompute=recompute)
    assert pixels.dtype is torch.float32
    assert not torch.equal(pixels, expected)
    levels = (pixels - expected).abs() * 255 / 2
    assert levels.mean() < 0.15
    assert levels.max() < 1.5  # the largest of 36,864 depends on the CPU's rounding: 0.75 to 1.14 were seen
