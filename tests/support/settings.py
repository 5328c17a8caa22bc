"""Make complete settings in tests."""

from typing import Any

from tinysd_batch.job.state.open_job import resolve_settings
from tinysd_batch.model.checkpoint.info import read_model_info
from tinysd_batch.settings.schema import EMBEDDED_MODEL, ImageSettings, Settings
from tinysd_batch.settings.sources import parse_settings


def make_settings(**values: Any) -> Settings:
    """Return the settings of a job for which these are given, with the defaults of its model."""
    model = read_model_info(values.get("model", EMBEDDED_MODEL))
    return resolve_settings(parse_settings(values, "settings"), model)


def make_image_settings(**values: Any) -> ImageSettings:
    """Return the settings of an image of 64x64 pixels and 20 steps, unless others are given."""
    return ImageSettings(**{"width": 64, "height": 64, "steps": 20, "scale": 7.5, **values})
