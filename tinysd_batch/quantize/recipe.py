"""Calibration recipes: TOML files with prompts, sampling settings and the effort spent on each layer."""

import tomllib
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinysd_batch.errors import UsageError
from tinysd_batch.settings.limits import MAX_STEPS
from tinysd_batch.settings.sources import read_toml
from tinysd_batch.text import excerpt

DEFAULT_RECIPE_FILE = "sd_v1.toml"  # used if the user names none


class Recipe(BaseModel):
    """A calibration recipe. Its prompts are run through the float model; the trajectories are the calibration data."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)

    prompts: list[str] = Field(min_length=2, max_length=10_000)
    held_out: list[str] = Field(min_length=2, max_length=10_000)  # never used to calibrate, only to measure errors
    negative_prompt: str = ""
    seed: int = Field(0, ge=0, le=2**62)  # of the first prompt; held-out prompts start at seed + 2^20
    steps: int = Field(20, ge=1, le=MAX_STEPS)
    scale: float = Field(7.5, ge=0, le=100)
    points: int = Field(4, ge=1, le=MAX_STEPS)  # steps used per trajectory, evenly spaced, others for each prompt
    tokens: int = Field(32_768, ge=256, le=2**24)  # maximum number of a layer's inputs that are used
    damping: float = Field(0.01, gt=0, le=1)  # added to the Hessian: at least this share of its mean diagonal
    sweeps: int = Field(3, ge=1, le=100)  # passes of coordinate descent
    tune_steps: int = Field(400, ge=1, le=10**6)  # training steps of level distill
    batch: int = Field(32, ge=1, le=4096)  # UNet inputs in each training step
    block: int = Field(11_520, ge=64, le=2**17)  # maximum columns of one Hessian; wider layers are split


def read_recipe(path: Path | None) -> Recipe:
    """Read a recipe, or without a path the one for SD v1 that ships with the package. Raises UsageError."""
    if path is None:
        values = tomllib.loads(
            (files("tinysd_batch.quantize.recipes") / DEFAULT_RECIPE_FILE).read_text(encoding="utf-8")
        )
        return Recipe(**values)
    try:
        recipe = Recipe(**read_toml(path))
    except ValidationError as error:
        details = error.errors()[0]
        key = ".".join(str(part) for part in details["loc"])
        raise UsageError(f"{path}: {key} = {excerpt(details['input'])}: {details['msg']}") from None
    if shared := sorted(set(recipe.prompts) & set(recipe.held_out)):
        raise UsageError(f"{path}: {excerpt(shared[0])} is in both prompts and held_out; errors would look too small")
    return recipe
