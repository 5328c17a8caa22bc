"""Every setting that decides pixels does so alone, in a mixed micro-batch and in a resumed job, and has its image_id.

The settings are those that are declared: a new one is tested without a new test, as far as its type is known here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.files import write_csv
from tests.support.jobs import draw, read_results
from tests.support.models.batch_layouts import read_image
from tests.support.settings import TELLING_PROMPT, TELLING_SETTINGS, get_other_value, make_settings
from tinysd_batch.job.plan.batches import SharedSettings, plan_images
from tinysd_batch.model.checkpoint.info import embedded_model_path, read_model_info
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.records import ImageRequest, Row
from tinysd_batch.settings.declaration import Effect
from tinysd_batch.settings.schema import IMAGE_SETTINGS, SETTINGS, ImageSettings

MAX_DIFFERENCE = 1  # of 255
SEED = 7
BASE = make_settings(**TELLING_SETTINGS).image_settings()
VARIANTS = {name: replace(BASE, **{name: get_other_value(setting, getattr(BASE, name))})
            for name, setting in IMAGE_SETTINGS.items()}  # fmt: skip
PIXEL_SETTINGS = [name for name, setting in SETTINGS.items() if setting.effect is Effect.PIXELS]


@pytest.fixture(scope="module")
def model() -> TinySD:
    return TinySD.from_pretrained(device="cpu")


def generate(model: TinySD, *settings: ImageSettings) -> list[npt.NDArray[np.int16]]:
    """Generate an image with each of these settings in one call; return their pixels."""
    requests = [ImageRequest(TELLING_PROMPT, SEED, each, noise_seed=SEED + 1) for each in settings]
    outputs = model.generate_images(requests)
    assert [output.request for output in outputs] == requests
    return [np.asarray(output.image).astype(np.int16) for output in outputs]


@pytest.fixture(scope="module")
def mixed(model: TinySD) -> dict[str, npt.NDArray[np.int16]]:
    """Return the pixels of all variants, generated together in one call."""
    return dict(zip(["base", *VARIANTS], generate(model, BASE, *VARIANTS.values()), strict=True))


@pytest.mark.parametrize("name", IMAGE_SETTINGS)
def test_alone_or_mixed_with_other_values(model: TinySD, mixed: dict[str, npt.NDArray[np.int16]], name: str) -> None:
    (alone,) = generate(model, VARIANTS[name])
    assert alone.shape == mixed[name].shape
    assert np.abs(alone - mixed[name]).max() <= MAX_DIFFERENCE
    if alone.shape == mixed["base"].shape:
        assert np.abs(alone - mixed["base"]).max() > MAX_DIFFERENCE, "the setting has no effect on this image"


def plan_image_id(**values: Any) -> str:
    """Return the image_id of the first image of a job with these settings."""
    settings = make_settings(**{**TELLING_SETTINGS, "seed": SEED, **values})
    digest = read_model_info(settings.model).digest
    assert settings.seed is not None
    shared = SharedSettings.from_settings(settings.seed, digest, settings)
    rows = [Row(1, "cat", settings.image_settings()), Row(2, "cat", settings.image_settings())]
    (_, _), (_, second) = plan_images(rows, shared)
    return second.image(2).image_id


@pytest.mark.parametrize("name", PIXEL_SETTINGS)
def test_another_value_gives_another_image_id(name: str, tiny_model: Path) -> None:
    base = make_settings(**{**TELLING_SETTINGS, "seed": SEED})
    value = str(tiny_model) if name == "model" else get_other_value(SETTINGS[name], getattr(base, name))
    assert plan_image_id(**{name: value}) != plan_image_id()


def test_a_model_counts_by_its_digest_and_not_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(embedded_model_path())
    assert plan_image_id(model=str(tmp_path / "model")) == plan_image_id()


def test_a_job_of_all_values_is_the_same_when_it_was_stopped_and_resumed(tmp_path: Path) -> None:
    columns = [name for name, setting in IMAGE_SETTINGS.items() if setting.is_column]
    base = {"prompt": TELLING_PROMPT, "seed": SEED, **dict.fromkeys(columns, "")}
    rows = [base, base, *({**base, name: getattr(VARIANTS[name], name)} for name in columns)]
    manifest = write_csv(tmp_path / "m.csv", rows)
    options: dict[str, Any] = {**TELLING_SETTINGS, "max_batch": 3}
    draw(manifest, tmp_path / "whole", embedded_model_path(), **options)
    for stop_after in (1, 5, None):
        draw(manifest, tmp_path / "resumed", embedded_model_path(), stop_after=stop_after, **options)
    draw(manifest, tmp_path / "alone", embedded_model_path(), **{**options, "max_batch": None})
    whole, resumed, alone = (read_results(tmp_path / name) for name in ("whole", "resumed", "alone"))
    assert [row["sha256"] for row in whole] == [row["sha256"] for row in resumed]
    assert [row["image_id"] for row in whole] == [row["image_id"] for row in alone]
    assert len({row["image_id"] for row in whole}) == 1 + len(columns)
    for row in whole:
        pixels = [read_image(tmp_path / job / row["file_name"]) for job in ("whole", "alone")]
        assert np.abs(pixels[0] - pixels[1]).max() <= MAX_DIFFERENCE
