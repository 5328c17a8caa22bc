"""Block coordinate descent on a layer's own error: codes column by column, then scale and offset, a group at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysd_batch.model.packed.format import PackedWeight, pack_codes
from tinysd_batch.quantize.solve.affine import BYTE, to_bytes, top_code
from tinysd_batch.quantize.solve.gptq import NEAR, Fit, Part
from tinysd_batch.quantize.solve.hessian import SPAN, parts_of

Snap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # scale and offset [O] to ones that can be stored


def refine(parts: Sequence[Part], sweeps: int) -> PackedWeight:
    """Lower the error of a layer's parts, each against its target in the metric of its Hessian, and pack them.

    The first sweep fits scales freely; then each row's range of scales is fixed, and the others choose among its bytes.
    """
    for part in parts:
        sweep(part, lambda scale, offset: (scale.half().float(), offset.half().float()))
    order = torch.cat([part.groups for part in parts]).argsort()
    grid = Grid.of(
        torch.cat([part.fit.scale for part in parts], dim=1), torch.cat([part.fit.offset for part in parts], dim=1)
    )
    for part in parts:
        part.fit.scale, part.fit.offset = grid.snap_all(part.fit.scale), grid.snap_all(part.fit.offset, 2)
        for _ in range(max(sweeps - 1, 1)):
            sweep(part, grid.snap)
    size = parts[0].fit.group_size
    codes = torch.cat([part.fit.codes.view(*part.fit.scale.shape, size) for part in parts], dim=1)[:, order].flatten(1)
    scale, offset = (
        torch.cat([getattr(part.fit, name) for part in parts], dim=1)[:, order] for name in ("scale", "offset")
    )
    return grid.pack(codes, scale, offset, parts[0].fit.bits)


@dataclass(frozen=True, slots=True)
class Grid:
    """The scales and offsets that each row can store: 256 even steps from the least of each."""

    meta: Tensor  # float32 [O, 4], numbers of float16: scale_min, scale_step, offset_min, offset_step

    @classmethod
    def of(cls, scale: Tensor, offset: Tensor) -> "Grid":
        """From the least to the largest of each row's [O, G]."""
        return cls(torch.cat([to_bytes(scale)[1], to_bytes(offset)[1]], dim=1).float())

    def snap(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """A group's scale and offset [O] to the nearest that can be stored."""
        return self.snap_all(scale[:, None])[:, 0], self.snap_all(offset[:, None], 2)[:, 0]

    def snap_all(self, values: Tensor, first: int = 0) -> Tensor:
        """Scales [O, G], or with `first` = 2 offsets, as they will be read."""
        least, step = self.meta[:, first : first + 1], self.meta[:, first + 1 : first + 2]
        return (least + steps_to(values, least, step) * step).half().float()

    def pack(self, codes: Tensor, scale: Tensor, offset: Tensor, bits: int) -> PackedWeight:
        """Codes [O, K] with scales and offsets [O, G] that have been snapped."""
        least, step, offset_least, offset_step = self.meta[:, :, None].unbind(dim=1)
        return PackedWeight(
            pack_codes(codes.to(torch.uint8), bits),
            steps_to(scale, least, step).to(torch.uint8),
            steps_to(offset, offset_least, offset_step).to(torch.uint8),
            self.meta.half().contiguous().view(torch.int16),
            bits=bits,
        )


def steps_to(value: Tensor, least: Tensor, step: Tensor) -> Tensor:
    return ((value - least) / step.clamp(min=1e-12)).round().clamp(0, BYTE)


def sweep(part: Part, snap: Snap) -> None:
    """Once over all groups, in place. `slope` [K, O] is the error's negative gradient, H (target - weight)."""
    fit, hessian, size = part.fit, part.hessian, part.fit.group_size
    codes = fit.codes.T.contiguous()  # [K, O], as columns are worked on one by one
    slope = hessian @ (part.target - fit.matrix()).T
    for span in parts_of(0, len(slope), max(size, SPAN)):
        changes = torch.empty_like(slope[span])
        for at in parts_of(span.start, span.stop, size):
            here = slice(at.start - span.start, at.stop - span.start)
            changes[here] = improve(fit, at.start // size, codes[at], slope[at], hessian[at, at], snap)
            # No group is looked at twice: earlier ones need no slope.
            slope[at.stop : span.stop].addmm_(hessian[at.stop : span.stop, at], changes[here], alpha=-1)
        slope[span.stop :].addmm_(hessian[span.stop :, span], changes, alpha=-1)
    fit.codes = codes.T.contiguous()


def improve(fit: Fit, group: int, codes: Tensor, slopes: Tensor, local: Tensor, snap: Snap) -> Tensor:
    """New codes [g, O], scale and offset of a group, in place; by how much its weights [g, O] changed."""
    scale, offset = fit.scale[:, group], fit.offset[:, group]
    before = codes * scale + offset
    descend(codes, scale, slopes, local, top_code(fit.bits))
    scale, offset = snap(*refit(codes, scale, offset, slopes, local))
    fit.scale[:, group], fit.offset[:, group] = scale, offset
    return codes * scale + offset - before


def descend(codes: Tensor, scale: Tensor, slopes: Tensor, local: Tensor, top: int) -> None:
    """Give each column of a group [g, O] the code that is best with all others as they are; in place."""
    for at in parts_of(0, len(codes), NEAR):
        before = codes[at].clone()
        descend_near(codes[at], scale, slopes[at].clone(), local[at, at], top)
        slopes.addmm_(local[:, at], (codes[at] - before) * scale, alpha=-1)


def descend_near(codes: Tensor, scale: Tensor, slopes: Tensor, local: Tensor, top: int) -> None:
    """The same for some columns [k, O], codes and their slopes in place."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    for column in range(len(codes)):
        wanted = codes[column] * scale + slopes[column] / local[column, column]  # less the offset
        code = (wanted / safe).round().clamp(0, top) * (scale != 0)
        slopes.addr_(local[column], (code - codes[column]) * scale, alpha=-1)
        codes[column] = code


def refit(codes: Tensor, scale: Tensor, offset: Tensor, slopes: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset [O] that are best for codes [g, O] with all other groups as they are."""
    across = local @ codes
    a, b, c = (codes * across).sum(dim=0), across.sum(dim=0), local.sum()
    right, below = (codes * slopes).sum(dim=0), slopes.sum(dim=0)
    determinant = a * c - b * b
    fits = determinant > 1e-6 * a * c
    safe = torch.where(fits, determinant, torch.ones_like(determinant))
    scale_by = torch.where(fits, (c * right - b * below) / safe, torch.zeros_like(a))
    offset_by = torch.where(fits, (a * below - b * right) / safe, below / c)
    return scale + scale_by, offset + offset_by
