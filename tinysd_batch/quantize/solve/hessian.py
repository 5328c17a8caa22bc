"""Statistics of a layer's inputs, and the least squares problem that calibration solves with them.

Tokens are the vectors that a layer's matrix multiplies: K inputs of a linear layer, or the unfolded window of a
convolution. The *gap* of a token is what the quantized layer should add to the float layer's output for it, so that the
quantized model's output is the float model's again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.layers import LinearOrConv

RIDGE_FACTORS = (1.0, 10.0, 100.0)  # ridges to try, as multiples of the recipe's damping
MIN_TOKENS_PER_COLUMN = 4  # with fewer tokens the Hessian is damped more
MAX_DAMPING_RAISES = 5  # attempts to factorize the Hessian, each with ten times the damping
OUTER_BLOCK_COLUMNS = 512  # columns in one product of large matrices

TokensAndGaps = tuple[Tensor, Tensor]  # inputs of a layer [N, K], and their gaps [N, O]


@dataclass(frozen=True, slots=True)
class LeastSquaresProblem:
    """Find quantized weights [O, K] near `target` in the metric of `hessian`."""

    target: Tensor  # [O, K]
    hessian: Tensor  # [K, K]
    mean_x: Tensor  # [K]
    mean_gap: Tensor  # [O]


class InputMoments:
    """Sums over tokens x [K] of a layer's inputs in the quantized model, and over their gaps [O].

    A gap is the float model's output minus the float layer's output for x. For layers that close a residual connection,
    the error of the residual stream is added, so that the layer compensates for it.
    """

    def __init__(self, columns: int, rows: int, device: torch.device) -> None:
        self.count = 0
        self.second_moment = torch.zeros(columns, columns, device=device)  # x x^T; only the upper half is filled
        self.cross_moment = torch.zeros(columns, rows, device=device)  # x gap^T
        self.sum_x = torch.zeros(columns, device=device)
        self.sum_gap = torch.zeros(rows, device=device)

    def add(self, x: Tensor, gap: Tensor) -> None:
        """Add tokens [N, K] and their gaps [N, O]."""
        self.count += len(x)
        for span in split_range(0, x.shape[1], OUTER_BLOCK_COLUMNS):
            self.second_moment[span, span.start :].addmm_(x[:, span].T, x[:, span.start :])
        self.cross_moment.addmm_(x.T, gap)
        self.sum_x += x.sum(dim=0)
        self.sum_gap += gap.sum(dim=0)

    def build_problem(
        self, weight: Tensor, tuning: TokensAndGaps | None, *, has_bias: bool, damping: float
    ) -> LeastSquaresProblem:
        """Build the problem for a float weight [O, K]. Consumes the moments: they are changed in place.

        The target is the float weight plus the shift that best predicts the gaps from x: ridge regression, with the
        ridge that does best on the `tuning` tokens among `damping` and its multiples, as shares of the Hessian's mean
        diagonal. Without tuning tokens the target is the float weight. The Hessian is damped as well, more if there are
        few tokens per column. With a bias, moments are central, because the bias takes care of the means.
        """
        fill_lower_half(self.second_moment)
        mean_x, mean_gap = self.sum_x / self.count, self.sum_gap / self.count
        hessian, cross_moment = self.second_moment.div_(self.count), self.cross_moment.div_(self.count)
        if has_bias:
            hessian.addr_(mean_x, mean_x, alpha=-1)
            cross_moment.addr_(mean_x, mean_gap, alpha=-1)
        target = weight
        if tuning is not None:
            x, gap = tuning
            if has_bias:
                x, gap = x - mean_x, gap - mean_gap
            target = weight + fit_weight_shift(hessian, cross_moment, x, gap, damping).T
        damp_and_factorize(hessian, damping * max(1.0, MIN_TOKENS_PER_COLUMN * len(mean_x) / self.count))
        return LeastSquaresProblem(target, hessian, mean_x, mean_gap)


def fill_lower_half(matrix: Tensor) -> None:
    """Copy the upper half of a symmetric matrix to its lower half, in place."""
    for span in split_range(0, len(matrix), OUTER_BLOCK_COLUMNS):
        matrix[span.stop :, span] = matrix[span, span.stop :].T


def fit_weight_shift(hessian: Tensor, cross_moment: Tensor, x: Tensor, gap: Tensor, damping: float) -> Tensor:
    """Fit the shift [K, O] that predicts gaps [N, O] from tokens x [N, K].

    Args:
        hessian: Second moments of the calibration tokens, [K, K].
        cross_moment: Their moments with the gaps, [K, O].
        x: Tuning tokens, [N, K].
        gap: Their gaps, [N, O].
        damping: The smallest ridge, as a share of the Hessian's mean diagonal.

    Returns:
        The shift of the ridge with the smallest error on the tuning tokens; zero if no ridge is better than no shift.
    """
    best_error, best_shift = gap.square().sum(), torch.zeros_like(cross_moment)
    for factor in RIDGE_FACTORS:
        shift = torch.cholesky_solve(cross_moment, damp_and_factorize(hessian.clone(), factor * damping))
        error = (x @ shift - gap).square().sum()
        if error < best_error:
            best_error, best_shift = error, shift
    return best_shift


def damp_and_factorize(hessian: Tensor, damping: float) -> Tensor:
    """Add `damping` of its mean diagonal to the Hessian in place, more if needed, and return its Cholesky factor."""
    mean = hessian.diagonal().mean().clamp(min=1e-8)
    for _ in range(MAX_DAMPING_RAISES):
        hessian.diagonal().add_(damping * mean)
        factor, error_code = torch.linalg.cholesky_ex(hessian)
        if not error_code:
            return torch.as_tensor(factor)
        damping *= 10
    raise ModelError("the inputs of a layer are not finite during calibration; check that the source is complete")


def split_columns(layer: LinearOrConv, group_size: int, max_columns: int) -> list[Tensor]:
    """Split the groups of a layer's columns into blocks of at most `max_columns` columns.

    A block of a convolution consists of neighbouring input channels at all kernel positions. The smallest block is one
    group of channels, however many columns it has at all positions.

    Returns:
        The numbers of each block's groups.
    """
    positions = layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1
    columns = layer.weight[0].numel()
    is_divisible = columns // positions % group_size == 0
    groups = torch.arange(columns // group_size).view(positions, -1) if is_divisible else None
    if columns <= max_columns or groups is None:
        return [torch.arange(columns // group_size)]
    count = min(-(-columns // max_columns), groups.shape[1])
    return [block.flatten() for block in groups.tensor_split(count, dim=1)]


def gather_input_tokens(layer: LinearOrConv, x: Tensor, chosen: Tensor) -> Tensor:
    """Return some of the tokens in a layer's input, as its matrix multiplies them, [N, K].

    Only the chosen windows of a convolution are unfolded. Its K counts kernel positions first, then input channels.

    Args:
        layer: The layer.
        x: Its input, [R, L, K] or [R, C, h, w].
        chosen: Numbers of tokens among all R L, in the order of `flatten_output_tokens`.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[chosen]
    (kernel_height, kernel_width), (stride_y, stride_x) = layer.kernel_size, layer.stride
    pad_y, pad_x = padding_of_conv(layer)
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y)).permute(0, 2, 3, 1)
    height = (padded.shape[1] - kernel_height) // stride_y + 1
    width = (padded.shape[2] - kernel_width) // stride_x + 1
    positions = torch.arange(kernel_height * kernel_width, device=x.device)
    rows = chosen[:, None] // width % height * stride_y + positions // kernel_width
    columns = chosen[:, None] % width * stride_x + positions % kernel_width
    return padded[chosen[:, None] // (height * width), rows, columns].flatten(1)


def padding_of_conv(layer: nn.Conv2d) -> tuple[int, int]:
    """Return the padding of a convolution, vertical and horizontal."""
    assert not isinstance(layer.padding, str), layer
    pad_y, pad_x = layer.padding
    return pad_y, pad_x


def flatten_output_tokens(y: Tensor) -> Tensor:
    """Return a layer's output [R, L, O] or [R, O, h, w] token by token, [R L, O]."""
    return y.permute(0, 2, 3, 1).flatten(0, 2) if y.dim() == 4 else y.reshape(-1, y.shape[-1])


def split_range(start: int, stop: int, size: int) -> Iterator[slice]:
    """Yield the range from `start` to `stop` in slices of `size`; the last one may be shorter."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
