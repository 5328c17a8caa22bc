"""Fit codes, scales and offsets of groups to a weight matrix, without data."""

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
ROW_BLOCK_WEIGHTS = 2**18  # weights: what is worked on stays in the processor's cache
MAX_BYTE = 255
MIN_POWER = 1e-20  # stands for none, in ratios


def fit_affine_groups(groups: Tensor, bits: int = 2) -> tuple[Tensor, Tensor]:
    """Scale and offset, [N, 1] each, for which code * scale + offset is close to `groups` [N, g].

    Alternating least squares, which is Lloyd's algorithm (1982) on affine levels: codes are the nearest levels, then
    scale and offset are the regression of the weights on their codes. Starts from the groups' range, which alone would
    be a poor fit at 2 bits.
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
    """3, 15 or 255."""
    return int(2**bits - 1)


def round_to_codes(groups: Tensor, scale: Tensor, offset: Tensor, bits: int = 2) -> Tensor:
    """The code of the nearest level, as floats; zero scales give zero codes."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((groups - offset) / safe).round().clamp(0, max_code(bits)) * (scale != 0)


def quantize_to_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [O, G] as bytes between each row's least and largest: uint8 [O, G] and float16 (least, step) [O, 2]."""
    least = values.amin(dim=1, keepdim=True).half()
    step = ((values.amax(dim=1, keepdim=True) - least.float()) / MAX_BYTE).clamp(min=0).half()
    codes = ((values - least.float()) / step.float().clamp(min=1e-12)).round().clamp(0, MAX_BYTE)
    return codes.to(torch.uint8), torch.cat([least, step], dim=1)


def pack_matrix(matrix: Tensor, scale: Tensor, offset: Tensor, bits: int = 2) -> GroupWeight:
    """Pack a matrix [O, K] with scales and offsets [O, G]; codes are chosen for these as they are stored."""
    rows, columns = matrix.shape
    groups = scale.shape[1]
    qscale, scale_meta = quantize_to_bytes(scale)
    qoff, offset_meta = quantize_to_bytes(offset)
    qmeta = torch.cat([scale_meta, offset_meta], dim=1).contiguous().view(torch.int16)
    empty = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
    stored_scale, stored_offset = get_scales_and_offsets(GroupWeight(empty, qscale, qoff, qmeta, bits=bits))
    codes = round_to_codes(
        matrix.view(rows, groups, -1), stored_scale.float().unsqueeze(-1), stored_offset.float().unsqueeze(-1), bits
    )
    return GroupWeight(pack_codes(codes.to(torch.uint8).view(rows, columns), bits), qscale, qoff, qmeta, bits=bits)


def quantize_matrix(matrix: Tensor, group_size: int, bits: int = 2) -> GroupWeight:
    """A float matrix [O, K] in groups of `group_size` along K, some rows at a time to need little memory."""
    parts = map_row_blocks(lambda rows: quantize_rows(matrix[rows].float(), group_size, bits).tensors(), matrix)
    return GroupWeight(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, bits=bits)


def measure_weight_sqnr_db(matrix: Tensor, packed: GroupWeight) -> float:
    """Power of a float matrix [O, K] over power of what packing changed; some rows at a time."""

    def measure(rows: slice) -> tuple[float, float]:
        floats, part = matrix[rows].float(), packed.select_rows(rows)
        wrong = dequantize(part, torch.empty(part.shape)) - floats
        return float(floats.square().sum()), float(wrong.square().sum())

    powers, errors = zip(*map_row_blocks(measure, matrix), strict=True)
    return 10 * math.log10((MIN_POWER + sum(powers)) / (MIN_POWER + sum(errors)))


def map_row_blocks(work: Callable[[slice], Result], matrix: Tensor) -> list[Result]:
    """Results of `work` on blocks of rows, in their order; the blocks go to as many threads as torch would use.

    Each operation then runs on one thread and waits for no other. Within torch all threads would meet at the end of
    each of some 200 short operations a block, which beside another busy program takes several times as long.
    """
    step = max(ROW_BLOCK_WEIGHTS // matrix.shape[1], 1)
    blocks = [slice(start, start + step) for start in range(0, len(matrix), step)]
    threads = min(torch.get_num_threads(), len(blocks)) if matrix.device.type == "cpu" else 1
    if threads == 1:
        return list(map(work, blocks))
    with limit_threads(1), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, blocks))


def quantize_rows(rows: Tensor, group_size: int, bits: int) -> GroupWeight:
    scale, offset = fit_affine_groups(rows.reshape(-1, group_size), bits)
    return pack_matrix(rows, scale.view(len(rows), -1), offset.view(len(rows), -1), bits)
