"""Rows and images to plan with."""

from typing import Any

from tinysd_batch.job.plan.batches import SharedSettings, plan_images
from tinysd_batch.records import ImageRequest, InvalidRow, Row, SamplingParams

PARAMS = SamplingParams(width=512, height=512, steps=50, sampler="plms", eta=0.0)


def row(number: int, seed: int | None, n_iter: int, n_samples: int) -> Row:
    return Row(number, f"prompt {number}", "", seed, 7.5, n_iter, n_samples, PARAMS)


def common(seed: int, **more: Any) -> SharedSettings:
    return SharedSettings(seed=seed, model_digest="00" * 16, **more)


def images_of(rows: list[Row | InvalidRow], job_seed: int = 100, **more: Any) -> list[ImageRequest]:
    return [image for _, images in plan_images(rows, common(job_seed, **more)) for image in images]
