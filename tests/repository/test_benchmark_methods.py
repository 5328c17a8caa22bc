"""The methods that ours is compared with, where they are written out here."""

import torch

from tests.support.adaround import adaround, fit_clipped_rows


def test_adaround_keeps_outputs_better_than_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 64, generator=generator)
    x = torch.randn(512, 16, generator=generator) @ torch.randn(16, 64, generator=generator)  # far fewer directions
    step, zero = fit_clipped_rows(matrix)
    assert torch.equal(zero, zero.round())
    nearest = (((matrix / step).round() + zero).clamp(0, 3) - zero) * step
    rounded = adaround(matrix, x)
    assert torch.allclose((rounded / step).round(), rounded / step, atol=1e-4)  # on the rows' levels
    errors = [float((x @ (weight - matrix).T).square().mean()) for weight in (nearest, rounded)]
    assert errors[1] < 0.4 * errors[0]
