"""Data-free quantization of a matrix."""

import torch

from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import get_scales_and_offsets
from tinysd_batch.quantize.solve.affine import fit_affine_groups, quantize_matrix, round_to_codes


def relative_error(weight: torch.Tensor, other: torch.Tensor) -> float:
    return float((weight - other).square().sum() / weight.square().sum())


def test_matrix_with_four_levels_is_almost_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (8, 128), generator=generator)
    scale = torch.rand(8, 2, generator=generator).repeat_interleave(64, dim=1) + 0.5
    matrix = codes * scale - 1.0
    assert relative_error(matrix, dequantize(quantize_matrix(matrix, 64), torch.empty(8, 128))) < 1e-4


def test_least_squares_is_far_better_than_the_range_on_gaussian_weights() -> None:
    groups = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    by_range = round_to_codes(groups, (high - low) / 3, low) * (high - low) / 3 + low
    scale, offset = fit_affine_groups(groups)
    fitted = round_to_codes(groups, scale, offset) * scale + offset
    # The best four uniform levels leave 0.1188 of a Gaussian's variance (Max 1960, table II).
    assert relative_error(groups, fitted) < 0.13
    assert relative_error(groups, by_range) > 1.5 * relative_error(groups, fitted)


def test_constant_and_zero_groups_are_exact() -> None:
    matrix = torch.cat([torch.zeros(2, 64), torch.full((2, 64), 0.75)])
    assert torch.equal(dequantize(quantize_matrix(matrix, 64), torch.empty(4, 64)), matrix)


def test_stored_scales_are_close_to_fitted_scales() -> None:
    matrix = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    scale, _ = fit_affine_groups(matrix.view(-1, 64))
    stored_scale, _ = get_scales_and_offsets(quantize_matrix(matrix, 64))
    spread = scale.max() - scale.min()
    assert (stored_scale.float() - scale.view(16, 4)).abs().max() < spread / 100
