"""GPTQ (Frantar et al. 2023) on affine groups: a column at a time, later columns make up for the error.

A column's error reaches the next few at once, those further on together with its neighbours' errors: few products of
large matrices instead of many of small ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinysd_batch.quantize.solve.affine import max_code, round_to_codes
from tinysd_batch.quantize.solve.hessian import OUTER_BLOCK_COLUMNS, split_range

INITIAL_RANGE_SHARES = (1.0, 0.8, 0.6)  # of a group's range: where the fit begins
FIT_ITERATIONS = 10
INNER_BLOCK_COLUMNS = (
    64  # columns whose errors reach the others together, and then again SPAN of them: whole groups, or less than one
)


@dataclass(slots=True)
class AffineFit:
    """A matrix in groups, not yet packed: weight = code * scale + offset."""

    codes: Tensor  # float32 [O, K]
    scale: Tensor  # float32 [O, G]
    offset: Tensor  # float32 [O, G]
    bits: int = 2

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """[O, K]"""
        size = self.group_size
        return self.codes * self.scale.repeat_interleave(size, 1) + self.offset.repeat_interleave(size, 1)


@dataclass(slots=True)
class ColumnBlock:
    """Columns of a layer that are solved together: all of them, unless that would take too much memory."""

    groups: Tensor  # which of the row's groups, int64
    target: Tensor  # [O, K], of these columns alone
    hessian: Tensor  # [K, K]
    fit: AffineFit


def quantize_gptq(target: Tensor, hessian: Tensor, group_size: int, bits: int = 2) -> AffineFit:
    """Codes, scales and offsets for `target` [O, K] that keep its products with inputs of this `hessian` [K, K].

    Scales are fitted when their group's turn comes, to what the weights have become by then.
    """
    rows, columns = target.shape
    upper = inverse_cholesky(hessian)
    weight = target.T.contiguous()  # [K, O], as columns are worked on one by one
    codes = torch.empty_like(weight)
    scales, offsets = torch.empty(2, rows, columns // group_size, device=target.device)
    for span in split_range(0, columns, OUTER_BLOCK_COLUMNS):
        for at in split_range(span.start, span.stop, min(group_size, INNER_BLOCK_COLUMNS)):
            group, inside = divmod(at.start, group_size)
            if not inside:
                whole = slice(at.start, at.start + group_size)
                fitted = fit_weighted_affine(weight[whole].T.contiguous(), hessian.diagonal()[whole], bits)
                scales[:, group], offsets[:, group] = fitted[0][:, 0], fitted[1][:, 0]
            codes[at] = quantize_columns(weight[at], upper[at, at], scales[:, group], offsets[:, group], bits)
            weight[at.stop : span.stop].addmm_(upper[at, at.stop : span.stop].T, weight[at], alpha=-1)
        weight[span.stop :].addmm_(upper[span, span.stop :].T, weight[span], alpha=-1)
    return AffineFit(codes.T.contiguous(), scales, offsets, bits)


def quantize_columns(weight: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Codes [k, O] of some columns [k, O] of a group, in whose place their errors are left, for later columns."""
    codes = torch.empty_like(weight)
    for column, one in enumerate(weight):
        codes[column] = round_to_codes(one, scale, offset, bits)
        one.sub_(codes[column] * scale + offset).div_(upper[column, column])
        weight[column + 1 :].addr_(upper[column, column + 1 :], one, alpha=-1)
    return codes


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """The upper triangular R [K, K] of which R^T R is the inverse of `hessian`.

    It is the inverse of the reversed Hessian's Cholesky factor, reversed again: half the work of inverting first.
    """
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    root = torch.zeros_like(lower)
    for span in split_range(0, len(lower), OUTER_BLOCK_COLUMNS):
        ones = torch.eye(len(lower) - span.start, span.stop - span.start, device=lower.device)
        root[span.start :, span] = torch.linalg.solve_triangular(lower[span.start :, span.start :], ones, upper=False)
    del lower
    return root.flip(0, 1)


def fit_weighted_affine(groups: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and offset [O, 1] for groups [O, g] whose columns count by `importance` [g].

    Alternating least squares as in `affine.fit_groups`, from several starts, of which the best stays.
    """
    weights = importance / importance.sum()
    middle = (groups.amax(dim=1, keepdim=True) + groups.amin(dim=1, keepdim=True)) / 2
    reach = groups.amax(dim=1, keepdim=True) - groups.amin(dim=1, keepdim=True)
    mean = groups @ weights[:, None]
    best_error = torch.full_like(mean, torch.inf)
    best = (torch.zeros_like(mean), torch.zeros_like(mean))
    for share in INITIAL_RANGE_SHARES:
        scale, offset = share * reach / max_code(bits), middle - share * reach / 2
        for _ in range(FIT_ITERATIONS):
            codes = round_to_codes(groups, scale, offset, bits)
            code_mean = codes @ weights[:, None]
            spread = codes - code_mean
            variance = spread.square() @ weights[:, None]
            slope = (spread * (groups - mean)) @ weights[:, None] / variance.clamp(min=1e-12)
            scale = torch.where(variance > 0, slope, scale)
            offset = mean - scale * code_mean
        error = (groups - round_to_codes(groups, scale, offset, bits) * scale - offset).square() @ weights[:, None]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
    return best
