"""How the origin's checkpoint was made, layer by layer: an affine row each, clipped by the L2.4 norm, then AdaRound."""

import torch
from torch import Tensor

from tinysd_batch.model.packed.format import from_matrix, to_matrix
from tinysd_batch.quantize.calibration.layerwise import iter_layer_inputs
from tinysd_batch.quantize.calibration.trajectories import UNetInputs
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet

CLIPPING_NORM = 2.4
RANGE_CANDIDATES = 40  # ranges that are tried
ITERATIONS = 200
BATCH = 256  # tokens
TOKENS = 2048
LEARNING_RATE = 0.1  # so large, few iterations do what thousands do at the usual 1e-3
STRETCH = (-0.1, 1.1)  # of the rectified sigmoid (Nagel et al. 2020, equation 23)
ROUNDING = 1.0  # weight of the term that drives every choice to 0 or 1


def fit_clipped_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero point [O, 1] of the range that loses least of each row by the L2.4 norm; zero is a whole number."""
    low, high = matrix.amin(dim=1, keepdim=True), matrix.amax(dim=1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    step, zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in range(RANGE_CANDIDATES):
        share = 1 - shrink / RANGE_CANDIDATES * 0.9
        one = ((high - low) * share / 3).clamp(min=1e-8)
        at = (-low * share / one).round()
        back = ((matrix / one).round() + at).clamp(0, 3) - at
        loss = (back * one - matrix).abs().pow(CLIPPING_NORM).mean(dim=1, keepdim=True)
        better = loss < best
        best, step, zero = (
            torch.where(better, loss, best),
            torch.where(better, one, step),
            torch.where(better, at, zero),
        )
    return step, zero


def adaround(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix [O, K] on its rows' levels, rounded so that it multiplies tokens [N, K] as the float one does."""
    step, zero = fit_clipped_rows(matrix)
    floor = (matrix / step).floor()
    rest = (matrix / step - floor).clamp(0.01, 0.99)
    low, high = STRETCH
    choice = (-torch.log((high - low) / (rest - low) - 1)).requires_grad_(True)
    optimizer = torch.optim.Adam([choice], lr=LEARNING_RATE)
    wanted = x @ matrix.T
    scale = wanted.square().mean()
    draw = torch.Generator().manual_seed(0)
    for iteration in range(ITERATIONS):
        up = (torch.sigmoid(choice) * (high - low) + low).clamp(0, 1)
        back = ((floor + up + zero).clamp(0, 3) - zero) * step
        at = torch.randint(len(x), (BATCH,), generator=draw)
        loss = (x[at] @ back.T - wanted[at]).square().mean() / scale
        if iteration > ITERATIONS // 5:
            sharpness = 20 - 18 * iteration / ITERATIONS
            loss = loss + ROUNDING * (1 - (2 * up - 1).abs().pow(sharpness)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        up = (torch.sigmoid(choice) * (high - low) + low > 0.5).float()
        return ((floor + up + zero).clamp(0, 3) - zero) * step


def quantize_layers(walker: SegmentedUNet, rows: UNetInputs, names: list[str]) -> tuple[dict[str, Tensor], int]:
    """Every layer's weight as it comes back, and the bytes of codes, steps (float32) and zero points."""
    found, total = {}, 0
    with torch.no_grad():
        for name, x in iter_layer_inputs(walker, rows, names, TOKENS):
            weight = walker.tensors[f"{name}.weight"].float()
            with torch.enable_grad():
                matrix = adaround(to_matrix(weight).contiguous(), x)
            found[name] = from_matrix(matrix, weight.shape)
            total += weight.numel() // 4 + 5 * len(weight)
    return found, total
