"""The normal noise of `torch.randn(..., device="cuda")` for a seed, computed on the CPU.

Philox4x32-10 (Salmon et al. 2011) with the counters of CUDA's cuRAND, then the Box-Muller transform. Each GPU thread
generates its own numbers, so the noise of a tensor with more elements than the GPU has threads depends on the GPU
model. Below that all GPUs agree, and this module agrees with them up to the rounding of sine and logarithm.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinysd_batch.errors import UsageError

# Threads of an RTX 3060 (28 multiprocessors of 1536). A GTX 1060 has 20,480, an RTX 4090 196,608.
MAX_NOISE_ELEMENTS = 43_008
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
MASK_32 = 0xFFFFFFFF
SHIFT_32, LOW_32_BITS = np.uint64(32), np.uint64(MASK_32)

Words = npt.NDArray[np.uint64]  # of 32 bits each


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Return four random words of 32 bits for each counter."""
    first, second, third, fourth = counter
    low_key, high_key = key
    for _ in range(ROUNDS):
        first_product, third_product = first * np.uint64(MULTIPLIERS[0]), third * np.uint64(MULTIPLIERS[1])
        first, second, third, fourth = (
            (third_product >> SHIFT_32) ^ second ^ np.uint64(low_key), third_product & LOW_32_BITS,
            (first_product >> SHIFT_32) ^ fourth ^ np.uint64(high_key), first_product & LOW_32_BITS,
        )  # fmt: skip
        low_key, high_key = (low_key + KEY_INCREMENTS[0]) & MASK_32, (high_key + KEY_INCREMENTS[1]) & MASK_32
    return first, second, third, fourth


class CudaNoiseGenerator:
    """Generates one image's noise as a CUDA `torch.Generator` fresh from `manual_seed(seed)` does."""

    def __init__(self, seed: int) -> None:
        self.key = seed & MASK_32, seed >> 32 & MASK_32
        self.calls = 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal noise, float32.

        Raises:
            UsageError: more elements than small GPUs have threads.
        """
        count = math.prod(shape)
        if count > MAX_NOISE_ELEMENTS:
            raise UsageError(
                f"rng cuda: latents of {count:,} numbers; above {MAX_NOISE_ELEMENTS:,} the noise depends on the GPU "
                f"model; use rng cpu or a smaller image"
            )
        zeros = np.zeros(count, np.uint64)
        counter = zeros + np.uint64(self.calls), zeros, np.arange(count, dtype=np.uint64), zeros
        self.calls += 1
        first, second, *_ = philox(counter, self.key)
        radius = np.sqrt(-2 * np.log((first + 0.5) / 2**32))
        noise = radius * np.sin((second + 0.5) / 2**32 * (2 * math.pi))
        return torch.from_numpy(noise.astype(np.float32)).view(*shape)
