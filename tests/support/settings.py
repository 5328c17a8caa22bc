"""Make complete settings in tests."""

from typing import Any

from tinysd_batch.job.state.open_job import resolve_settings
from tinysd_batch.model.checkpoint.info import read_model_info
from tinysd_batch.settings.declaration import Setting
from tinysd_batch.settings.sampler_names import SAMPLERS
from tinysd_batch.settings.schema import EMBEDDED_MODEL, ImageSettings, Settings
from tinysd_batch.settings.sources import parse_settings
from tinysd_batch.settings.value_types import Choice, Flag, Integer, Number, PromptText, SamplerName, Seed


def make_settings(**values: Any) -> Settings:
    """Return the settings of a job for which these are given, with the defaults of its model."""
    model = read_model_info(values.get("model", EMBEDDED_MODEL))
    return resolve_settings(parse_settings(values, "settings"), model)


def make_image_settings(**values: Any) -> ImageSettings:
    """Return the settings of an image of 64x64 pixels and 20 steps, unless others are given."""
    return ImageSettings(**{"width": 64, "height": 64, "steps": 20, "scale": 7.5, **values})


# With this prompt every setting of images has an effect on the embedded model: weights, emphasis, too many tokens.
TELLING_PROMPT = "a (red:1.4) apple:0.7 " + "green bee " * 12
# Values of settings for which changing the default is not enough.
TELLING_SETTINGS = {"steps": 2, "scale": 2.0}
OTHER_TEXT = "blue sky"


def get_other_value(setting: Setting, value: Any) -> Any:
    """Return a value that the setting may have besides this one, near it and as cheap."""
    match setting.value_type:
        case Flag():
            return not value
        case Choice(names):
            return next(name for name in names[::-1] if name != value)
        case Integer() as bounds:
            step = bounds.for_model(read_model_info(EMBEDDED_MODEL)).multiple_of
            return value - step if value - step >= bounds.minimum else value + step
        case Seed():
            return 1 if value is None else value + 1
        case Number() as bounds:
            return value + 0.5 if value + 0.5 <= bounds.maximum else value - 0.5
        case SamplerName():
            return next(name for name in SAMPLERS if name != value)
        case PromptText():
            return OTHER_TEXT if value != OTHER_TEXT else ""
    raise AssertionError(f"add another value for settings such as {setting.name}")
