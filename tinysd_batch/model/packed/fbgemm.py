"""Dequantize without a kernel of our own: with torch's FBGEMM operators, or in plain torch on any device.

A few rows at a time are converted to FBGEMM's row format, uint8 [N, g b/8 + 4]: the codes of a group, then its scale
and offset as float16 (at 8 bits as float32, which takes 8 bytes).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import repeat

import torch
from torch import Tensor

from tinysd_batch.model.packed.format import SUPPORTED_BITS, PackedWeight, ZeroPointRowWeight, unpack_codes

WEIGHTS_PER_STEP = 2**19  # their floats fit the CPU's cache

RowDecoder = Callable[[Tensor, int], Tensor]  # FBGEMM rows uint8 [N, g b/8 + 4] and bits b to float32 [N, g]


def dequantize_by_rows(weight: PackedWeight, out: Tensor, decode: RowDecoder | None = None) -> Tensor:
    """Dequantize a weight into `out` [O, K], its rows with `decode` if given, else in the fastest available way."""
    codes = weight.codes()
    out_rows = out.view(len(codes), -1)
    step = max(1, WEIGHTS_PER_STEP // out_rows.shape[1])
    words = view_as_words(codes, weight.parameters().to(scale_dtype(weight.bits)))
    steps = (torch.split(tensor, step) for tensor in (out_rows, *words))
    for target, *parts, delta in zip(*steps, split_row_deltas(weight, step), strict=False):
        target.copy_(decode_words(parts, delta, weight.bits, decode or dequantize_rows))
        if out.is_meta:
            break  # without data, one step shows how much memory is needed
    return out


def to_fbgemm_rows(codes: Tensor, parameters: Tensor, bits: int) -> Tensor:
    """Join codes uint8 [N, g b/8] and parameters float16 [N, 2] to uint8 [N, g b/8 + 4]; at 8 bits [N, g + 8]."""
    return join_words(view_as_words(codes, parameters.to(scale_dtype(bits))))


def view_as_words(codes: Tensor, parameters: Tensor) -> list[Tensor]:
    """View both as int32 if the row length and address of the codes allow it, else as bytes.

    Joining words is four times as fast as joining bytes.
    """
    dtype = torch.uint8 if codes.shape[1] % 4 or codes.data_ptr() % 4 else torch.int32
    return [codes.view(dtype), parameters.view(dtype)]


def join_words(parts: Sequence[Tensor]) -> Tensor:
    """Join codes and parameters row by row, as bytes."""
    return torch.cat(list(parts), dim=1).view(torch.uint8)


def scale_dtype(bits: int) -> torch.dtype:
    """Return the dtype of scale and offset in FBGEMM's row format."""
    return torch.float32 if bits == 8 else torch.float16


def decode_words(parts: Sequence[Tensor], delta: Tensor | None, bits: int, decode: RowDecoder) -> Tensor:
    """Dequantize rows of codes and parameters to float32 [n, g]."""
    values = decode(join_words(parts), bits)
    return values if delta is None else values.mul_(delta)


def split_row_deltas(weight: PackedWeight, step: int) -> Iterable[Tensor | None]:
    """Split the row factors of a zero-point weight, float32 [n, 1], into steps; repeat None for other weights."""
    if not isinstance(weight, ZeroPointRowWeight):
        return repeat(None)
    return torch.split(weight.qdelta.view(torch.float32)[:, None], step)


def dequantize_rows(rows: Tensor, bits: int) -> Tensor:
    """Dequantize FBGEMM rows uint8 [N, g b/8 + 4] (at 8 bits + 8) to float32 [N, g]."""
    if rows.is_meta:
        width = rows.shape[1] - 2 * scale_dtype(bits).itemsize
        return torch.empty(len(rows), width * 8 // bits, device=rows.device)
    if rows.device.type == "cpu" and has_fbgemm():
        return dequantize_rows_fbgemm(rows, bits)
    return dequantize_rows_torch(rows, bits)


def dequantize_rows_torch(rows: Tensor, bits: int) -> Tensor:
    """Dequantize FBGEMM rows in plain torch, on any device."""
    dtype = scale_dtype(bits)
    width = rows.shape[1] - 2 * dtype.itemsize
    parameters = rows[:, width:].clone(memory_format=torch.contiguous_format).view(dtype).float()  # [N, 2]
    return unpack_codes(rows[:, :width], bits).float().mul_(parameters[:, 0:1]).add_(parameters[:, 1:2])


def dequantize_rows_fbgemm(rows: Tensor, bits: int) -> Tensor:
    """Dequantize FBGEMM rows with torch's FBGEMM operator: CPU only, bit-identical to plain torch.

    Both compute code * scale + offset in float32. The product of a code of at most 8 bits and a scale of 11 bits (it is
    always a float16 value) is exact, so the result is rounded once, whether the operations are fused or not.
    """
    name = "byte" if bits == 8 else f"{bits}bit"
    return torch.as_tensor(getattr(torch.ops.quantized, f"embedding_bag_{name}_unpack")(rows))


@cache
def has_fbgemm() -> bool:
    """Whether FBGEMM's operators exist and decode test rows as we do: they are not a documented interface."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 16), dtype=torch.uint8, generator=generator)
    parameters = torch.tensor([[0.25, -0.5], [-1.5, 2.0], [6e-5, 0.0]], dtype=torch.float16)
    cases = [(to_fbgemm_rows(codes, parameters, bits), bits) for bits in SUPPORTED_BITS]
    try:
        return all(torch.equal(dequantize_rows_fbgemm(*case), dequantize_rows_torch(*case)) for case in cases)
    except (AttributeError, RuntimeError):
        return False
