"""Make rows, and plan their images, in tests."""

from typing import Any

from tests.support.settings import make_image_settings, make_settings
from tinysd_batch.job.plan.batches import SharedSettings, plan_images
from tinysd_batch.records import ImageRequest, InvalidRow, Row

SETTINGS = make_image_settings(width=512, height=512, steps=50)


def make_row(number: int, seed: int | None, n_iter: int, n_samples: int) -> Row:
    """Return a valid row with this number of images and size 512x512."""
    return Row(number, f"prompt {number}", SETTINGS, seed, n_iter, n_samples)


def make_shared_settings(seed: int, **settings: Any) -> SharedSettings:
    return SharedSettings.from_settings(seed, "00" * 16, make_settings(**settings))


def plan_requests(rows: list[Row | InvalidRow], job_seed: int = 100, **settings: Any) -> list[ImageRequest]:
    """Plan all images of the rows; `settings` are shared settings."""
    return [image for _, images in plan_images(rows, make_shared_settings(job_seed, **settings)) for image in images]
