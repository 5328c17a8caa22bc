"""Noise correction: the measured error of a packed model's noise predictions, removed while it generates.

A prediction is modelled as e = (1 + slope) * wanted + bias + rest, at each timestep (after PTQD, He et al. 2023, which
has no negative slopes; at 2 bits predictions shrink, so most slopes are negative). Samplers get (e - bias) /
(1 + slope). Bias and rest are those of the guided noise. Guidance weights its two predictions by numbers that sum to 1,
so correcting each of them gives the same result.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.storage.atomic import write_atomically
from tinysd_batch.text import excerpt

CONFIG_KEY = "noise_correction"  # of a packed UNet's quantization_config
MIN_SLOPE, MAX_SLOPE = -0.6, 1.0
MAX_KNOTS = 1000  # one for each timestep of SD v1
MAX_BIAS_CHANNELS = 1024
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)


class Knot(BaseModel):
    """The error measured at one timestep."""

    model_config = STRICT

    time: float = Field(ge=0, le=999)
    slope: float = Field(ge=MIN_SLOPE, le=MAX_SLOPE)
    bias: list[Annotated[float, Field(ge=-10, le=10)]] = Field(min_length=1, max_length=MAX_BIAS_CHANNELS)
    deviation: float = Field(ge=0, le=100)  # standard deviation of the error that remains after correction

    def without_bias(self) -> "Knot":
        """Return a knot with the slope alone; the bias then adds to the remaining error."""
        bias_variance = sum(value**2 for value in self.bias) / len(self.bias) / (1 + self.slope) ** 2
        deviation = (self.deviation**2 + bias_variance) ** 0.5
        return Knot(time=self.time, slope=self.slope, bias=[0.0] * len(self.bias), deviation=deviation)


class NoiseCorrection(BaseModel):
    """Knots in ascending order of timestep. Values are interpolated between knots and constant beyond the ends."""

    model_config = STRICT

    scale: float = Field(ge=0, le=100)  # guidance scale of the measurement; the correction is applied at every scale
    absorbs: bool = False  # whether samplers that add fresh noise add less of it, by the deviation
    knots: list[Knot] = Field(min_length=1, max_length=MAX_KNOTS)

    @model_validator(mode="after")
    def check_knots(self) -> Self:
        if any(knot.time >= following.time for knot, following in pairwise(self.knots)):
            raise ValueError("the times of the knots must be in ascending order")
        if len({len(knot.bias) for knot in self.knots}) > 1:
            raise ValueError("all knots must have the same number of biases")
        return self

    @property
    def channels(self) -> int:
        return len(self.knots[0].bias)

    @cached_property
    def knot_table(self) -> npt.NDArray[np.float64]:
        """One row per knot: time, slope, deviation, biases."""
        return np.array([[knot.time, knot.slope, knot.deviation, *knot.bias] for knot in self.knots])

    def interpolate(self, timestep: float) -> list[float]:
        """Return slope, deviation and biases at any timestep."""
        return [float(np.interp(timestep, self.knot_table[:, 0], column)) for column in self.knot_table[:, 1:].T]

    def apply(self, noise: Tensor, timestep: float) -> Tensor:
        """Return a prediction [B, 4, h, w] without its bias and slope."""
        slope, _, *bias = self.interpolate(timestep)
        return (noise - torch.tensor(bias, dtype=noise.dtype, device=noise.device).view(-1, 1, 1)) / (1 + slope)

    def without_bias(self) -> "NoiseCorrection":
        """Return a correction of the slopes alone; the biases then add to the remaining error."""
        knots = [knot.without_bias() for knot in self.knots]
        return NoiseCorrection(scale=self.scale, absorbs=self.absorbs, knots=knots)

    def with_absorbs(self, absorbs: bool) -> "NoiseCorrection":
        """Return the same correction with samplers adding less fresh noise, or the usual amount."""
        return NoiseCorrection(scale=self.scale, absorbs=absorbs, knots=self.knots)

    def absorbed_deviation(self, timestep: float) -> float:
        """Return the remaining error's standard deviation if it replaces fresh noise (`absorbs`), else 0."""
        return self.interpolate(timestep)[1] if self.absorbs else 0.0


def read_correction(unet_folder: Path, channels: int) -> NoiseCorrection | None:
    """Read the correction of a UNet folder, or None if it has none. Raises ModelError that names the file."""
    config_path = unet_folder / "config.json"
    quantization = read_json_object(config_path).get("quantization_config") or {}
    return parse_correction(quantization, channels, config_path)


def parse_correction(quantization: Mapping[str, Any], channels: int, path: Path) -> NoiseCorrection | None:
    """Parse the correction in a `quantization_config`, read from `path`, of a UNet with this many output channels.

    Raises:
        ModelError: a value is invalid, or the number of biases does not match.
    """
    entry = quantization.get(CONFIG_KEY)
    if entry is None:
        return None
    try:
        correction = NoiseCorrection.model_validate(entry)
    except ValidationError as error:
        first_error = error.errors()[0]
        name = ".".join([CONFIG_KEY, *(str(key) for key in first_error["loc"])])
        raise ModelError(f"{path}: {name} = {excerpt(first_error['input'])}: {first_error['msg']}") from None
    if correction.channels != channels:
        raise ModelError(
            f"{path}: {CONFIG_KEY} has {correction.channels} biases per knot; this UNet has {channels} channels"
        )
    return correction


def write_correction(unet_folder: Path, correction: NoiseCorrection) -> None:
    """Write the correction into the `config.json` of a packed UNet."""
    config = read_json_object(unet_folder / "config.json")
    config["quantization_config"][CONFIG_KEY] = correction.model_dump()
    write_atomically((json.dumps(config, indent=2) + "\n").encode(), unet_folder / "config.json")
