"""What calibration draws and how hard it tries: a recipe, as a TOML file."""

import tomllib
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinysd_batch.config import MAX_STEPS, read_toml
from tinysd_batch.errors import UsageError
from tinysd_batch.text import excerpt

DEFAULT_RECIPE_FILE = "sd_v1.toml"  # the recipe for models whose user names none


class Recipe(BaseModel):
    """Prompts and settings of the model's own trajectories, and the effort spent on each layer."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)

    prompts: list[str] = Field(min_length=2, max_length=10_000)
    held_out: list[str] = Field(min_length=2, max_length=10_000)  # never calibrated on: errors are measured with these
    negative_prompt: str = ""
    seed: int = Field(0, ge=0, le=2**62)  # of the first prompt; held-out prompts go on from seed + 2^20
    steps: int = Field(20, ge=1, le=MAX_STEPS)
    scale: float = Field(7.5, ge=0, le=100)
    points: int = Field(4, ge=1, le=MAX_STEPS)  # of each trajectory that calibrate, evenly spread, other ones each time
    tokens: int = Field(32_768, ge=256, le=2**24)  # of a layer's inputs that count, at most
    damping: float = Field(0.01, gt=0, le=1)  # share of the Hessian's mean diagonal that is added to it, at least
    sweeps: int = Field(3, ge=1, le=100)  # of coordinate descent
    tune_steps: int = Field(400, ge=1, le=10**6)  # of level distill
    batch: int = Field(32, ge=1, le=4096)  # rows in each of them
    block: int = Field(11_520, ge=64, le=2**17)  # inputs of a layer whose Hessian is exact, at most


def read_recipe(path: Path | None) -> Recipe:
    """The recipe in a file, or the one that ships for SD v1. Raises UsageError."""
    if path is None:
        values = tomllib.loads(
            (files("tinysd_batch.quantize.recipes") / DEFAULT_RECIPE_FILE).read_text(encoding="utf-8")
        )
        return Recipe(**values)
    try:
        recipe = Recipe(**read_toml(path))
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        raise UsageError(f"{path}: {name} = {excerpt(fault['input'])}: {fault['msg']}") from None
    if both := sorted(set(recipe.prompts) & set(recipe.held_out)):
        raise UsageError(f"{path}: {excerpt(both[0])} is both among prompts and held_out; errors would look too small")
    return recipe
