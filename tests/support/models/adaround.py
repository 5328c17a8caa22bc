"""How tiny-stable-diffusion's checkpoint was quantized, layer by layer.

Each row of a matrix has one affine range, clipped to minimize the L2.4 norm of the error; AdaRound (Nagel et al. 2020)
then chooses the rounding of each weight.
"""

import torch
from torch import Tensor

from tinysd_batch.model.packed.format import from_matrix, to_matrix
from tinysd_batch.quantize.calibration.layerwise import iter_layer_inputs
from tinysd_batch.quantize.calibration.trajectories import UNetInputs
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet

CLIPPING_NORM = 2.4
RANGE_CANDIDATES = 40
ITERATIONS = 200
BATCH = 256  # tokens
TOKENS = 2048
LEARNING_RATE = 0.1  # large enough for a few iterations to do what thousands do at the usual 1e-3
STRETCH = (-0.1, 1.1)  # of the rectified sigmoid (Nagel et al. 2020, equation 23)
ROUNDING = 1.0  # weight of the term that drives every choice to 0 or 1


def fit_clipped_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return step and zero point [O, 1] of each row's best range by the L2.4 norm; zero points are integers."""
    low, high = matrix.amin(dim=1, keepdim=True), matrix.amax(dim=1, keepdim=True)
    best_loss = torch.full_like(low, torch.inf)
    best_step, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for candidate in range(RANGE_CANDIDATES):
        share = 1 - candidate / RANGE_CANDIDATES * 0.9
        step = ((high - low) * share / 3).clamp(min=1e-8)
        zero = (-low * share / step).round()
        codes = ((matrix / step).round() + zero).clamp(0, 3) - zero
        loss = (codes * step - matrix).abs().pow(CLIPPING_NORM).mean(dim=1, keepdim=True)
        is_better = loss < best_loss
        best_loss = torch.where(is_better, loss, best_loss)
        best_step, best_zero = torch.where(is_better, step, best_step), torch.where(is_better, zero, best_zero)
    return best_step, best_zero


def adaround(matrix: Tensor, x: Tensor) -> Tensor:
    """Round a matrix [O, K] to its rows' levels so that its products with tokens x [N, K] are preserved."""
    step, zero = fit_clipped_rows(matrix)
    floor = (matrix / step).floor()
    rest = (matrix / step - floor).clamp(0.01, 0.99)
    low, high = STRETCH
    choice = (-torch.log((high - low) / (rest - low) - 1)).requires_grad_(True)
    optimizer = torch.optim.Adam([choice], lr=LEARNING_RATE)
    wanted = x @ matrix.T
    scale = wanted.square().mean()
    generator = torch.Generator().manual_seed(0)
    for iteration in range(ITERATIONS):
        round_up = (torch.sigmoid(choice) * (high - low) + low).clamp(0, 1)
        rounded = ((floor + round_up + zero).clamp(0, 3) - zero) * step
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        loss = (x[batch] @ rounded.T - wanted[batch]).square().mean() / scale
        if iteration > ITERATIONS // 5:
            sharpness = 20 - 18 * iteration / ITERATIONS
            loss = loss + ROUNDING * (1 - (2 * round_up - 1).abs().pow(sharpness)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        round_up = (torch.sigmoid(choice) * (high - low) + low > 0.5).float()
        return ((floor + round_up + zero).clamp(0, 3) - zero) * step


def quantize_layers(unet: SegmentedUNet, inputs: UNetInputs, names: list[str]) -> tuple[dict[str, Tensor], int]:
    """Return each layer's dequantized weight, and the bytes of codes, steps (float32) and zero points together."""
    weights, total_bytes = {}, 0
    with torch.no_grad():
        for name, x in iter_layer_inputs(unet, inputs, names, TOKENS):
            weight = unet.tensors[f"{name}.weight"].float()
            with torch.enable_grad():
                matrix = adaround(to_matrix(weight).contiguous(), x)
            weights[name] = from_matrix(matrix, weight.shape)
            total_bytes += weight.numel() // 4 + 5 * len(weight)
    return weights, total_bytes
