"""The decoder in strips is the decoder: diffusers' own is the yardstick."""

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
from tinysd_batch.model.nn import vae_decoder as strips

ROUNDING = 1e-4  # of pixels in -1..1; a level of 255 is 0.0078


@pytest.fixture(scope="module")
def whole() -> AutoencoderKL:
    torch.manual_seed(0)
    autoencoder = ldm_checkpoint.new_vae(ldm_checkpoint.SMALL).eval()
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            if parameter.dim() == 1:  # fresh norms and biases are ones and zeros, which would hide a mistake
                parameter += 0.2 * torch.randn_like(parameter)
    return autoencoder


@pytest.fixture(scope="module")
def in_strips(whole: AutoencoderKL) -> AutoencoderKL:
    autoencoder = copy.deepcopy(whole)
    strips.use_strip_layers(autoencoder)
    autoencoder.load_state_dict(whole.state_dict(), assign=True)
    return autoencoder


@pytest.mark.parametrize("makes_anew", [False, True])
@pytest.mark.parametrize("strip_bytes", [1, 10_000, 2**25])
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (2, 8)])
def test_strips_show_no_seam(
    whole: AutoencoderKL, in_strips: AutoencoderKL, size: tuple[int, int], strip_bytes: int, makes_anew: bool
) -> None:
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), limit_chunk_bytes(strip_bytes):
        expected = whole.decode(latents).sample
        found = strips.decode_latents(in_strips, latents, recompute=makes_anew)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # a 255th of -1..1 is 0.0078


@examples(8)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 60_000), st.integers(0, 2**16))
def test_maps_made_anew_are_the_maps(
    whole: AutoencoderKL, in_strips: AutoencoderKL, height: int, width: int, strip_bytes: int, seed: int
) -> None:
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), limit_chunk_bytes(strip_bytes):
        expected, usual = whole.decode(latents).sample, strips.decode_latents(in_strips, latents)
        found = strips.decode_latents(in_strips, latents, recompute=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found, usual, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("makes_anew", [False, True])
def test_small_strips_cost_no_work_of_their_own(in_strips: AutoencoderKL, makes_anew: bool) -> None:
    def work(strip_bytes: int, anew: bool) -> int:
        with torch.no_grad(), limit_chunk_bytes(strip_bytes), FlopCounterMode(display=False) as counter:
            strips.decode_latents(in_strips, torch.zeros(1, 4, 6, 4), recompute=anew)
        return int(counter.get_total_flops())

    assert work(1, makes_anew) <= 1.02 * work(2**25, makes_anew)
    assert work(1, makes_anew) <= 1.35 * work(2**25, False)


def test_statistics_of_a_map_far_from_zero() -> None:
    x = 1000 + torch.randn(1, 6, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = x.contiguous(memory_format=torch.channels_last)
    mean, variance = strips.channel_statistics(strips.as_lazy_map(x.float()))
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, x.var(dim=(0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("makes_anew", [False, True])
@pytest.mark.parametrize("strip_bytes", [20_000, 2**25])
def test_maps_kept_as_float16_move_pixels_by_a_fraction_of_a_level(
    whole: AutoencoderKL, in_strips: AutoencoderKL, strip_bytes: int, makes_anew: bool
) -> None:
    latents = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), limit_chunk_bytes(strip_bytes):
        expected = whole.decode(latents).sample
        found = strips.decode_latents(in_strips, latents, torch.float16, recompute=makes_anew)
    assert found.dtype is torch.float32
    assert not torch.equal(found, expected)
    levels = (found - expected).abs() * 255 / 2
    assert levels.mean() < 0.15
    assert levels.max() < 1.5  # the largest of 36,864 is a matter of how the processor rounds: 0.75 to 1.14 were seen
