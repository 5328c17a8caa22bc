"""Block coordinate descent on a layer's output error: codes column by column, then scale and offset, group by group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysd_batch.model.packed.format import GroupWeight, pack_codes
from tinysd_batch.quantize.solve.affine import MAX_BYTE, max_code, quantize_to_bytes
from tinysd_batch.quantize.solve.gptq import INNER_BLOCK_COLUMNS, AffineFit, ColumnBlock
from tinysd_batch.quantize.solve.hessian import OUTER_BLOCK_COLUMNS, split_range

SnapFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # scale and offset [O] to values that can be stored


def refine_and_pack(blocks: Sequence[ColumnBlock], sweeps: int) -> GroupWeight:
    """Reduce the error of each column block against its target in the metric of its Hessian, and pack the layer.

    The first sweep fits scales and offsets freely. Then the range of each row's scales and offsets is fixed, and later
    sweeps choose among the 256 values that a byte can select in it.
    """
    for block in blocks:
        refine_all_groups(block, lambda scale, offset: (scale.half().float(), offset.half().float()))
    order = torch.cat([block.groups for block in blocks]).argsort()
    grid = AffineGrid.from_affine(
        torch.cat([block.fit.scale for block in blocks], dim=1),
        torch.cat([block.fit.offset for block in blocks], dim=1),
    )
    for block in blocks:
        block.fit.scale, block.fit.offset = grid.snap_values(block.fit.scale), grid.snap_values(block.fit.offset, 2)
        for _ in range(max(sweeps - 1, 1)):
            refine_all_groups(block, grid.snap_group)
    group_size = blocks[0].fit.group_size
    grouped_codes = [block.fit.codes.view(*block.fit.scale.shape, group_size) for block in blocks]
    codes = torch.cat(grouped_codes, dim=1)[:, order].flatten(1)
    scale = torch.cat([block.fit.scale for block in blocks], dim=1)[:, order]
    offset = torch.cat([block.fit.offset for block in blocks], dim=1)[:, order]
    return grid.pack(codes, scale, offset, blocks[0].fit.bits)


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """The scales and offsets that can be stored in each row: 256 equally spaced values from the row's minimum on."""

    meta: Tensor  # float32 [O, 4] of float16 numbers: minimum and step of the scales, minimum and step of the offsets

    @classmethod
    def from_affine(cls, scale: Tensor, offset: Tensor) -> "AffineGrid":
        """Span the grid from the minimum to the maximum of each row's scales and offsets [O, G]."""
        return cls(torch.cat([quantize_to_bytes(scale)[1], quantize_to_bytes(offset)[1]], dim=1).float())

    def snap_group(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Round one group's scale and offset [O] to the grid."""
        return self.snap_values(scale[:, None])[:, 0], self.snap_values(offset[:, None], 2)[:, 0]

    def snap_values(self, values: Tensor, first: int = 0) -> Tensor:
        """Round values [O, G] to the grid, as they will be read: scales, or offsets with `first` = 2."""
        minimum, step = self.meta[:, first : first + 1], self.meta[:, first + 1 : first + 2]
        return (minimum + count_grid_steps(values, minimum, step) * step).half().float()

    def pack(self, codes: Tensor, scale: Tensor, offset: Tensor, bits: int) -> GroupWeight:
        """Pack codes [O, K] with scales and offsets [O, G] that lie on the grid."""
        scale_min, scale_step, offset_min, offset_step = self.meta[:, :, None].unbind(dim=1)
        return GroupWeight(
            pack_codes(codes.to(torch.uint8), bits),
            count_grid_steps(scale, scale_min, scale_step).to(torch.uint8),
            count_grid_steps(offset, offset_min, offset_step).to(torch.uint8),
            self.meta.half().contiguous().view(torch.int16),
            bits=bits,
        )


def count_grid_steps(value: Tensor, minimum: Tensor, step: Tensor) -> Tensor:
    """Return the number of steps from `minimum` to the grid value nearest to `value`, 0 to 255."""
    return ((value - minimum) / step.clamp(min=1e-12)).round().clamp(0, MAX_BYTE)


def refine_all_groups(block: ColumnBlock, snap: SnapFunction) -> None:
    """Refine each group of a column block once, in place.

    `slope` [K, O] is the negative gradient of half the error: H (target - weight).
    """
    fit, hessian, group_size = block.fit, block.hessian, block.fit.group_size
    codes = fit.codes.T.contiguous()  # [K, O], because columns are processed one by one
    slope = hessian @ (block.target - fit.dequantize()).T
    for outer in split_range(0, len(slope), max(group_size, OUTER_BLOCK_COLUMNS)):
        changes = torch.empty_like(slope[outer])
        for inner in split_range(outer.start, outer.stop, group_size):
            in_outer = slice(inner.start - outer.start, inner.stop - outer.start)
            changes[in_outer] = refine_group(
                fit, inner.start // group_size, codes[inner], slope[inner], hessian[inner, inner], snap
            )
            # Slopes of earlier groups are not updated: no group is visited twice.
            slope[inner.stop : outer.stop].addmm_(hessian[inner.stop : outer.stop, inner], changes[in_outer], alpha=-1)
        slope[outer.stop :].addmm_(hessian[outer.stop :, outer], changes, alpha=-1)
    fit.codes = codes.T.contiguous()


def refine_group(
    fit: AffineFit, group: int, codes: Tensor, slopes: Tensor, hessian: Tensor, snap: SnapFunction
) -> Tensor:
    """Update codes [g, O], scale and offset of one group in place.

    Args:
        fit: Receives the new scale and offset.
        group: Number of the group.
        codes: Codes of the group; changed in place.
        slopes: Slopes of the group, [g, O]; changed in place.
        hessian: Diagonal block of the group, [g, g].
        snap: Rounds scale and offset to values that can be stored.

    Returns:
        The change of the group's weights, [g, O].
    """
    scale, offset = fit.scale[:, group], fit.offset[:, group]
    old_weights = codes * scale + offset
    descend_codes(codes, scale, slopes, hessian, max_code(fit.bits))
    scale, offset = snap(*refit_affine(codes, scale, offset, slopes, hessian))
    fit.scale[:, group], fit.offset[:, group] = scale, offset
    return codes * scale + offset - old_weights


def descend_codes(codes: Tensor, scale: Tensor, slopes: Tensor, hessian: Tensor, highest_code: int) -> None:
    """Give each column of a group [g, O] its best code, all others fixed; codes and slopes are changed in place."""
    for inner in split_range(0, len(codes), INNER_BLOCK_COLUMNS):
        old_codes = codes[inner].clone()
        descend_code_block(codes[inner], scale, slopes[inner].clone(), hessian[inner, inner], highest_code)
        slopes.addmm_(hessian[:, inner], (codes[inner] - old_codes) * scale, alpha=-1)


def descend_code_block(codes: Tensor, scale: Tensor, slopes: Tensor, hessian: Tensor, highest_code: int) -> None:
    """Do the same for some columns [k, O] of a group; codes and these columns' slopes are changed in place."""
    nonzero_scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    for column in range(len(codes)):
        best_weight = codes[column] * scale + slopes[column] / hessian[column, column]  # without the offset
        code = (best_weight / nonzero_scale).round().clamp(0, highest_code) * (scale != 0)
        slopes.addr_(hessian[column], (code - codes[column]) * scale, alpha=-1)
        codes[column] = code


def refit_affine(
    codes: Tensor, scale: Tensor, offset: Tensor, slopes: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the scale and offset [O] that are best for codes [g, O] of one group, all other groups fixed.

    Solves the 2 x 2 normal equations [[a, b], [b, c]] of each row. Where they are nearly singular, only the offset is
    changed.
    """
    weighted_codes = hessian @ codes
    a, b, c = (codes * weighted_codes).sum(dim=0), weighted_codes.sum(dim=0), hessian.sum()
    scale_slope, offset_slope = (codes * slopes).sum(dim=0), slopes.sum(dim=0)
    determinant = a * c - b * b
    is_regular = determinant > 1e-6 * a * c
    divisor = torch.where(is_regular, determinant, torch.ones_like(determinant))
    scale_change = torch.where(is_regular, (c * scale_slope - b * offset_slope) / divisor, torch.zeros_like(a))
    offset_change = torch.where(is_regular, (a * offset_slope - b * scale_slope) / divisor, offset_slope / c)
    return scale + scale_change, offset + offset_change
