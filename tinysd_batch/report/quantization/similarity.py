"""Structural similarity of pictures (Wang et al. 2004), where torchmetrics is installed."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WINDOW_PX = 11  # of the Gaussian window, sigma 1.5
INSTALL_HINT = "needs torchmetrics: pip install 'tinysd-batch[report]'"

ImageArray = npt.NDArray[np.float32]  # [P, H, W, 3] in 0..1


def mean_ssim(wanted: ImageArray, found: ImageArray) -> float | None:
    """Mean SSIM over pictures as files of 8 bits show them, 1 for equal ones.

    None without torchmetrics, and for pictures smaller than the window.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    if min(wanted.shape[1:3]) < WINDOW_PX:
        return None
    border = WINDOW_PX // 2  # where the window would reach over the edge: not looked at, as in the paper
    values = []
    for place in range(len(wanted)):  # one at a time: the library keeps many maps of each
        one, other = (to_8_bit(pictures[place : place + 1]) for pictures in (wanted, found))
        _, similar = structural_similarity_index_measure(
            other, one, sigma=1.5, data_range=255.0, return_full_image=True
        )
        values.append(float(similar[..., border:-border, border:-border].mean()))
    return float(np.mean(values))


def to_8_bit(pictures: ImageArray) -> Tensor:
    """Whole numbers 0..255 as float64 [P, 3, H, W]."""
    return (torch.from_numpy(pictures).double() * 255).round().permute(0, 3, 1, 2)
