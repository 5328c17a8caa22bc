"""Attention and feed-forward layers in chunks give the same results as diffusers' layers."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tests.support.models.tiny_models import TEXT_WIDTH
from tinysd_batch.model.chunking import DEFAULT_CHUNK_BYTES, items_per_chunk, limit_chunk_bytes
from tinysd_batch.model.nn.chunked_attention import use_chunked_layers
from tinysd_batch.model.tiny_sd import TinySD


@pytest.mark.parametrize("nbytes", [1, 5_000, DEFAULT_CHUNK_BYTES])
@pytest.mark.parametrize("fused", [False, True])
def test_chunks_give_the_same_result_as_diffusers(float_model: Path, nbytes: int, fused: bool) -> None:
    """In the UNet and in the VAE."""
    torch.manual_seed(0)
    plain = UNet2DConditionModel.from_pretrained(float_model / "unet").eval()
    chunked = UNet2DConditionModel.from_pretrained(float_model / "unet").eval()
    vae = AutoencoderKL.from_pretrained(float_model / "vae").eval()
    latents, context = torch.randn(2, 4, 12, 8), torch.randn(2, 9, TEXT_WIDTH)
    with torch.no_grad():
        noise, pixels = plain(latents, 500, context).sample, vae.decode(latents).sample
        use_chunked_layers(chunked, vae, fused=fused)
        with limit_chunk_bytes(nbytes):
            torch.testing.assert_close(chunked(latents, 500, context).sample, noise, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(vae.decode(latents).sample, pixels, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_small_chunks_give_the_same_image(tiny_model: Path, fused: bool) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu")
    usual = model.generate("cat", 1, num_inference_steps=3, output_type="np").images
    model.attention.fused = fused
    with limit_chunk_bytes(3000):
        small = model.generate("cat", 1, num_inference_steps=3, output_type="np").images
    assert abs(usual - small).max() < 1 / 255


def test_chunks_are_as_equal_as_possible() -> None:
    with limit_chunk_bytes(100):
        sizes = [items_per_chunk(*case) for case in ((10, 10), (11, 10), (25, 10), (3, 1000))]
    assert sizes == [10, 6, 9, 1]
