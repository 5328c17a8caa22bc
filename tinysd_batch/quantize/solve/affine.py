"""Fit codes, scales and offsets to a weight matrix without data: weight = code * scale + offset, group by group."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import GroupWeight, get_scales_and_offsets, pack_codes
from tinysd_batch.threads import limit_threads

Result = TypeVar("Result")
LLOYD_ITERATIONS = 20
ROW_BLOCK_WEIGHTS = 2**18  # few enough for a block of rows to stay in the CPU's cache
MAX_BYTE = 255
MIN_POWER = 1e-20  # replaces zero in ratios


def fit_affine_groups(groups: Tensor, bits: int = 2) -> tuple[Tensor, Tensor]:
    """Fit scales and offsets, [N, 1] each, for which code * scale + offset is close to `groups` [N, g].

    Alternating least squares, which is Lloyd's algorithm (1982) on affine levels: codes are the nearest levels, then
    scale and offset are the regression of the weights on their codes. It starts from each group's range, which alone
    would be a poor fit at 2 bits.
    """
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    scale, offset = (high - low) / max_code(bits), low
    mean = groups.mean(dim=1, keepdim=True)
    for _ in range(LLOYD_ITERATIONS):
        codes = round_to_codes(groups, scale, offset, bits)
        code_mean = codes.mean(dim=1, keepdim=True)
        spread = codes - code_mean
        variance = spread.square().sum(dim=1, keepdim=True)
        slope = (spread * (groups - mean)).sum(dim=1, keepdim=True) / variance.clamp(min=1e-12)
        scale = torch.where(variance > 0, slope, scale)
        offset = mean - scale * code_mean
    return scale, offset


def max_code(bits: int) -> int:
    """Return the largest code of 2, 4 or 8 bits: 3, 15 or 255."""
    return int(2**bits - 1)


def round_to_codes(groups: Tensor, scale: Tensor, offset: Tensor, bits: int = 2) -> Tensor:
    """Return the codes of the nearest levels, as floats. Where the scale is zero, codes are zero."""
    nonzero_scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((groups - offset) / nonzero_scale).round().clamp(0, max_code(bits)) * (scale != 0)


def quantize_to_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize values [O, G] to bytes between each row's minimum and maximum.

    Returns:
        The bytes, uint8 [O, G], and each row's minimum and step, float16 [O, 2].
    """
    minimum = values.amin(dim=1, keepdim=True).half()
    step = ((values.amax(dim=1, keepdim=True) - minimum.float()) / MAX_BYTE).clamp(min=0).half()
    codes = ((values - minimum.float()) / step.float().clamp(min=1e-12)).round().clamp(0, MAX_BYTE)
    return codes.to(torch.uint8), torch.cat([minimum, step], dim=1)


def pack_matrix(matrix: Tensor, scale: Tensor, offset: Tensor, bits: int = 2) -> GroupWeight:
    """Pack a matrix [O, K] with scales and offsets [O, G]. Codes are rounded for scales and offsets as stored."""
    rows, columns = matrix.shape
    groups = scale.shape[1]
    qscale, scale_meta = quantize_to_bytes(scale)
    qoff, offset_meta = quantize_to_bytes(offset)
    qmeta = torch.cat([scale_meta, offset_meta], dim=1).contiguous().view(torch.int16)
    no_codes = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
    stored_scale, stored_offset = get_scales_and_offsets(GroupWeight(no_codes, qscale, qoff, qmeta, bits=bits))
    codes = round_to_codes(
        matrix.view(rows, groups, -1), stored_scale.float().unsqueeze(-1), stored_offset.float().unsqueeze(-1), bits
    )
    return GroupWeight(pack_codes(codes.to(torch.uint8).view(rows, columns), bits), qscale, qoff, qmeta, bits=bits)


def quantize_matrix(matrix: Tensor, group_size: int, bits: int = 2) -> GroupWeight:
    """Quantize a float matrix [O, K] in groups of `group_size` along K, in blocks of rows to save memory."""
    blocks = map_row_blocks(lambda rows: quantize_rows(matrix[rows].float(), group_size, bits).tensors(), matrix)
    return GroupWeight(**{name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}, bits=bits)


def measure_weight_sqnr_db(matrix: Tensor, packed: GroupWeight) -> float:
    """Compute the SQNR in dB of a packed matrix: power of the weights [O, K] over power of their quantization error."""

    def measure(rows: slice) -> tuple[float, float]:
        floats, block = matrix[rows].float(), packed.select_rows(rows)
        error = dequantize(block, torch.empty(block.shape)) - floats
        return float(floats.square().sum()), float(error.square().sum())

    powers, errors = zip(*map_row_blocks(measure, matrix), strict=True)
    return 10 * math.log10((MIN_POWER + sum(powers)) / (MIN_POWER + sum(errors)))


def map_row_blocks(work: Callable[[slice], Result], matrix: Tensor) -> list[Result]:
    """Apply `work` to blocks of rows in as many threads as torch would use, and return the results in row order.

    Each torch operation then runs on a single thread. With torch's own threads, all of them would synchronize after
    each of about 200 short operations per block, which takes several times longer beside another busy program.
    """
    step = max(ROW_BLOCK_WEIGHTS // matrix.shape[1], 1)
    blocks = [slice(start, start + step) for start in range(0, len(matrix), step)]
    threads = min(torch.get_num_threads(), len(blocks)) if matrix.device.type == "cpu" else 1
    if threads == 1:
        return list(map(work, blocks))
    with limit_threads(1), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, blocks))


def quantize_rows(rows: Tensor, group_size: int, bits: int) -> GroupWeight:
    """Quantize rows [O, K] of a matrix, all at once."""
    scale, offset = fit_affine_groups(rows.reshape(-1, group_size), bits)
    return pack_matrix(rows, scale.view(len(rows), -1), offset.view(len(rows), -1), bits)
