"""Noise schedules to sample with."""

from tinysd_batch.model.sampling.schedule import compute_alphas_cumprod

SD_V1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

ALPHAS = compute_alphas_cumprod(SD_V1)
