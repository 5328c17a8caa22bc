"""The normal noise that `torch.randn(..., device="cuda")` draws from a seed, computed on the host.

Philox4x32-10 (Salmon et al. 2011) as CUDA's curand counts it, then Box and Muller's transform. Each of a card's threads
makes numbers of its own, so where a tensor has more elements than a card has threads, the noise depends on the card.
Below that all cards agree, and this with them up to the rounding of sine and logarithm.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinysd_batch.errors import UsageError

MAX_NOISE_ELEMENTS = (
    43_008  # threads of an RTX 3060 (28 multiprocessors of 1536); a GTX 1060 has 20,480, an RTX 4090 196,608
)
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
MASK_32 = 0xFFFFFFFF
SHIFT_32, LOW_32_BITS = np.uint64(32), np.uint64(MASK_32)

Words = npt.NDArray[np.uint64]  # 32 bits each


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four words of 32 bits for each counter."""
    first, second, third, fourth = counter
    low, high = key
    for _ in range(ROUNDS):
        one, other = first * np.uint64(MULTIPLIERS[0]), third * np.uint64(MULTIPLIERS[1])
        first, second, third, fourth = (
            (other >> SHIFT_32) ^ second ^ np.uint64(low), other & LOW_32_BITS,
            (one >> SHIFT_32) ^ fourth ^ np.uint64(high), one & LOW_32_BITS,
        )  # fmt: skip
        low, high = (low + KEY_INCREMENTS[0]) & MASK_32, (high + KEY_INCREMENTS[1]) & MASK_32
    return first, second, third, fourth


class CudaNoiseGenerator:
    """In place of a torch.Generator: a CUDA one, fresh from `manual_seed(seed)`, that draws one image's noise."""

    def __init__(self, seed: int) -> None:
        self.key = seed & MASK_32, seed >> 32 & MASK_32
        self.calls = 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Standard normal float32. Raises UsageError for more elements than cards have threads."""
        count = math.prod(shape)
        if count > MAX_NOISE_ELEMENTS:
            raise UsageError(
                f"rng cuda: latents of {count:,} numbers; beyond {MAX_NOISE_ELEMENTS:,} each card draws noise of its own, so "
                f"take rng cpu or a smaller picture"
            )
        zero = np.zeros(count, np.uint64)
        counter = zero + np.uint64(self.calls), zero, np.arange(count, dtype=np.uint64), zero
        self.calls += 1
        first, second, *_ = philox(counter, self.key)
        radius = np.sqrt(-2 * np.log((first + 0.5) / 2**32))
        noise = radius * np.sin((second + 0.5) / 2**32 * (2 * math.pi))
        return torch.from_numpy(noise.astype(np.float32)).view(*shape)
