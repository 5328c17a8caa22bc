"""Classifier-free guidance (Ho and Salimans 2022)."""

from torch import Tensor


def apply_guidance(noise_without: Tensor, noise_with: Tensor, scale: Tensor | float) -> Tensor:
    """Return e_negative + scale (e_text - e_negative).

    Args:
        noise_without: noise predicted with the negative prompt, [B, 4, h, w].
        noise_with: noise predicted with the prompt, [B, 4, h, w].
        scale: guidance scale, one for all images or one each [B, 1, 1, 1].
    """
    return noise_without + scale * (noise_with - noise_without)
