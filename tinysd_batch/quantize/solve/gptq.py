"""GPTQ (Frantar et al. 2023) on affine groups: quantize column by column, and let later columns compensate.

The error of a column is propagated to the next few columns at once, and to those further on together with the errors of
its neighbours: a few products of large matrices replace many of small ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinysd_batch.quantize.solve.affine import max_code, round_to_codes
from tinysd_batch.quantize.solve.hessian import OUTER_BLOCK_COLUMNS, split_range

INITIAL_RANGE_SHARES = (1.0, 0.8, 0.6)  # shares of a group's range from which its fit starts
FIT_ITERATIONS = 10
# Errors of this many columns, or of one smaller group, are propagated together within an outer block, and those of
# OUTER_BLOCK_COLUMNS together beyond it.
INNER_BLOCK_COLUMNS = 64


@dataclass(slots=True)
class AffineFit:
    """A quantized matrix that is not packed yet: weight = code * scale + offset, with G groups in each row."""

    codes: Tensor  # float32 [O, K]
    scale: Tensor  # float32 [O, G]
    offset: Tensor  # float32 [O, G]
    bits: int = 2

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """Return the weights [O, K]."""
        size = self.group_size
        return self.codes * self.scale.repeat_interleave(size, 1) + self.offset.repeat_interleave(size, 1)


@dataclass(slots=True)
class ColumnBlock:
    """Columns of a layer that are solved together: all of them, unless that would take too much memory."""

    groups: Tensor  # numbers of the groups among the row's, int64
    target: Tensor  # [O, K], of these columns only
    hessian: Tensor  # [K, K]
    fit: AffineFit


def quantize_gptq(target: Tensor, hessian: Tensor, group_size: int, bits: int = 2) -> AffineFit:
    """Quantize `target` [O, K] so that its products with inputs of this `hessian` [K, K] are preserved.

    The scales of a group are fitted when its first column is due, to its weights as they have been updated by then.
    """
    rows, columns = target.shape
    upper = inverse_cholesky(hessian)
    weight = target.T.contiguous()  # [K, O], because columns are processed one by one
    codes = torch.empty_like(weight)
    scales, offsets = torch.empty(2, rows, columns // group_size, device=target.device)
    for outer in split_range(0, columns, OUTER_BLOCK_COLUMNS):
        for inner in split_range(outer.start, outer.stop, min(group_size, INNER_BLOCK_COLUMNS)):
            group, column_in_group = divmod(inner.start, group_size)
            if column_in_group == 0:
                in_group = slice(inner.start, inner.start + group_size)
                scale, offset = fit_weighted_affine(weight[in_group].T.contiguous(), hessian.diagonal()[in_group], bits)
                scales[:, group], offsets[:, group] = scale[:, 0], offset[:, 0]
            codes[inner] = quantize_columns(
                weight[inner], upper[inner, inner], scales[:, group], offsets[:, group], bits
            )
            weight[inner.stop : outer.stop].addmm_(upper[inner, inner.stop : outer.stop].T, weight[inner], alpha=-1)
        weight[outer.stop :].addmm_(upper[outer, outer.stop :].T, weight[outer], alpha=-1)
    return AffineFit(codes.T.contiguous(), scales, offsets, bits)


def quantize_columns(weight: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Quantize some columns [k, O] of a group, and replace them by their scaled errors, for later columns.

    Args:
        weight: The columns; changed in place.
        upper: The diagonal block [k, k] of these columns in the inverse Hessian's Cholesky factor.
        scale: Of the group, [O].
        offset: Of the group, [O].
        bits: Bits of a code.

    Returns:
        The codes, [k, O].
    """
    codes = torch.empty_like(weight)
    for number, column in enumerate(weight):
        codes[number] = round_to_codes(column, scale, offset, bits)
        column.sub_(codes[number] * scale + offset).div_(upper[number, number])
        weight[number + 1 :].addr_(upper[number, number + 1 :], column, alpha=-1)
    return codes


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Return the upper triangular R [K, K] with R^T R = inverse of `hessian`.

    R is the inverse of the Cholesky factor of the Hessian with rows and columns reversed, itself reversed. This is half
    the work of inverting the Hessian first.
    """
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    inverse = torch.zeros_like(lower)
    for span in split_range(0, len(lower), OUTER_BLOCK_COLUMNS):
        unit_columns = torch.eye(len(lower) - span.start, span.stop - span.start, device=lower.device)
        inverse[span.start :, span] = torch.linalg.solve_triangular(
            lower[span.start :, span.start :], unit_columns, upper=False
        )
    del lower
    return inverse.flip(0, 1)


def fit_weighted_affine(groups: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Fit scales and offsets [O, 1] to groups [O, g] whose columns are weighted by `importance` [g].

    Alternating least squares as in `affine.fit_affine_groups`, from several starting points, of which the best is kept.
    """
    weights = importance / importance.sum()
    middle = (groups.amax(dim=1, keepdim=True) + groups.amin(dim=1, keepdim=True)) / 2
    value_range = groups.amax(dim=1, keepdim=True) - groups.amin(dim=1, keepdim=True)
    mean = groups @ weights[:, None]
    best_error = torch.full_like(mean, torch.inf)
    best = (torch.zeros_like(mean), torch.zeros_like(mean))
    for share in INITIAL_RANGE_SHARES:
        scale, offset = share * value_range / max_code(bits), middle - share * value_range / 2
        for _ in range(FIT_ITERATIONS):
            codes = round_to_codes(groups, scale, offset, bits)
            code_mean = codes @ weights[:, None]
            spread = codes - code_mean
            variance = spread.square() @ weights[:, None]
            slope = (spread * (groups - mean)) @ weights[:, None] / variance.clamp(min=1e-12)
            scale = torch.where(variance > 0, slope, scale)
            offset = mean - scale * code_mean
        error = (groups - round_to_codes(groups, scale, offset, bits) * scale - offset).square() @ weights[:, None]
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best = torch.where(is_better, scale, best[0]), torch.where(is_better, offset, best[1])
    return best
