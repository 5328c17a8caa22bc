"""GPTQ (Frantar et al. 2023) on affine groups: a column at a time, later columns make up for the error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinysd_batch.quantize.affine import nearest_codes, top_code

STARTS = (1.0, 0.8, 0.6)  # of a group's range: where the fit begins
ITERATIONS = 10


@dataclass(slots=True)
class Fit:
    """A matrix in groups, not yet packed: weight = code * scale + offset."""

    codes: Tensor  # float32 [O, K]
    scale: Tensor  # float32 [O, G]
    offset: Tensor  # float32 [O, G]
    bits: int = 2

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def matrix(self) -> Tensor:
        """[O, K]"""
        size = self.group_size
        return self.codes * self.scale.repeat_interleave(size, 1) + self.offset.repeat_interleave(size, 1)


@dataclass(slots=True)
class Part:
    """Columns of a layer that are solved together: all of them, unless that would take too much memory."""

    groups: Tensor  # which of the row's groups, int64
    target: Tensor  # [O, K], of these columns alone
    hessian: Tensor  # [K, K]
    fit: Fit


def gptq(target: Tensor, hessian: Tensor, group_size: int, bits: int = 2) -> Fit:
    """Codes, scales and offsets for `target` [O, K] that keep its products with inputs of this `hessian` [K, K].

    Scales are fitted when their group's turn comes, to what the weights have become by then.
    """
    rows, columns = target.shape
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    del inverse
    weight = target.clone()
    codes = torch.empty_like(weight)
    scales = torch.empty(rows, columns // group_size, device=target.device)
    offsets = torch.empty_like(scales)
    for group, start in enumerate(range(0, columns, group_size)):
        end = start + group_size
        block = weight[:, start:end].clone()
        scale, offset = fit_weighted(block, hessian.diagonal()[start:end], bits)
        errors = torch.empty_like(block)
        for column in range(group_size):
            at = start + column
            one = block[:, column : column + 1]
            code = nearest_codes(one, scale, offset, bits)
            error = (one - (code * scale + offset)) / upper[at, at]
            block[:, column:] -= error * upper[at, at:end]
            errors[:, column : column + 1] = error
            codes[:, at : at + 1] = code
        weight[:, end:] -= errors @ upper[start:end, end:]
        scales[:, group : group + 1], offsets[:, group : group + 1] = scale, offset
    return Fit(codes, scales, offsets, bits)


def fit_weighted(groups: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and offset [O, 1] for groups [O, g] whose columns count by `importance` [g].

    Alternating least squares as in `affine.fit_groups`, from several starts, of which the best stays.
    """
    weights = importance / importance.sum()
    middle = (groups.amax(dim=1, keepdim=True) + groups.amin(dim=1, keepdim=True)) / 2
    reach = groups.amax(dim=1, keepdim=True) - groups.amin(dim=1, keepdim=True)
    mean = groups @ weights[:, None]
    best_error = torch.full_like(mean, torch.inf)
    best = (torch.zeros_like(mean), torch.zeros_like(mean))
    for share in STARTS:
        scale, offset = share * reach / top_code(bits), middle - share * reach / 2
        for _ in range(ITERATIONS):
            codes = nearest_codes(groups, scale, offset, bits)
            code_mean = codes @ weights[:, None]
            spread = codes - code_mean
            variance = spread.square() @ weights[:, None]
            slope = (spread * (groups - mean)) @ weights[:, None] / variance.clamp(min=1e-12)
            scale = torch.where(variance > 0, slope, scale)
            offset = mean - scale * code_mean
        error = (groups - nearest_codes(groups, scale, offset, bits) * scale - offset).square() @ weights[:, None]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
    return best
