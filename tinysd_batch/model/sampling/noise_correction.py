"""Noise correction: what a packed model's predictions are off by at each time, taken away again while it draws.

The model says e = (1 + slope) * wanted + bias + rest (after PTQD, He et al. 2023, which knows no negative slopes; at 2
bits predictions shrink, so most are). What a sampler gets is (e - bias) / (1 + slope). Bias and rest are of the guided
noise. Since guidance weighs its two predictions by numbers that sum to 1, correcting each of them is the same.
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
MAX_KNOTS = 1000  # SD v1 knows so many times
MAX_BIAS_CHANNELS = 1024
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)


class Knot(BaseModel):
    """What was measured at one time."""

    model_config = STRICT

    time: float = Field(ge=0, le=999)
    slope: float = Field(ge=MIN_SLOPE, le=MAX_SLOPE)
    bias: list[Annotated[float, Field(ge=-10, le=10)]] = Field(min_length=1, max_length=MAX_BIAS_CHANNELS)
    deviation: float = Field(ge=0, le=100)  # standard deviation of what is still wrong once corrected

    def without_bias(self) -> "Knot":
        """The slope alone."""
        left = sum(one**2 for one in self.bias) / len(self.bias) / (1 + self.slope) ** 2
        deviation = (self.deviation**2 + left) ** 0.5
        return Knot(time=self.time, slope=self.slope, bias=[0.0] * len(self.bias), deviation=deviation)


class NoiseCorrection(BaseModel):
    """Knots in rising order of time. In between all numbers are interpolated, beyond the ends they stay."""

    model_config = STRICT

    scale: float = Field(ge=0, le=100)  # of guidance, at which the knots were measured; applied at every one
    absorbs: bool = False  # whether samplers that draw fresh noise draw less by the deviation
    knots: list[Knot] = Field(min_length=1, max_length=MAX_KNOTS)

    @model_validator(mode="after")
    def check_knots(self) -> Self:
        if any(one.time >= other.time for one, other in pairwise(self.knots)):
            raise ValueError("the knots' times must rise")
        if len({len(knot.bias) for knot in self.knots}) > 1:
            raise ValueError("all knots must have as many biases")
        return self

    @property
    def channels(self) -> int:
        return len(self.knots[0].bias)

    @cached_property
    def knot_table(self) -> npt.NDArray[np.float64]:
        """A row for each knot: time, slope, deviation, biases."""
        return np.array([[knot.time, knot.slope, knot.deviation, *knot.bias] for knot in self.knots])

    def interpolate(self, time: float) -> list[float]:
        """Slope, deviation and biases at any time."""
        return [float(np.interp(time, self.knot_table[:, 0], column)) for column in self.knot_table[:, 1:].T]

    def apply(self, noise: Tensor, time: float) -> Tensor:
        """A prediction [B, 4, h, w] without bias and slope."""
        slope, _, *bias = self.interpolate(time)
        return (noise - torch.tensor(bias, dtype=noise.dtype, device=noise.device).view(-1, 1, 1)) / (1 + slope)

    def without_bias(self) -> "NoiseCorrection":
        """The slopes alone: what the biases took away is then still wrong."""
        knots = [knot.without_bias() for knot in self.knots]
        return NoiseCorrection(scale=self.scale, absorbs=self.absorbs, knots=knots)

    def with_absorbs(self, absorbs: bool) -> "NoiseCorrection":
        """The same with samplers drawing less fresh noise, or as much as ever."""
        return NoiseCorrection(scale=self.scale, absorbs=absorbs, knots=self.knots)

    def deviation(self, time: float) -> float:
        """Standard deviation of what is still wrong with a corrected prediction, if that does for noise; else 0."""
        return self.interpolate(time)[1] if self.absorbs else 0.0


def read_correction(unet: Path, channels: int) -> NoiseCorrection | None:
    """The correction that a UNet's folder holds, if any. Raises ModelError that names the file."""
    config = unet / "config.json"
    return parse_correction(read_json_object(config).get("quantization_config") or {}, channels, config)


def parse_correction(quantization: Mapping[str, Any], channels: int, where: Path) -> NoiseCorrection | None:
    """The same out of a `quantization_config`, of a UNet with so many channels."""
    entry = quantization.get(CONFIG_KEY)
    if entry is None:
        return None
    try:
        correction = NoiseCorrection.model_validate(entry)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join([CONFIG_KEY, *(str(part) for part in fault["loc"])])
        raise ModelError(f"{where}: {name} = {excerpt(fault['input'])}: {fault['msg']}") from None
    if correction.channels != channels:
        raise ModelError(
            f"{where}: {CONFIG_KEY} has {correction.channels} biases a knot; this UNet has {channels} channels"
        )
    return correction


def write_correction(unet: Path, correction: NoiseCorrection) -> None:
    """Put it into the configuration of a packed UNet's folder."""
    config = read_json_object(unet / "config.json")
    config["quantization_config"][CONFIG_KEY] = correction.model_dump()
    write_atomically((json.dumps(config, indent=2) + "\n").encode(), unet / "config.json")
