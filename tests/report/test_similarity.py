"""Structural similarity (SSIM), and image errors in the report on a packed model."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinysd_batch.quantize.evaluate.compare import ModelComparison
from tinysd_batch.quantize.evaluate.summary import QuantizationSummary
from tinysd_batch.report.quantization.page import render_page
from tinysd_batch.report.quantization.report import report_as_dict
from tinysd_batch.report.quantization.similarity import ImageArray, mean_ssim, to_8_bit


@pytest.fixture
def summary() -> QuantizationSummary:
    """The summary of a model without layers."""
    return QuantizationSummary("mine", "calib", "preset tiny", [], [], 10**6, 60.0, 10**9, "cpu", None, None)


def make_images(noise: float = 0.0) -> ImageArray:
    """Return three smooth images with noise, [3, 40, 48, 3]."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(3, 3, 6, 6, generator=generator), (40, 48), mode="bicubic").clamp(0, 1)
    noisy = smooth + noise * torch.randn(smooth.shape, generator=generator)
    images: ImageArray = noisy.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return images


def ssim_of_the_paper(x: Tensor, y: Tensor) -> float:
    """Wang et al. 2004, equation 13, over images [N, 1, H, W] in 0..255: a Gaussian window of 11x11, sigma 1.5."""
    line = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(z, window)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, both = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top, below = (2 * mean_x * mean_y + c1) * (2 * both + c2), (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float((top / below).mean())


def test_ssim_matches_the_paper() -> None:
    expected, actual = make_images(), make_images(0.1)
    x, y = (to_8_bit(images).flatten(0, 1)[:, None] for images in (expected, actual))
    assert mean_ssim(expected, actual) == pytest.approx(ssim_of_the_paper(x, y), abs=1e-4)


def test_equal_images_have_ssim_1_and_noise_lowers_it() -> None:
    values = [mean_ssim(make_images(), make_images(noise)) or 0.0 for noise in (0.0, 0.02, 0.1, 0.3)]
    assert values[0] == 1
    assert all(higher > lower > 0 for higher, lower in pairwise(values))


def test_report_without_torchmetrics_shows_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, summary: QuantizationSummary
) -> None:
    comparison = ModelComparison([1.0], [20.0], [20.0], 20.0, 30.0, make_images(), make_images(0.1))
    content = report_as_dict(summary, comparison, ["a", "b", "c"])
    assert 0 < content["pictures_ssim"] < 1
    assert f"{content['pictures_ssim']:.4f}" in render_page(content)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    content = report_as_dict(summary, comparison, ["a", "b", "c"])
    assert content["pictures_ssim"] is None
    assert "pip install &#x27;tinysd-batch[report]&#x27;" in render_page(content)
    assert np.isfinite(content["pictures_psnr_db"])


def test_one_different_image_does_not_change_the_median_psnr(summary: QuantizationSummary) -> None:
    float_images, packed_images = make_images(), make_images(0.01)
    packed_images[1] = 1 - float_images[1]
    content = report_as_dict(
        summary, ModelComparison([1.0], [20.0], [20.0], 20.0, 9.0, float_images, packed_images), ["a", "b", "c"]
    )
    assert content["median_picture_psnr_db"] == pytest.approx(40, abs=1)
    assert f"{content['median_picture_psnr_db']:.2f} dB" in render_page(content)


def test_images_smaller_than_the_window_have_no_ssim() -> None:
    assert mean_ssim(make_images()[:, :8], make_images()[:, :8]) is None
