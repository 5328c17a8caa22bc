"""What calibration needs to know of a layer: its inputs' second moments, and how far its output is off."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.layers import LinearOrConv

RIDGE_FACTORS = (1.0, 10.0, 100.0)  # times the recipe's damping
MIN_TOKENS_PER_COLUMN = 4  # tokens for each column: with fewer, damping grows
MAX_DAMPING_RAISES = 5  # times that damping is raised tenfold
OUTER_BLOCK_COLUMNS = 512  # columns in a product of large matrices

TokensAndGaps = tuple[Tensor, Tensor]  # a layer's inputs [N, K], and gaps [N, O]


@dataclass(frozen=True, slots=True)
class LeastSquaresProblem:
    """A layer's least squares problem: the weights [O, K] near `target` in the metric `hessian` [K, K]."""

    target: Tensor
    hessian: Tensor
    mean_x: Tensor  # [K]
    mean_gap: Tensor  # [O]


class InputMoments:
    """Sums over tokens x [K] of a layer's inputs in the quantized model, and gaps [O] to what it should say.

    A gap is the float model's output (for layers that close a residual connection: plus what the stream is off by)
    less what the layer's float weight makes of x.
    """

    def __init__(self, columns: int, rows: int, device: torch.device) -> None:
        self.count = 0
        self.square = torch.zeros(columns, columns, device=device)  # x x^T; of what is symmetric, the upper half
        self.cross = torch.zeros(columns, rows, device=device)  # x gap^T
        self.sum_x = torch.zeros(columns, device=device)
        self.sum_gap = torch.zeros(rows, device=device)

    def add(self, x: Tensor, gap: Tensor) -> None:
        """Tokens [N, K] and their gaps [N, O]."""
        self.count += len(x)
        for span in split_range(0, x.shape[1], OUTER_BLOCK_COLUMNS):
            self.square[span, span.start :].addmm_(x[:, span].T, x[:, span.start :])
        self.cross.addmm_(x.T, gap)
        self.sum_x += x.sum(dim=0)
        self.sum_gap += gap.sum(dim=0)

    def build_problem(
        self, weight: Tensor, tuning: TokensAndGaps | None, *, has_bias: bool, damping: float
    ) -> LeastSquaresProblem:
        """The problem for a float weight [O, K]. Uses up the moments.

        The target makes up for the gaps, as far as ridge regression can tell them from x: with the ridge, of `damping`
        and larger ones as shares of the Hessian's mean diagonal, that does best on `tuning` tokens. Without tokens the
        target is the float weight. The Hessian is damped as well, more where tokens are few. With a bias the means are
        its business, so moments are taken around them.
        """
        fill_lower_half(self.square)
        mean_x, mean_gap = self.sum_x / self.count, self.sum_gap / self.count
        hessian, cross = self.square.div_(self.count), self.cross.div_(self.count)
        if has_bias:
            hessian.addr_(mean_x, mean_x, alpha=-1)
            cross.addr_(mean_x, mean_gap, alpha=-1)
        target = weight
        if tuning is not None:
            x, gap = tuning
            if has_bias:
                x, gap = x - mean_x, gap - mean_gap
            target = weight + fit_weight_shift(hessian, cross, x, gap, damping).T
        damp_and_factorize(hessian, damping * max(1.0, MIN_TOKENS_PER_COLUMN * len(mean_x) / self.count))
        return LeastSquaresProblem(target, hessian, mean_x, mean_gap)


def fill_lower_half(square: Tensor) -> None:
    """Fill the lower half of a symmetric matrix, in place."""
    for span in split_range(0, len(square), OUTER_BLOCK_COLUMNS):
        square[span.stop :, span] = square[span, span.stop :].T


def fit_weight_shift(hessian: Tensor, cross: Tensor, x: Tensor, gap: Tensor, least: float) -> Tensor:
    """The shift [K, O] that tells gaps [N, O] from x [N, K] best, of several ridges' and none."""
    best, found = gap.square().sum(), torch.zeros_like(cross)
    for factor in RIDGE_FACTORS:
        shift = torch.cholesky_solve(cross, damp_and_factorize(hessian.clone(), factor * least))
        error = (x @ shift - gap).square().sum()
        if error < best:
            best, found = error, shift
    return found


def damp_and_factorize(hessian: Tensor, damping: float) -> Tensor:
    """Add `damping` of its mean diagonal to the Hessian, in place, more if need be; its Cholesky factor."""
    mean = hessian.diagonal().mean().clamp(min=1e-8)
    for _ in range(MAX_DAMPING_RAISES):
        hessian.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            return torch.as_tensor(factor)
        damping *= 10
    raise ModelError("the inputs of a layer are not finite in calibration; is the source a whole model?")


def split_columns(layer: LinearOrConv, group_size: int, most: int) -> list[Tensor]:
    """The groups of a layer's rows in parts of at most `most` columns: neighbouring input channels, with all taps.

    One group of channels is the least part, however many columns its taps make.
    """
    taps = layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1
    columns = layer.weight[0].numel()
    groups = torch.arange(columns // group_size).view(taps, -1) if columns // taps % group_size == 0 else None
    if columns <= most or groups is None:
        return [torch.arange(columns // group_size)]
    count = min(-(-columns // most), groups.shape[1])
    return [part.flatten() for part in groups.tensor_split(count, dim=1)]


def gather_input_tokens(layer: LinearOrConv, x: Tensor, some: Tensor) -> Tensor:
    """Of the R L tokens in a layer's input, those of some numbers, as its matrix multiplies them, [N, K].

    A convolution's K is tap-major. Only these tokens are unfolded.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[some]
    (tall, wide), (down, across), (above, before) = layer.kernel_size, layer.stride, padding_of_conv(layer)
    padded = F.pad(x, (before, before, above, above)).permute(0, 2, 3, 1)
    height, width = (padded.shape[1] - tall) // down + 1, (padded.shape[2] - wide) // across + 1
    taps = torch.arange(tall * wide, device=x.device)
    rows = some[:, None] // width % height * down + taps // wide
    columns = some[:, None] % width * across + taps % wide
    return padded[some[:, None] // (height * width), rows, columns].flatten(1)


def padding_of_conv(layer: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(layer.padding, str), layer
    above, before = layer.padding
    return above, before


def flatten_output_tokens(y: Tensor) -> Tensor:
    """A layer's output in the same order of tokens, [R L, O]."""
    return y.permute(0, 2, 3, 1).flatten(0, 2) if y.dim() == 4 else y.reshape(-1, y.shape[-1])


def split_range(start: int, stop: int, most: int) -> Iterator[slice]:
    """What lies between, in parts of so many at most."""
    return (slice(at, min(at + most, stop)) for at in range(start, stop, most))
