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
    MAX_SLOPE,
    MIN_SLOPE,
    Knot,
    NoiseCorrection,
    write_correction,
)
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.evaluate.compare import compute_sqnr_db, generate_latents, predict_guided_noise

ROUND_DIGITS = 6
MAX_BIAS = 10.0
MIN_GAIN_DB = 0.1  # less may be luck with the prompts, and lost again at other scales
GenerateLatents = Callable[[NoiseCorrection | None], Tensor]  # with this correction: final latents of held-out prompts


@dataclass(frozen=True, slots=True)
class CorrectionEvaluation:
    """A correction that was measured: final latents of held-out prompts against the float model's, in dB."""

    correction: NoiseCorrection
    has_bias: bool
    sqnr_db_without: float
    sqnr_db_with: float

    @property
    def is_improvement(self) -> bool:
        return self.sqnr_db_with >= self.sqnr_db_without + MIN_GAIN_DB

    def __str__(self) -> str:
        kind = "slopes and biases" if self.has_bias else "slopes"
        verdict = "kept" if self.is_improvement else f"not kept, as it gains less than {MIN_GAIN_DB} dB"
        return f"{verdict} ({kind}): final latents {self.sqnr_db_with:.2f} dB with it, {self.sqnr_db_without:.2f} dB without"


def add_noise_correction(
    folder: Path, drawn: Trajectories, held: Trajectories, first_seed: int, scale: float, device: torch.device
) -> CorrectionEvaluation:
    """Fit a correction of a packed model folder on `drawn`, and write it there if it helps on `held`.

    `first_seed` is that of the first held-out prompt.
    """
    model = TinySD.from_pretrained(folder, device=device, dtype="full")

    def draw(correction: NoiseCorrection | None) -> Tensor:
        model.correction = correction
        return generate_latents(model, held, first_seed, scale)[-1]

    judged = evaluate_correction(fit_correction(model, drawn, scale), draw, held.final)
    if judged.is_improvement:
        write_correction(folder / "unet", judged.correction)
    return judged


def evaluate_correction(correction: NoiseCorrection, draw: GenerateLatents, wanted: Tensor) -> CorrectionEvaluation:
    """Draw without it, with its slopes only, and with all of it: that one counts which comes closest."""
    without_db = compute_sqnr_db(wanted, draw(None))
    slopes = correction.without_bias()
    by_slopes, by_all = draw(slopes), draw(correction)
    with_bias = compute_sqnr_db(wanted, by_all) > compute_sqnr_db(wanted, by_slopes)
    chosen, found = (correction, by_all) if with_bias else (slopes, by_slopes)
    # Errors do for fresh noise only where they make drawings vary more; at 2 bits these may well vary less.
    absorbs = bool(found.std() > wanted.std())
    return CorrectionEvaluation(chosen.with_absorbs(absorbs), with_bias, without_db, compute_sqnr_db(wanted, found))


@torch.no_grad()
def fit_correction(model: TinySD, drawn: Trajectories, scale: float) -> NoiseCorrection:
    """By least squares over all prompts, at each time of the float model's trajectories."""
    pairs = zip(drawn.times.tolist(), drawn.guided_noise(scale), predict_guided_noise(model, drawn, scale), strict=True)
    knots = [fit_knot(time, wanted, found) for time, wanted, found in pairs]
    return NoiseCorrection(scale=scale, knots=sorted(knots, key=lambda knot: knot.time))


def fit_knot(time: float, wanted: Tensor, found: Tensor) -> Knot:
    """What relates predictions [P, 4, h, w] to those of the float model."""
    mean, mean_found = (one.mean(dim=(0, 2, 3), keepdim=True) for one in (wanted, found))
    around = wanted - mean
    slope = (around * (found - mean_found)).sum() / around.square().sum().clamp(min=1e-12) - 1
    slope = slope.clamp(MIN_SLOPE, MAX_SLOPE)
    bias = (mean_found - (1 + slope) * mean).clamp(-MAX_BIAS, MAX_BIAS)
    rest = (found - bias) / (1 + slope) - wanted
    return Knot(
        time=time,
        slope=round(float(slope), ROUND_DIGITS),
        bias=[round(one, ROUND_DIGITS) for one in bias.flatten().tolist()],
        deviation=round(float(rest.square().mean().sqrt()), ROUND_DIGITS),
    )
