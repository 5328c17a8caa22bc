"""Compare the images of an example job with stored ones, so that no change of the code changes them unnoticed."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.paths import ROOT

MAX_DIFFERENCE = 3  # of 255: CPUs round differently


def assert_pixels_as_stored(job: str, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Compare the images of `rows`, in order of their index, with `tests/fixtures/pixels/JOB.png`.

    The stored file holds them below each other, each with its own size.
    """
    with Image.open(ROOT / "tests" / "fixtures" / "pixels" / f"{job}.png") as stored:
        expected = np.asarray(stored).astype(int)
    names = [row["file_name"] for row in sorted(rows, key=lambda row: int(row["index"]))]
    images = [np.asarray(Image.open(folder / name).convert("RGB")).astype(int) for name in names]
    assert np.concatenate(images).shape == expected.shape
    assert abs(np.concatenate(images) - expected).max() <= MAX_DIFFERENCE
