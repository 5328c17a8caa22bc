"""Solving one layer: input moments, GPTQ and coordinate descent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models.small_unet import CPU
from tests.support.session import examples
from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import to_matrix
from tinysd_batch.quantize.solve.affine import quantize_matrix
from tinysd_batch.quantize.solve.coordinate_descent import refine_and_pack
from tinysd_batch.quantize.solve.gptq import ColumnBlock, inverse_cholesky, quantize_gptq
from tinysd_batch.quantize.solve.hessian import InputMoments, flatten_output_tokens, gather_input_tokens, split_columns


def random_hessian(columns: int, seed: int) -> torch.Tensor:
    x = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(columns, columns, generator=torch.Generator().manual_seed(seed + 1))
    hessian = x.T @ x / len(x)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian


def output_error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = weight - other
    return float(((difference @ hessian) * difference).sum())


# The last two have more columns than an inner block: one in groups, one with a single group for each row.
@given(st.integers(0, 10_000), st.sampled_from([(16, 32, 16), (8, 128, 64), (5, 96, 32), (4, 576, 64), (4, 544, 544)]))
@examples(10)
def test_solved_layer_has_less_error_than_data_free_quantization(seed: int, sizes: tuple[int, int, int]) -> None:
    rows, columns, group_size = sizes
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    hessian = random_hessian(columns, seed)
    fit = quantize_gptq(weight, hessian, group_size)
    error_after_gptq = output_error(weight, fit.dequantize(), hessian)
    block = ColumnBlock(torch.arange(columns // group_size), weight, hessian, fit)
    refined = dequantize(refine_and_pack([block], 3), torch.empty(rows, columns))
    data_free = dequantize(quantize_matrix(weight, group_size), torch.empty(rows, columns))
    assert output_error(weight, refined, hessian) < 1.02 * error_after_gptq
    assert output_error(weight, refined, hessian) < output_error(weight, data_free, hessian)


def test_matrix_with_four_levels_is_preserved() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 4, (8, 128), generator=generator) * 0.5 - 1.0
    hessian = random_hessian(128, 1)
    block = ColumnBlock(torch.arange(2), weight, hessian, quantize_gptq(weight, hessian, 64))
    refined = dequantize(refine_and_pack([block], 2), torch.empty(8, 128))
    assert float((refined - weight).abs().max()) < 0.01


def test_moments_of_batches_are_those_of_all_tokens() -> None:
    torch.manual_seed(0)
    x, gap, weight = torch.randn(64, 600) + 1, torch.randn(64, 3), torch.randn(3, 600)
    moments = InputMoments(600, 3, CPU)
    for batch in (slice(0, 40), slice(40, 64)):
        moments.add(x[batch], gap[batch])
    hessian = moments.build_problem(weight, None, has_bias=True, damping=1e-6).hessian
    expected = (x - x.mean(dim=0)).T @ (x - x.mean(dim=0)) / 64
    expected.diagonal().add_((hessian - expected).diagonal().mean())
    assert torch.allclose(hessian, expected, atol=1e-4)


@given(st.integers(0, 10_000), st.sampled_from([48, 600]))
@examples(5)
def test_inverse_cholesky_is_the_factor_of_the_inverse(seed: int, columns: int) -> None:
    hessian = random_hessian(columns, seed).double()
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    tolerance = 1e-3 * float(expected.abs().max())
    assert torch.allclose(inverse_cholesky(hessian.float()).double(), expected, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0)], ids=["3x3", "down", "unpadded", "1x1"]
)
def test_gathered_tokens_times_the_matrix_are_the_convolution(size: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(6, 5, size, stride, padding), torch.randn(3, 6, 9, 7)
    output = flatten_output_tokens(layer(x))
    chosen = torch.randperm(len(output))[:10]
    tokens = gather_input_tokens(layer, x, chosen)
    assert tokens.shape == (10, 6 * size * size)
    matrix = to_matrix(layer.weight)
    assert torch.allclose(torch.nn.functional.linear(tokens, matrix, layer.bias), output[chosen], atol=1e-5)


def test_column_blocks_of_a_wide_layer_cover_it_once() -> None:
    layer = torch.nn.Conv2d(192, 4, 3)
    blocks = split_columns(layer, 64, 64 * 9)
    assert len(blocks) == 3
    assert sorted(torch.cat(blocks).tolist()) == list(range(192 * 9 // 64))
    assert blocks[0].tolist() == [3 * position for position in range(9)]  # some channels at all kernel positions
    assert [len(block) for block in split_columns(layer, 64, 64)] == [9, 9, 9]  # no block is empty
    assert [block.tolist() for block in split_columns(layer, 64, 10_000)] == [list(range(27))]
