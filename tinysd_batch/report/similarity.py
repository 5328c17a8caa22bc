"""Structural similarity of pictures (Wang et al. 2004), where scikit-image is installed."""

import numpy as np
import numpy.typing as npt

WINDOW_PX = 11  # of the Gaussian window, sigma 1.5
HOW_TO_GET = "needs scikit-image: pip install 'tinysd-batch[report]'"

Pictures = npt.NDArray[np.float32]  # [P, H, W, 3] in 0..1


def mean_ssim(wanted: Pictures, found: Pictures) -> float | None:
    """Mean SSIM over pictures as files of 8 bits show them, 1 for equal ones.

    None without scikit-image, and for pictures smaller than the window.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    if min(wanted.shape[1:3]) < WINDOW_PX:
        return None
    values = [
        structural_similarity(
            *pair, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for pair in zip(as_bytes(wanted), as_bytes(found), strict=True)
    ]
    return float(np.mean(values))


def as_bytes(pictures: Pictures) -> npt.NDArray[np.uint8]:
    return (pictures * 255).round().astype(np.uint8)
