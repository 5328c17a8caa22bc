"""Structural similarity (SSIM) of images (Wang et al. 2004), if torchmetrics is installed."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WINDOW_PX = 11  # of the Gaussian window, sigma 1.5
INSTALL_HINT = "needs torchmetrics: pip install 'tinysd-batch[report]'"

ImageArray = npt.NDArray[np.float32]  # [B, H, W, 3] in 0..1


def mean_ssim(expected: ImageArray, actual: ImageArray) -> float | None:
    """Compute the mean SSIM over images rounded to 8 bits. Equal images have 1.

    Returns:
        None without torchmetrics, and for images smaller than the window.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    if min(expected.shape[1:3]) < WINDOW_PX:
        return None
    border = WINDOW_PX // 2  # as in the paper, only where the window lies inside the image
    values = []
    for index in range(len(expected)):  # one at a time, because the library keeps many maps of each
        target, image = (to_8_bit(images[index : index + 1]) for images in (expected, actual))
        _, ssim_map = structural_similarity_index_measure(
            image, target, sigma=1.5, data_range=255.0, return_full_image=True
        )
        values.append(float(ssim_map[..., border:-border, border:-border].mean()))
    return float(np.mean(values))


def to_8_bit(images: ImageArray) -> Tensor:
    """Round to whole numbers 0..255, as float64 [B, 3, H, W]."""
    return (torch.from_numpy(images).double() * 255).round().permute(0, 3, 1, 2)
