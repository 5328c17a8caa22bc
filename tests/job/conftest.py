"""A manifest for jobs."""

from pathlib import Path

import pytest

from tests.support.files import write_csv


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Six images of three rows, and an invalid row."""
    return write_csv(tmp_path / "m.csv", [
        {"prompt": "red apple", "seed": 7, "n_samples": 3, "note": "a"},
        {"prompt": "cat", "seed": "", "n_samples": "", "note": "b"},
        {"prompt": "dog", "seed": "oops", "n_samples": 2, "note": "c"},
        {"prompt": "owl", "seed": 9, "n_samples": 2, "note": "d"},
    ])  # fmt: skip
