"""Block coordinate descent on a layer's own error: codes column by column, then scale and offset, a group at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysd_batch.model.packed.format import GroupWeight, pack_codes
from tinysd_batch.quantize.solve.affine import MAX_BYTE, max_code, quantize_to_bytes
from tinysd_batch.quantize.solve.gptq import INNER_BLOCK_COLUMNS, AffineFit, ColumnBlock
from tinysd_batch.quantize.solve.hessian import OUTER_BLOCK_COLUMNS, split_range

SnapFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # scale and offset [O] to ones that can be stored


def refine_and_pack(parts: Sequence[ColumnBlock], sweeps: int) -> GroupWeight:
    """Lower the error of a layer's parts, each against its target in the metric of its Hessian, and pack them.

    The first sweep fits scales freely; then each row's range of scales is fixed, and the others choose among its bytes.
    """
    for part in parts:
        refine_all_groups(part, lambda scale, offset: (scale.half().float(), offset.half().float()))
    order = torch.cat([part.groups for part in parts]).argsort()
    grid = AffineGrid.from_affine(
        torch.cat([part.fit.scale for part in parts], dim=1), torch.cat([part.fit.offset for part in parts], dim=1)
    )
    for part in parts:
        part.fit.scale, part.fit.offset = grid.snap_values(part.fit.scale), grid.snap_values(part.fit.offset, 2)
        for _ in range(max(sweeps - 1, 1)):
            refine_all_groups(part, grid.snap_group)
    size = parts[0].fit.group_size
    codes = torch.cat([part.fit.codes.view(*part.fit.scale.shape, size) for part in parts], dim=1)[:, order].flatten(1)
    scale, offset = (
        torch.cat([getattr(part.fit, name) for part in parts], dim=1)[:, order] for name in ("scale", "offset")
    )
    return grid.pack(codes, scale, offset, parts[0].fit.bits)


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """The scales and offsets that each row can store: 256 even steps from the least of each."""

    meta: Tensor  # float32 [O, 4], numbers of float16: scale_min, scale_step, offset_min, offset_step

    @classmethod
    def from_affine(cls, scale: Tensor, offset: Tensor) -> "AffineGrid":
        """From the least to the largest of each row's [O, G]."""
        return cls(torch.cat([quantize_to_bytes(scale)[1], quantize_to_bytes(offset)[1]], dim=1).float())

    def snap_group(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """A group's scale and offset [O] to the nearest that can be stored."""
        return self.snap_values(scale[:, None])[:, 0], self.snap_values(offset[:, None], 2)[:, 0]

    def snap_values(self, values: Tensor, first: int = 0) -> Tensor:
        """Scales [O, G], or with `first` = 2 offsets, as they will be read."""
        least, step = self.meta[:, first : first + 1], self.meta[:, first + 1 : first + 2]
        return (least + count_grid_steps(values, least, step) * step).half().float()

    def pack(self, codes: Tensor, scale: Tensor, offset: Tensor, bits: int) -> GroupWeight:
        """Codes [O, K] with scales and offsets [O, G] that have been snapped."""
        least, step, offset_least, offset_step = self.meta[:, :, None].unbind(dim=1)
        return GroupWeight(
            pack_codes(codes.to(torch.uint8), bits),
            count_grid_steps(scale, least, step).to(torch.uint8),
            count_grid_steps(offset, offset_least, offset_step).to(torch.uint8),
            self.meta.half().contiguous().view(torch.int16),
            bits=bits,
        )


def count_grid_steps(value: Tensor, least: Tensor, step: Tensor) -> Tensor:
    return ((value - least) / step.clamp(min=1e-12)).round().clamp(0, MAX_BYTE)


def refine_all_groups(part: ColumnBlock, snap: SnapFunction) -> None:
    """Once over all groups, in place. `slope` [K, O] is the error's negative gradient, H (target - weight)."""
    fit, hessian, size = part.fit, part.hessian, part.fit.group_size
    codes = fit.codes.T.contiguous()  # [K, O], as columns are worked on one by one
    slope = hessian @ (part.target - fit.dequantize()).T
    for span in split_range(0, len(slope), max(size, OUTER_BLOCK_COLUMNS)):
        changes = torch.empty_like(slope[span])
        for at in split_range(span.start, span.stop, size):
            here = slice(at.start - span.start, at.stop - span.start)
            changes[here] = refine_group(fit, at.start // size, codes[at], slope[at], hessian[at, at], snap)
            # No group is looked at twice: earlier ones need no slope.
            slope[at.stop : span.stop].addmm_(hessian[at.stop : span.stop, at], changes[here], alpha=-1)
        slope[span.stop :].addmm_(hessian[span.stop :, span], changes, alpha=-1)
    fit.codes = codes.T.contiguous()


def refine_group(
    fit: AffineFit, group: int, codes: Tensor, slopes: Tensor, local: Tensor, snap: SnapFunction
) -> Tensor:
    """New codes [g, O], scale and offset of a group, in place; by how much its weights [g, O] changed."""
    scale, offset = fit.scale[:, group], fit.offset[:, group]
    before = codes * scale + offset
    descend_codes(codes, scale, slopes, local, max_code(fit.bits))
    scale, offset = snap(*refit_affine(codes, scale, offset, slopes, local))
    fit.scale[:, group], fit.offset[:, group] = scale, offset
    return codes * scale + offset - before


def descend_codes(codes: Tensor, scale: Tensor, slopes: Tensor, local: Tensor, top: int) -> None:
    """Give each column of a group [g, O] the code that is best with all others as they are; in place."""
    for at in split_range(0, len(codes), INNER_BLOCK_COLUMNS):
        before = codes[at].clone()
        descend_code_block(codes[at], scale, slopes[at].clone(), local[at, at], top)
        slopes.addmm_(local[:, at], (codes[at] - before) * scale, alpha=-1)


def descend_code_block(codes: Tensor, scale: Tensor, slopes: Tensor, local: Tensor, top: int) -> None:
    """The same for some columns [k, O], codes and their slopes in place."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    for column in range(len(codes)):
        wanted = codes[column] * scale + slopes[column] / local[column, column]  # less the offset
        code = (wanted / safe).round().clamp(0, top) * (scale != 0)
        slopes.addr_(local[column], (code - codes[column]) * scale, alpha=-1)
        codes[column] = code


def refit_affine(codes: Tensor, scale: Tensor, offset: Tensor, slopes: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
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
