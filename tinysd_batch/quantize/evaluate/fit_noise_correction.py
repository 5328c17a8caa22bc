"""Measure what a packed model's noise predictions are off by at each time of a recipe, and whether correcting it helps.

After PTQD (He et al. 2023), but with slopes of either sign. Whether it helps is seen by where held-out pictures end:
the predictions' own error may grow where what has shrunk is stretched again, errors included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.model.sampling.noise_correction import (
    LEAST_SLOPE,
    MOST_SLOPE,
    Knot,
    NoiseCorrection,
    write_correction,
)
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.evaluate.compare import draw_again, guided_noise, sqnr_db

DIGITS = 6
MOST_BIAS = 10.0
LEAST_GAIN_DB = 0.1  # less may be luck with the prompts, and lost again at other scales
Draw = Callable[[NoiseCorrection | None], Tensor]  # with this correction: final latents of held-out prompts


@dataclass(frozen=True, slots=True)
class Judged:
    """A correction that was measured: final latents of held-out prompts against the float model's, in dB."""

    correction: NoiseCorrection
    with_bias: bool
    without_db: float
    with_db: float

    @property
    def helps(self) -> bool:
        return self.with_db >= self.without_db + LEAST_GAIN_DB

    def __str__(self) -> str:
        kind = "slopes and biases" if self.with_bias else "slopes"
        verdict = "kept" if self.helps else f"not kept, as it gains less than {LEAST_GAIN_DB} dB"
        return f"{verdict} ({kind}): final latents {self.with_db:.2f} dB with it, {self.without_db:.2f} dB without"


def correct(
    folder: Path, drawn: Trajectories, held: Trajectories, first_seed: int, scale: float, device: torch.device
) -> Judged:
    """Fit a correction of a packed model folder on `drawn`, and write it there if it helps on `held`.

    `first_seed` is that of the first held-out prompt.
    """
    model = TinySD.from_pretrained(folder, device=device, dtype="full")

    def draw(correction: NoiseCorrection | None) -> Tensor:
        model.correction = correction
        return draw_again(model, held, first_seed, scale)[-1]

    judged = judge(fit(model, drawn, scale), draw, held.final)
    if judged.helps:
        write_correction(folder / "unet", judged.correction)
    return judged


def judge(correction: NoiseCorrection, draw: Draw, wanted: Tensor) -> Judged:
    """Draw without it, with its slopes only, and with all of it: that one counts which comes closest."""
    without_db = sqnr_db(wanted, draw(None))
    slopes = correction.without_bias()
    by_slopes, by_all = draw(slopes), draw(correction)
    with_bias = sqnr_db(wanted, by_all) > sqnr_db(wanted, by_slopes)
    chosen, found = (correction, by_all) if with_bias else (slopes, by_slopes)
    # Errors do for fresh noise only where they make drawings vary more; at 2 bits these may well vary less.
    absorbs = bool(found.std() > wanted.std())
    return Judged(chosen.absorbing(absorbs), with_bias, without_db, sqnr_db(wanted, found))


@torch.no_grad()
def fit(model: TinySD, drawn: Trajectories, scale: float) -> NoiseCorrection:
    """By least squares over all prompts, at each time of the float model's trajectories."""
    pairs = zip(drawn.times.tolist(), drawn.guided(scale), guided_noise(model, drawn, scale), strict=True)
    knots = [fit_knot(time, wanted, found) for time, wanted, found in pairs]
    return NoiseCorrection(scale=scale, knots=sorted(knots, key=lambda knot: knot.time))


def fit_knot(time: float, wanted: Tensor, found: Tensor) -> Knot:
    """What relates predictions [P, 4, h, w] to those of the float model."""
    mean, mean_found = (one.mean(dim=(0, 2, 3), keepdim=True) for one in (wanted, found))
    around = wanted - mean
    slope = (around * (found - mean_found)).sum() / around.square().sum().clamp(min=1e-12) - 1
    slope = slope.clamp(LEAST_SLOPE, MOST_SLOPE)
    bias = (mean_found - (1 + slope) * mean).clamp(-MOST_BIAS, MOST_BIAS)
    rest = (found - bias) / (1 + slope) - wanted
    return Knot(
        time=time,
        slope=round(float(slope), DIGITS),
        bias=[round(one, DIGITS) for one in bias.flatten().tolist()],
        deviation=round(float(rest.square().mean().sqrt()), DIGITS),
    )
