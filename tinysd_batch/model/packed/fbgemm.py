"""Unpacking without a kernel of ours: by the FBGEMM operators that come with torch, or in plain torch on any device.

Some rows at a time are brought into FBGEMM's format, uint8 [N, g b/8 + 4]: a group's codes, then its scale and offset
as float16 (at 8 bits float32, which takes 8 bytes).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import repeat

import torch
from torch import Tensor

from tinysd_batch.model.packed.format import SUPPORTED_BITS, PackedWeight, ZeroPointRowWeight, unpack_codes

WEIGHTS_PER_STEP = 2**19  # at a time: floats that stay in the processor's cache

RowDecoder = Callable[[Tensor, int], Tensor]  # FBGEMM rows uint8 [N, g b/8 + 4] and b to float32 [N, g]


def dequantize_by_rows(weight: PackedWeight, out: Tensor, decode: RowDecoder | None = None) -> Tensor:
    """A weight as [O, K], written to `out`, its rows by `decode` or by the fastest way there is here."""
    codes = weight.codes()
    lines = out.view(len(codes), -1)
    step = max(1, WEIGHTS_PER_STEP // lines.shape[1])
    words = view_as_words(codes, weight.parameters().to(scale_dtype(weight.bits)))
    pieces = (torch.split(one, step) for one in (lines, *words))
    for line, *parts, delta in zip(*pieces, split_row_deltas(weight, step), strict=False):
        line.copy_(decode_words(parts, delta, weight.bits, decode or dequantize_rows))
        if out.is_meta:
            break  # without values: what takes memory is seen at the first lines
    return out


def to_fbgemm_rows(codes: Tensor, parameters: Tensor, bits: int) -> Tensor:
    """uint8 [N, g b/8] with N scales and offsets, float16 [N, 2], as uint8 [N, g b/8 + 4], at 8 bits [N, g + 8]."""
    return join_words(view_as_words(codes, parameters.to(scale_dtype(bits))))


def view_as_words(codes: Tensor, parameters: Tensor) -> list[Tensor]:
    """Both as words of four bytes where lines have whole ones and the codes lie at the address of one, else as bytes.

    Words are joined four times as fast.
    """
    word = torch.uint8 if codes.shape[1] % 4 or codes.data_ptr() % 4 else torch.int32
    return [codes.view(word), parameters.view(word)]


def join_words(parts: Sequence[Tensor]) -> Tensor:
    """Words of codes and of parameters, line by line, as bytes."""
    return torch.cat(list(parts), dim=1).view(torch.uint8)


def scale_dtype(bits: int) -> torch.dtype:
    """In which FBGEMM's rows hold scale and offset."""
    return torch.float32 if bits == 8 else torch.float16


def decode_words(parts: Sequence[Tensor], delta: Tensor | None, bits: int, decode: RowDecoder) -> Tensor:
    """Words of codes and of parameters as float32 [n, g]."""
    values = decode(join_words(parts), bits)
    return values if delta is None else values.mul_(delta)


def split_row_deltas(weight: PackedWeight, step: int) -> Iterable[Tensor | None]:
    """What the origin's rows are multiplied by, float32 [n, 1], `step` rows at a time; nothing for other weights."""
    if not isinstance(weight, ZeroPointRowWeight):
        return repeat(None)
    return torch.split(weight.qdelta.view(torch.float32)[:, None], step)


def dequantize_rows(rows: Tensor, bits: int) -> Tensor:
    """FBGEMM rows uint8 [N, g b/8 + 4] (at 8 bits + 8) to float32 [N, g]."""
    if rows.is_meta:
        width = rows.shape[1] - 2 * scale_dtype(bits).itemsize
        return torch.empty(len(rows), width * 8 // bits, device=rows.device)
    if rows.device.type == "cpu" and has_fbgemm():
        return dequantize_rows_fbgemm(rows, bits)
    return dequantize_rows_torch(rows, bits)


def dequantize_rows_torch(rows: Tensor, bits: int) -> Tensor:
    """The same in plain torch, on any device."""
    dtype = scale_dtype(bits)
    width = rows.shape[1] - 2 * dtype.itemsize
    parameters = rows[:, width:].clone(memory_format=torch.contiguous_format).view(dtype).float()  # [N, 2]
    return unpack_codes(rows[:, :width], bits).float().mul_(parameters[:, 0:1]).add_(parameters[:, 1:2])


def dequantize_rows_fbgemm(rows: Tensor, bits: int) -> Tensor:
    """The same by the FBGEMM operator that comes with torch; CPU only, and equal to the bit.

    Both compute code * scale + offset in float32. The product of at most 8 bits and the scale's 11 (it is a number of
    float16 in every case) is exact: fused or not, it rounds once.
    """
    name = "byte" if bits == 8 else f"{bits}bit"
    return torch.as_tensor(getattr(torch.ops.quantized, f"embedding_bag_{name}_unpack")(rows))


@cache
def has_fbgemm() -> bool:
    """Whether FBGEMM's operators are there and decode known rows as we do; they are no documented interface."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 16), dtype=torch.uint8, generator=generator)
    parameters = torch.tensor([[0.25, -0.5], [-1.5, 2.0], [6e-5, 0.0]], dtype=torch.float16)
    golden = [(to_fbgemm_rows(codes, parameters, bits), bits) for bits in SUPPORTED_BITS]
    try:
        return all(torch.equal(dequantize_rows_fbgemm(*one), dequantize_rows_torch(*one)) for one in golden)
    except (AttributeError, RuntimeError):
        return False
